"""Prefetching: the next item is read in a background thread while the current one is used."""

import contextlib
import queue
import threading
from collections.abc import Iterator


def prefetch(items: Iterator) -> Iterator:
    """Yield the same items, reading one ahead in a background thread.

    On early exit, wait up to 5 s for the reader thread: a daemon thread that is killed inside C++ code can abort the
    process.
    """
    ready: queue.Queue = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def read() -> None:
        try:
            for item in items:
                ready.put((item, None))
                if stopped.is_set():
                    return
            ready.put((None, StopIteration))
        except BaseException as error:
            ready.put((None, error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            item, error = ready.get()
            if error is StopIteration:
                return
            if error is not None:
                raise error
            yield item
    finally:
        stopped.set()
        with contextlib.suppress(queue.Empty):
            ready.get_nowait()  # unblocks a reader that waits for space in the queue
        reader.join(timeout=5)

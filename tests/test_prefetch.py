"""Prefetching: the same items in the same order, read one ahead."""

import subprocess
import sys
import time

import pytest
from conftest import ROOT

from minigpt.cli import UserError
from minigpt.prefetch import prefetch


def test_prefetch_yields_the_same_items():
    """The order is kept, one item is read ahead, and an error is raised at its own place."""

    def items():
        for i in range(3):
            read.append(i)
            yield i
        raise UserError("the fourth is corrupt")

    read: list[int] = []
    prefetched = prefetch(items())
    assert next(prefetched) == 0 and next(prefetched) == 1
    deadline = time.monotonic() + 30
    while len(read) < 3:  # the third is read before it is requested
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert next(prefetched) == 2
    with pytest.raises(UserError, match="the fourth is corrupt"):
        next(prefetched)
    assert list(prefetch(iter([]))) == []


def test_a_blocked_reader_does_not_keep_the_process_alive():
    """A read that never returns delays neither leaving the loop nor the end of the process for long."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from minigpt.prefetch import prefetch\n"
        "def items():\n"
        "    yield 1\n"
        "    time.sleep(1000)\n"
        "for item in prefetch(items()): break\n"
    )
    subprocess.run([sys.executable, "-c", script, str(ROOT)], check=True, timeout=60)

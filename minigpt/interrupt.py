"""Ctrl-C without a traceback, also while a script imports its modules.

Each script imports this module first: `cli.run` catches Ctrl-C later, and importing torch takes seconds.
"""

import sys
from types import TracebackType


def print_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print one line for an uncaught Ctrl-C, and the traceback of any other exception."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = print_exception

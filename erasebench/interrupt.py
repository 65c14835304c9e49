"""SIGINT and SIGTERM: one line, an orderly end, and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_depth = [0]  # depth of nested commands: regress carries out runs
BY_DEFAULT = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stop(KeyboardInterrupt):
    """A stop signal that has been reported to the user."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stop at the first signal; end the process at the second.

    The second one ends it at once.

    Stop unwinds, so that everything is left in order. The second signal undoes nothing: threads may still be
    sampling with a model that unwinding would restore.
    """
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped:
            os._exit(128 + number)
        stopped.append(number)
        os.write(2, b"interrupted: what is begun comes to its end; a second signal stops at once\n")
        raise Stop(number)

    ours = threading.current_thread() is threading.main_thread()
    replaced = [number for number, usual in BY_DEFAULT.items() if ours and signal.getsignal(number) == usual]
    for number in replaced:
        signal.signal(number, stop)
    _depth[0] += ours
    try:
        yield
    finally:
        _depth[0] -= ours
        for number in replaced:
            signal.signal(number, BY_DEFAULT[number])


def is_within() -> bool:
    """Return whether an outer command carries out this one.

    This one then stops with it.
    """
    return _depth[0] > 0


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the command's exit code; tell the user unless that has been done."""
    if not isinstance(error, Stop):
        print("error: interrupted", file=sys.stderr)
    return error.code if isinstance(error, Stop) else 128 + signal.SIGINT


def run(command: Callable[[], int]) -> int:
    """Return a command's exit code, even after an interrupt or closed pipe.

    A pipe closes when its reader exits (store list | head).
    """
    try:
        with stoppable():
            code = command()
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        return exit_code(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter complains when it flushes
        return 128 + signal.SIGPIPE


def guard_imports() -> None:
    """Reduce an interrupt during imports to one line.

    Importing takes a second, so that a signal may arrive before the command begins.
    """
    usual = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace) -> None:
        if not issubclass(kind, KeyboardInterrupt | BrokenPipeError):
            return usual(kind, error, trace)
        # a BrokenPipeError: nobody reads the rest of the output, as after `| head`
        code = exit_code(error) if issubclass(kind, KeyboardInterrupt) else 128 + signal.SIGPIPE
        sys.stderr.flush()
        os._exit(code)  # the interpreter would exit with 1; every finally has run

    sys.excepthook = report

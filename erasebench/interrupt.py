"""SIGINT and SIGTERM: one line, an orderly end, and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_depth = [0]  # of commands within commands: regress carries out runs
BY_DEFAULT = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Stop(KeyboardInterrupt):
    """A signal that asks to stop, of which the user has been told."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """The first signal raises Stop, so that everything is left as it should be; the second ends the process at once.

    At once means that nothing is undone: threads may still be sampling with a model that unwinding would restore.
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
    """Whether a command carries out this one, and is to stop with it."""
    return _depth[0] > 0


def exit_code(error: KeyboardInterrupt) -> int:
    """The command's exit code; tells the user, unless that has been done."""
    if not isinstance(error, Stop):
        print("error: interrupted", file=sys.stderr)
    return error.code if isinstance(error, Stop) else 128 + signal.SIGINT


def run(command: Callable[[], int]) -> int:
    """A command's exit code, whether it ends, is interrupted, or its reader has gone (store list | head)."""
    try:
        with stoppable():
            code = command()
            sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        return exit_code(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
        return 128 + signal.SIGPIPE


def guard_imports() -> None:
    """Make an interrupt of any command one line, also before it has begun: importing takes a second."""
    usual = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace) -> None:
        if not issubclass(kind, KeyboardInterrupt | BrokenPipeError):
            return usual(kind, error, trace)
        # nobody reads the rest of what is printed, as after `| head`
        code = exit_code(error) if issubclass(kind, KeyboardInterrupt) else 128 + signal.SIGPIPE
        sys.stderr.flush()
        os._exit(code)  # the interpreter would make it 1; every finally has been carried out

    sys.excepthook = report

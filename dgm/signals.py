"""Ctrl-C and SIGTERM while a training runs: the step that was begun is finished first."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Asked", "deferred"]

PATIENCE = 5.0
"""Seconds that a step may take to end by itself; one that hangs (a network drive, a compiler) is thrown out of."""


class Asked:
    """Whether somebody asked the training to stop: the number of the signal, 0 for none."""

    signal: int = 0

    def __bool__(self) -> bool:
        return self.signal != 0


@contextmanager
def deferred(*, terminate: bool) -> Iterator[Asked]:
    """Collect SIGINT, and SIGTERM where `terminate`, instead of being thrown out of the middle of an update.

    A second one, or five seconds without an end of the step, interrupts at once. Only the main thread may set
    handlers: elsewhere nothing changes. Handlers are put back; a program's own SIGTERM handler and an ignored SIGINT
    (nohup) are left alone.

    >>> with deferred(terminate=False) as asked:
    ...     bool(asked)
    False
    """
    asked, before, again = Asked(), {}, _Again()

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        asked.signal = number
        if number == signal.SIGINT:
            print("stopping after this step; Ctrl-C again to stop at once", file=sys.stderr, flush=True)
        again.after(PATIENCE, number)

    wanted: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if terminate:
        wanted[signal.SIGTERM] = signal.SIG_DFL
    if threading.current_thread() is threading.main_thread():
        for number, usual in wanted.items():
            if signal.getsignal(number) is usual:
                before[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        again.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Again:
    """Sends a signal to the main thread once more, unless it is called off."""

    timer: threading.Timer | None = None

    def after(self, seconds: float, number: int) -> None:
        self.timer = threading.Timer(seconds, signal.pthread_kill, (threading.main_thread().ident, number))
        self.timer.daemon = True
        self.timer.start()

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

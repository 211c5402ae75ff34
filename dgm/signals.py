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


class Asked:
    """Whether somebody asked the training to stop: the number of the signal, 0 for none."""

    signal: int = 0

    def __bool__(self) -> bool:
        return self.signal != 0


@contextmanager
def deferred(*, terminate: bool) -> Iterator[Asked]:
    """Collect SIGINT, and SIGTERM where `terminate`, instead of being thrown out of the middle of an update.

    A second Ctrl-C interrupts at once. Only the main thread may set handlers: elsewhere nothing changes. Handlers are
    put back; a program's own SIGTERM handler and an ignored SIGINT (nohup) are left alone.

    >>> with deferred(terminate=False) as asked:
    ...     bool(asked)
    False
    """
    asked, before = Asked(), {}

    def note(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signal = number
        if number == signal.SIGINT:
            print("stopping after this step; Ctrl-C again to stop at once", file=sys.stderr, flush=True)

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
        for number, handler in before.items():
            signal.signal(number, handler)

"""How many threads a compiled step is worth.

Between two parallel kernels the other threads spin: a small step takes as long with all of them as with one, and twice
the processor's time; where others need the cores, it takes many times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .pace import steady

Step = Callable[..., Any]

EFFICIENT, TWICE = 0.7, 2.0
"""All threads are worth it where each of them adds 0.7 of the first's speed, or where a step is twice as fast."""
LARGE = 0.05
"""Seconds of a step that gets all threads without a trial."""
MANY = 2**21
"""Numbers that a step takes, from which it gets all threads where nothing may be timed."""
TRIALS = 5


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's operations in this thread alone; the setting is put back.

    >>> before = torch.get_num_threads()
    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fewest_threads(step: Step, inputs: Sequence[Tensor]) -> Step:
    """The step itself, or the step in one thread where more of them do not pay.

    Args:
        step: of tensors on the processor; it may change them in place, and gets copies here.
        inputs: what it takes.
    """
    if torch.get_num_threads() == 1 or any(t.device.type != "cpu" for t in inputs):
        return step

    def alone(*given: Tensor) -> Any:
        with one_thread():
            return step(*given)

    if steady():
        return step if sum(t.numel() for t in inputs) >= MANY else alone
    given = [t.detach().clone() for t in inputs]
    with torch.no_grad():
        seconds(alone, given)
        if seconds(alone, given) > LARGE:
            return step
        seconds(step, given)
        single = min(seconds(alone, given) for _ in range(TRIALS))
        together = min(seconds(step, given) for _ in range(TRIALS))
    wanted = min(1.0 + EFFICIENT * (torch.get_num_threads() - 1), TWICE)
    return alone if single < wanted * together else step


def seconds(step: Step, inputs: Sequence[Tensor]) -> float:
    """Time that one call takes."""
    start = time.perf_counter()
    step(*inputs)
    return time.perf_counter() - start


__all__ = ["fewest_threads", "one_thread"]

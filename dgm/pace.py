"""When a run is long enough for a graph of its step, and for a compiled one, to pay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

Compile = Literal[False, "trace", "inductor", "auto"]
Kind = Literal["eager", "trace", "inductor"]

MODES: tuple[Compile, ...] = (False, "trace", "inductor", "auto")

TRACE_SECONDS = 0.5
"""What tracing a step costs (0.2 to 0.9 s over the zoo, `python -m dgm.benchmarks speed`)."""
COMPILE_SECONDS = (4.0, 0.02)
"""What compiling costs: so much, and so much for each operation of the graph (5 to 35 s over the zoo)."""
SAVED = 0.5
"""The share of a step's time that tracing saves on the eager step, and compiling on the traced one, at least."""
SAVED_BY_REPLICAS = 0.8
"""What compiling saves on the traced step of many small replicas, whose operations cost less than their launch."""
SAMPLES = 5
"""Steps that are timed before anything is decided."""
EAGER_STEP, OPERATION = 5e-3, 6e-6
"""Seconds of Pyro's Python in an eager step, and of torch's for each operation of a traced one, at least."""

_steady: ContextVar[bool] = ContextVar("dgm_steady", default=False)


@contextmanager
def steady_choices() -> Iterator[None]:
    """Let nothing that is decided for speed depend on the clock.

    Eager, traced and compiled steps, and steps in one thread or several, differ by rounding. A training that is resumed
    gives the bits of one that was never stopped only if both choose alike: by the sizes, not by the time they took.

    >>> with steady_choices():
    ...     steady()
    True
    """
    token = _steady.set(True)
    try:
        yield
    finally:
        _steady.reset(token)


def steady() -> bool:
    """Whether choices must not depend on the clock, now."""
    return _steady.get()


@dataclass
class Pace:
    """The steps of one batch shape: how many, how long they take, and what `compile="auto"` makes of it.

    A step goes over to the next kind where the time that it is expected to save in the rest of the run exceeds what the
    change costs: remaining steps x time of a step x SAVED > cost. A run that nobody knows the end of is expected to
    last as long again as it has lasted (never more than twice the best choice's time, as in the ski-rental problem).
    """

    eager: list[float] = field(default_factory=list)
    trace: list[float] = field(default_factory=list)
    done: int = 0
    saved: float = SAVED

    def add(self, kind: Kind, seconds: float) -> None:
        """A step of this kind took so long; a few are enough."""
        self.done += 1
        times = {"eager": self.eager, "trace": self.trace}.get(kind)
        if times is not None and len(times) < 4 * SAMPLES:
            times.append(seconds)

    def seconds(self, kind: Kind) -> float | None:
        """Median time of a step of this kind, the first left out; None before enough were seen."""
        times = sorted((self.eager if kind == "eager" else self.trace)[1:])
        return times[len(times) // 2] if len(times) >= SAMPLES else None

    def pays(self, kind: Kind, remaining: int | None, operations: int = 0) -> bool:
        """Whether going over to this kind is expected to save more than it costs."""
        if steady():  # `remaining` is then the length of the whole run, of which a resumed one knows as well
            seconds: float | None = EAGER_STEP if kind == "trace" else OPERATION * operations
        else:
            seconds = self.seconds("eager" if kind == "trace" else "trace")
        if seconds is None:
            return False
        left = self.done if remaining is None else remaining
        return left * seconds * self.saved > cost(kind, operations)


def cost(kind: Kind, operations: int) -> float:
    """Seconds that the change to this kind is expected to take."""
    return TRACE_SECONDS if kind == "trace" else COMPILE_SECONDS[0] + COMPILE_SECONDS[1] * operations

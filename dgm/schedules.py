"""Schedules of the KL weight: functions of the time in training, in epochs (or steps), that give a weight."""

from __future__ import annotations

import math
from collections.abc import Callable

from .errors import OptionError

KLSchedule = Callable[[float], float]


def linear(length: float) -> KLSchedule:
    """min(1, t / length): the weight of the latents' terms rises from 0 to 1.

    Bowman et al., "Generating Sentences from a Continuous Space", 2016.

    Args:
        length: epochs (or steps, where `fit` is given steps) of the rise, > 0.

    Raises:
        OptionError: a length that is not a finite number > 0.

    >>> linear(10)(5), linear(10)(20)
    (0.5, 1.0)
    """
    _check("length", length)
    return lambda t: min(1.0, t / length)


def cyclical(length: float, ramp: float = 0.5) -> KLSchedule:
    """The rise from 0 to 1, over a share `ramp` of each cycle, again and again.

    Fu et al., "Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing", 2019. Train for a whole
    number of cycles: only at the end of one is the weight 1.

    Args:
        length: epochs (or steps) of a cycle, > 0.
        ramp: share of the cycle in which the weight rises, in (0, 1].

    Raises:
        OptionError: a number out of its domain.

    >>> [cyclical(10)(t) for t in (2.5, 5, 10, 12.5)]
    [0.5, 1.0, 1.0, 0.5]
    """
    _check("length", length)
    if not 0 < ramp <= 1:
        raise OptionError(f"ramp is {ramp!r}, expected a share of the cycle in (0, 1]")

    def weight(t: float) -> float:
        place = t % length or (length if t > 0 else 0.0)  # the end of a cycle belongs to it
        return min(1.0, place / (ramp * length))

    return weight


def _check(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise OptionError(f"{name} is {value!r}, expected a finite number of epochs or steps > 0")


__all__ = ["KLSchedule", "cyclical", "linear"]

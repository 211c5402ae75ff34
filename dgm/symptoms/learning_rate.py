"""A learning rate at which the bound falls or shakes, or at which hardly anything moves; judged by other rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..course import Course
from ..findings import Finding

LATE = 0.25
"""`Course.late` from which a curve is a straight line (1/3), and the rate may be too low."""
STRAIGHT = 0.8
"""Displacement over path length of the median parameter: 1 where all steps go the same way."""
FASTER = (30.0, 100.0, 10.0)
"""Rates that are tried instead; the first decides."""
TIMES = 10.0
"""Gain of 30 times the rate, in gains of the rate itself, from which it is too low. Where nothing but the rate holds
the training back this is 30. Healthy pairs have 1 to 4, and 7 where the widths of many weights have to travel."""
SHAKES = 0.1
"""Fall from the best look to the last, or half the spread of the last ones, in gains: the rate may be too high."""
SLOWER = 10.0
QUICK = 5e-3
"""Rate from which a tenth of it is tried whatever the curve looks like: units may have died at the first steps."""
BETTER = 1.2
"""Gain of a tenth of the rate, in gains of the rate itself, from which it is too high: a smaller rate that gets
further in as many steps. Where the rate is right, a tenth of it gains less."""
LEAST = 1e-3
"""Nats a datum that a gain must have to be one."""


def look(case: Any) -> Iterator[Finding]:
    course = case.course
    if course.error or not np.isfinite(course.curve["bound"]).all():
        return
    yield from _too_low(case, course)
    yield from _too_high(case, course)


def _too_low(case: Any, course: Course) -> Iterator[Finding]:
    table = course.parameters[course.parameters["path"] > 0]
    if not len(table) or not course.late > LATE:
        return
    straight = float((table["moved"] / table["path"]).median())
    if straight < STRAIGHT:
        return
    tried = [(f, case.trial(lr=f * case.lr)[1]) for f in FASTER[:1]]
    least = max(course.gain, LEAST / FASTER[0])
    if tried[0][1].error or tried[0][1].gain < max(TIMES * least, LEAST):
        return
    tried += [(f, case.trial(lr=f * case.lr)[1]) for f in FASTER[1:]]
    factor, best = max((t for t in tried if not t[1].error), key=lambda t: t[1].gain)
    moved = float(table["moved"].median())
    yield Finding(
        name="learning rate too low",
        part="training",
        harm=1,
        evidence=(
            f"at lr={case.lr:.3g} the bound rose by {course.gain:.3g} nats a datum in {course.steps} steps, in a "
            f"straight line ({100 * course.late:.0f} % of it in the last quarter); the median parameter moved by "
            f"{moved:.2g}"
        ),
        consequence="training takes many times the steps that it needs, and looks converged where it has not begun",
        cure=f"lr={factor * case.lr:.3g}: it gains {best.gain:.3g} nats a datum in the same steps here",
        size=best.gain,
    )


def _too_high(case: Any, course: Course) -> Iterator[Finding]:
    bound = course.curve["bound"].to_numpy()
    late = bound[len(bound) // 2 :]
    spread = (late.max() - late.min()) / 2
    gain = max(course.gain, LEAST)
    fall = float(bound.max() - bound[-1])
    if max(fall, spread) < SHAKES * gain and case.lr < QUICK:
        return
    _, other = case.trial(lr=case.lr / SLOWER)
    if other.error or other.gain < max(BETTER * course.gain, course.gain + LEAST):
        return
    _, third = case.trial(lr=case.lr / 3)
    best, rate = max(((other, case.lr / SLOWER), (third, case.lr / 3)), key=lambda t: t[0].gain)
    yield Finding(
        name="learning rate too high",
        part="training",
        harm=2,
        evidence=(
            f"at lr={case.lr:.3g} the bound rises by {course.gain:.3g} nats a datum in {course.steps} steps, at a "
            f"tenth of it by {other.gain:.3g}; in the second half it shakes by ±{spread:.2g} "
            f"and ends {fall:.2g} below its best"
        ),
        consequence="the parameters jump about the optimum, units die, and where training stops is chance",
        cure=(f"lr={rate:.3g}, which gains {best.gain:.3g} nats a datum here; or a schedule that lowers it"),
        size=best.gain - course.gain,
    )

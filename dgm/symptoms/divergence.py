"""A training that dies of a value that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..findings import Finding

SMALLER = 10.0
"""Divisor of the learning rate for the second try."""


def look(case: Any) -> Iterator[Finding]:
    course = case.course
    if not course.error:
        return
    _, other = case.trial(lr=case.lr / SMALLER)
    if other.error:
        cure = f"lr={case.lr / SMALLER:.3g} dies too (after {other.steps} steps): look at the site that is named first"
    else:
        cure = f"lr={case.lr / SMALLER:.3g} gets through {other.steps} steps here; or clip=10"
    yield Finding(
        name="divergence",
        part="training",
        harm=3,
        evidence=f"after {course.steps} steps at lr={case.lr:.3g}: {course.error.partition('; the parameters are')[0]}",
        consequence="dgm.fit stops there with the last good parameters; elsewhere all parameters are NaN",
        cure=cure,
        size=float(case.steps - course.steps),
    )

"""Parameters that no step of the training moved: outside of the loss, detached, or behind dead units."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..course import Course
from ..findings import Finding

LISTED = 4
"""Parameters named in one message."""


def look(case: Any) -> Iterator[Finding]:
    yield from frozen(case.course)


def frozen(course: Course) -> Iterator[Finding]:
    """Trainable parameters whose gradient was absent or exactly zero in every step."""
    if not course.steps:
        return
    table = course.parameters
    still = table[(table["graded"] == 0) & (table["elements"] > 0)]
    for part in ("guide", "model"):
        mine = still[still["part"] == part]
        if not len(mine):
            continue
        names = ", ".join(map(repr, mine["name"].head(LISTED))) + (", ..." if len(mine) > LISTED else "")
        whole = len(mine) == (table["part"] == part).sum()
        numbers, of = int(mine["elements"].sum()), int(table.loc[table["part"] == part, "elements"].sum())
        yield Finding(
            name="frozen parameters",
            part=part,
            harm=3 if whole else 2,
            evidence=f"{names}: a gradient of exactly 0 in each of {course.steps} steps ({numbers} of {of} numbers)",
            consequence=f"{'the ' + part if whole else 'that part of the ' + part} stays as it was initialised",
            cure=(
                "look for .detach(), .data, torch.no_grad(), rounding, or units that are never active on the way from "
                "there to the loss; requires_grad_(False) where it is meant to stay"
            ),
            size=numbers / max(1, of),
        )

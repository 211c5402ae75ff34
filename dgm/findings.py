"""What the doctor found: a mistake, what shows it, what it costs and what cures it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, overload

import pandas as pd

from .errors import OptionError

if TYPE_CHECKING:
    from .course import Course

__all__ = ["HARMS", "PARTS", "Diagnosis", "Finding", "Part"]

Part = Literal["data", "model", "guide", "training", "posterior"]
PARTS = ("data", "model", "guide", "training", "posterior")
HARMS = {3: "wrong numbers", 2: "a worse posterior or model", 1: "lost time"}
WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One mistake.

    name: what it is called, the same for all of its kind ("posterior collapse").
    part: where it is: "data", "model", "guide", "training" or "posterior".
    harm: 3 wrong numbers, 2 a worse posterior or model, 1 lost time.
    evidence: what was measured, with its numbers. consequence: what it does. cure: what to do.
    size: how much of it there is, to order findings of equal harm; nats a datum where that has a meaning.
    """

    name: str
    part: str
    harm: int
    evidence: str
    consequence: str
    cure: str
    size: float = 0.0

    def __post_init__(self) -> None:
        if self.harm not in HARMS or self.part not in PARTS:
            raise OptionError(
                f"Finding(part={self.part!r}, harm={self.harm!r}): expected a part of {', '.join(PARTS)} and a harm of "
                "1, 2 or 3"
            )

    def __str__(self) -> str:
        return f"{self.part}: {self.evidence}. {self.consequence}. Cure: {self.cure}"


@dataclass(frozen=True)
class Diagnosis(Sequence[Finding]):
    """Findings, the worst first, and what was looked at; prints as a list, and is false where nothing is found.

    findings: by harm, then by size.
    looked: names of the checks that were made. skipped: name -> why a check could not be made.
    notes: what a reader should know and what is no mistake.
    seconds: how long it took. course: the short training, None where there was none.
    """

    findings: tuple[Finding, ...] = ()
    looked: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    course: Course | None = None

    def __post_init__(self) -> None:
        ranked = tuple(sorted(self.findings, key=lambda f: (-f.harm, -f.size)))
        object.__setattr__(self, "findings", ranked)

    @property
    def names(self) -> list[str]:
        """What was found, the worst first."""
        return [f.name for f in self.findings]

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each finding."""
        columns = "name part harm evidence consequence cure size".split()
        return pd.DataFrame([asdict(f) for f in self.findings], columns=columns)

    def __len__(self) -> int:
        return len(self.findings)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    @overload
    def __getitem__(self, key: int) -> Finding: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Finding, ...]: ...
    def __getitem__(self, key: int | slice) -> Finding | tuple[Finding, ...]:
        return self.findings[key]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [line for i, finding in enumerate(self.findings, 1) for line in _item(i, finding)]
        if not self.findings:
            lines = [f"nothing found: {self._checks()}"]
        else:
            lines += ["", self._checks()]
        lines += [f"not checked: {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line for text in lines for line in _wrapped(text))

    def _checks(self) -> str:
        short = f", a short training of {self.course.steps} steps" if self.course is not None else ""
        return f"{len(self.looked)} checks{short}, {self.seconds:.1f} s"


def _item(number: int, finding: Finding) -> list[str]:
    indent = " " * 15
    head = f"{number}. ".ljust(4) + finding.part.ljust(11)
    return [
        f"{head}{finding.name} ({HARMS[finding.harm]}): {finding.evidence}",
        f"{indent}so: {finding.consequence}",
        f"{indent}cure: {finding.cure}",
    ]


def _wrapped(text: str) -> list[str]:
    own = len(text) - len(text.lstrip())
    indent = " " * (15 if own or (text[:1].isdigit() and text[1:4].lstrip("0123456789").startswith(".")) else 2)
    plain = dict(break_long_words=False, break_on_hyphens=False, drop_whitespace=True)
    lines = textwrap.wrap(text, WIDTH, initial_indent="", subsequent_indent=indent, **plain)  # type: ignore[arg-type]
    return lines or [""]

"""Everything that a symptom may look at: a pair before and after a short training, its data, and what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .borrowed import copied, quietly
from .course import Course, run_course
from .data import array_names
from .dataflow import Reading
from .errors import DataError, GuideError, ModelError
from .feeding import Loaded, Memory
from .heldout import spaced
from .latent_diagnostics import LatentDiagnostics, latent_diagnostics
from .pair import Pair, chunk_of
from .sites import DATA_PLATE, Latents

__all__ = ["Case", "NotSeen"]


ROWS = 500
"""Rows of which activity, k-hat and bounds are told, evenly spaced."""
STILL = 0.1
"""`Course.late` from which a bound counts as still rising."""
LONGER = 3
"""Times the steps of the training that is made where the first one was too short to judge."""


TRACED = 600
"""Steps from which a graph of a step pays for its trace."""


class NotSeen(Exception):
    """A check could not be made; the message says why."""


@dataclass
class Case:
    """A pair under examination. What does not exist, because an earlier check refused the pair, raises `NotSeen`.

    first: the pair before the short training; the caller's own is never touched.
    source: where the batches come from; `renew` makes it anew.
    batch, index: the first minibatch, as the programs take it, and its row numbers.
    rows, places: training rows as the programs take them, and their numbers: all of them, or 2000 evenly spaced ones
        where the training takes minibatches.
    sizes: full sizes of the data plates. held_out: rows that are not trained on, or None.
    lr, steps, seed, loss: as `doctor` was told.
    notes: what a symptom has to say that is no mistake.
    why, unread: why there was no training; why the pair could not be read.
    """

    first: Pair
    source: Memory | Loaded
    batch: tuple[Any, ...]
    index: Tensor
    rows: tuple[Any, ...]
    places: Tensor
    sizes: Mapping[str, int] = field(default_factory=dict)
    held_out: tuple[Any, ...] | None = None
    lr: float = 1e-3
    steps: int = 300
    seed: int = 0
    loss: Any = None
    renew: Callable[[], Memory | Loaded] | None = None
    trained: Pair | None = None
    why: str = ""
    unread: str = ""
    held: dict[str, Any] = field(default_factory=dict)
    trials: dict[Any, tuple[Pair, Course]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    diagnostics: dict[Pair, LatentDiagnostics] = field(default_factory=dict)

    def _get(self, name: str) -> Any:
        found = self.held.get(name)
        if found is None:
            raise NotSeen(self.why or self.unread or "there was no training")
        return found

    @property
    def course(self) -> Course:
        """The short training."""
        return self._get("course")

    @property
    def before(self) -> Reading:
        """One run on `rows` before the training, with the graph behind every number."""
        return self._get("before")

    @property
    def after(self) -> Reading:
        """One run on `rows` after the training; the same as `before` where it was refused."""
        return self.held.get("after") or self.before

    @property
    def latents(self) -> Latents:
        """The model's latents, of the first minibatch."""
        return self._get("latents")

    @property
    def start(self) -> dict[str, Tensor]:
        """Parameters of the pair by name before the training."""
        return self.first.parameters()

    @property
    def end(self) -> dict[str, Tensor]:
        """Parameters of the pair by name after the training."""
        return self.pair.parameters()

    @property
    def pair(self) -> Pair:
        """The pair after the training; as it was before where that was refused."""
        return self.trained or self.first

    @property
    def plates(self) -> set[str]:
        """Names of the data plates."""
        return {DATA_PLATE, *self.sizes}

    @property
    def data(self) -> tuple[Any, ...]:
        """All training rows as they were given, before any transform; of a DataLoader the first batch."""
        return self.source.all_rows() if isinstance(self.source, Memory) else self.batch

    @property
    def columns(self) -> dict[str, Any]:
        """`rows` by the names that messages call the arrays."""
        return dict(zip(array_names(len(self.rows)), self.rows, strict=True))

    @property
    def levelled(self) -> tuple[Pair, Course]:
        """The pair once its bound has levelled off: after the short training, or one of three times its steps.

        Raises:
            NotSeen: it is still rising then, so that nothing is to be said of where it will end.
        """
        if self.course.late < STILL:
            return self.pair, self.course
        pair, course = self.longer
        if not course.late < STILL:
            raise NotSeen(
                f"the bound still rises after {course.steps} steps ({100 * course.late:.0f} % of its gain in the last "
                "quarter): give more steps, or a larger lr"
            )
        return pair, course

    @property
    def longer(self) -> tuple[Pair, Course]:
        """A training from the same start of three times the steps."""
        return self.trial(steps=LONGER * self.steps)

    def units(self, pair: Pair) -> LatentDiagnostics:
        """Activity and KL of the local latents of a pair, on at most 500 rows.

        Raises:
            NotSeen: it has none, or they are not the only ones.
        """
        if pair not in self.diagnostics:
            rows, places = spaced(self.rows, ROWS) if not self.whole else (self.rows, self.places)
            try:
                with chunk_of(self.source.rows, self.places[places] if not self.whole else places):
                    found = latent_diagnostics(
                        pair.model, pair.guide, *rows, num_samples=16, max_rows=0, seed=self.seed, plates=self.plates
                    )
            except (ModelError, GuideError, DataError) as error:
                raise NotSeen(str(error)) from error
            self.diagnostics[pair] = found
        return self.diagnostics[pair]

    @property
    def whole(self) -> bool:
        """Whether each step takes all rows."""
        return isinstance(self.source, Memory) and self.source.whole

    def trial(self, *, lr: float | None = None, warmup: float = 0.0, steps: int | None = None) -> tuple[Pair, Course]:
        """Another short training from the same start, with the same data order: what a cure would give.

        Args:
            lr: its learning rate. warmup: share of the steps over which the KL weight rises from 0 to 1.
            steps: how many; as many as the first unless told.
        """
        lr, steps = self.lr if lr is None else lr, steps or self.steps
        key = (lr, warmup, steps)
        if key not in self.trials:
            self._get("course")
            length = warmup * steps
            pair = copied(self.first, self.loss)
            with quietly():
                course = run_course(
                    pair.model,
                    pair.guide,
                    self.renew() if self.renew is not None else self.source,
                    steps=steps,
                    lr=lr,
                    loss=self.loss,
                    sizes=self.sizes,
                    seed=self.seed,
                    kl_weight=lambda step: min(1.0, (step + 1) / length) if length else 1.0,
                    probe=False,
                    compile="trace" if steps >= TRACED else False,
                )
            self.trials[key] = (pair, course)
        return self.trials[key]

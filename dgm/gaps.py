"""Where the gap between log p(x) and the ELBO is: in q's family, in the encoder, or in what it did not see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bounds import LogWeightSummary
from .data import as_given
from .errors import DataError, GuideError, ModelError, OptionError
from .estimate import Estimate
from .gap_parts import Part, Stream, choose_evidence
from .gap_starts import WAYS, Starts, local_part, starts
from .gap_table import MODES, Gaps, Mode
from .local_fit import Rule, compared, frozen, log_weights_of, optimise
from .pace import Compile
from .packing import Packing
from .pair import Pair
from .posthoc import has_density
from .programs import Program, program_name
from .runs import Graphs
from .sites import DATA_PLATE, latents
from .weights import LogWeightSampler, refuse_untrained

__all__ = ["Gaps", "gaps"]

ROWS = 512
"""Rows times starts that are optimised together, at most."""

NUMBERS = 2**23
"""Parameters that are optimised together, at most."""

SEGMENT = 1000
"""Draws whose log weights are kept at once."""

BLIND = (
    "q* holds networks and did not start at an encoder's solution: it may have stopped at a poorer optimum (on a "
    "digits VAE an inverse autoregressive flow lost 0.4 nats by that); the amortization gap is then too small"
)

CHOOSE, REPORT = 1, 2
"""Streams of random numbers: q* is chosen by the draws of one and reported by those of the other."""


def gaps(
    model: Program,
    guide: Program,
    *data: Any,
    train: Any = None,
    family: Callable[..., nn.Module] | None = None,
    log_evidence: Estimate | Tensor | Sequence[Estimate] | None = None,
    train_log_evidence: Estimate | Tensor | Sequence[Estimate] | None = None,
    num_samples: int = 1000,
    mode: Mode | None = None,
    free_samples: int = 4,
    begin: Sequence[str] | None = None,
    tolerance: float = 0.005,
    max_steps: int = 5000,
    round_steps: int = 100,
    lr: float = 0.05,
    seed: int = 0,
    plates: Iterable[str] = (DATA_PLATE,),
    compile: Compile = "trace",
) -> Gaps:
    r"""Split log p(x_n) - ELBO into what q's family loses and what its encoder loses, for each datum.

    .. math:: \log p(x_n) - L(q_n) = \underbrace{\log p(x_n) - L(q^*_n)}_{\text{approximation}}
              + \underbrace{L(q^*_n) - L(q_n)}_{\text{amortization}}, \qquad q_n = q(\cdot | x_n)

    with q*_n the best member of the family for this datum alone, found by a free guide: parameters for each row, from
    the encoder's own solution, or from its location and scale, by Adam until rounds of steps gain nothing (see
    `dgm.local_fit.Rule`). What they miss makes the amortization gap too small and the approximation gap too large:
    nothing to speak of in normals, but a flow whose networks were hardly trained may stop short by tenths of a nat;
    hold it against `family=FullNormal`. Rounds and starts are compared by draws that nothing is reported with, so that
    a negative amortization gap is chance, or a q* that stopped short, and stands as it is. The same on training rows
    shows what is a lack of generalisation.

    log p(x) is exact where it is given as a tensor; else the best *lower* bound by its mean over all data: of the given
    estimates, and of the importance bounds of both guides by the draws of their ELBOs. One of them, never a mixture.

    Reference: Cremer, Li, Duvenaud, "Inference suboptimality in variational autoencoders", 2018.

    Args:
        model, guide: the trained pair; nothing of it is changed. Every latent is local and continuous.
        data: held-out arrays, rows first, as the model takes them. train: training rows, an array or a tuple of them.
        family: `family(features)` makes a member; default the family of the guide.
        log_evidence, train_log_evidence: log p(x_n) in nats: exact values `(N,)`, or lower bounds.
        num_samples: K, draws of each ELBO and importance bound, at least 2.
        mode: "fixed decoder": the model was not trained with this guide, so that gaps of several guides are about one
            model; "joint training": it adapted to it. Default: fixed if the model has no trainable parameter.
        free_samples: draws of a step of the free guide. begin: where it starts, "encoder", "moments", or both at twice
            the time, each row keeping the better; default both, but for members that hold networks (flows) the
            encoder's solution alone. tolerance: nats, > 0. max_steps, round_steps, lr: see `Rule`.
        seed: of all draws; the random stream outside is left as it was.
        plates: names of the data plates. compile: how a step of the free guide runs, see `SVI`.

    Raises:
        GuideError: a guide without density or without an encoder, or whose family cannot be found.
        ModelError: global or discrete latents. DataError: damaged data, evidence of another shape, a NaN log weight.
        OptionError: an option out of its range, or an upper bound as evidence.

    >>> from dgm.guides.amortized import Amortized
    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> found = gaps(model, Amortized(model, x), x, log_evidence=model.log_evidence(x), num_samples=50, max_steps=200)
    >>> found.summary["amortization"] > 0, list(found.per_datum)[:3]
    (True, ['log_evidence', 'elbo', 'elbo_free'])
    """
    plates = set(plates)
    _check_options(num_samples, mode, free_samples, tolerance, max_steps, round_steps, lr)
    if begin is not None and not (begin and set(begin) <= set(WAYS)):
        raise OptionError(f"begin is {begin!r}, expected some of {WAYS}")
    rule = Rule(tolerance, max_steps, round_steps, lr, free_samples)
    sets = {"held-out": as_given(data)}
    if train is not None:
        sets["train"] = as_given([train])
    elif train_log_evidence is not None:
        raise OptionError("train_log_evidence is given without train: give the training rows, or neither")
    if len({len(batch) for batch in sets.values()}) > 1:
        raise DataError(f"train has {len(sets['train'])} arrays and the data {len(sets['held-out'])}: give them alike")
    for name, batch in sets.items():
        if len(batch[0]) < 2:
            raise DataError(f"{name}: {len(batch[0])} row; gaps need at least 2 for an error over data")
    given = {"held-out": log_evidence, "train": train_log_evidence}
    pair, packing = _checked(model, guide, sets["held-out"], plates)
    mode = mode if mode is not None else ("joint training" if _trainable(pair) else "fixed decoder")
    with frozen(pair):
        job = _Job(model, guide, packing, family, rule, num_samples, seed, plates, compile, begin)
        whole = job.run(tuple(torch.cat(columns) for columns in zip(*sets.values(), strict=True)))
    ends = [len(batch[0]) for batch in sets.values()]
    parts = dict(zip(sets, whole.split(ends), strict=True))
    evidence = choose_evidence(parts, given)
    blind = [BLIND] if job.blind else []
    notes = [*whole.fit_notes(rule), *blind, *(note for name, part in parts.items() for note in part.notes(name))]
    return Gaps.of(parts, evidence, mode, program_name(guide), job.family, num_samples, notes)


def _check_options(
    num_samples: int, mode: Any, free_samples: int, tolerance: float, max_steps: int, round_steps: int, lr: float
) -> None:
    wholes = {"num_samples": (num_samples, 2), "free_samples": (free_samples, 1), "max_steps": (max_steps, 1)}
    for name, (value, least) in {**wholes, "round_steps": (round_steps, 1)}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} is {value!r}, expected a whole number, at least {least}")
    for name, number in {"tolerance": tolerance, "lr": lr}.items():
        if not 0 < number < math.inf:
            raise OptionError(f"{name} is {number!r}, expected a positive number")
    if mode is not None and mode not in MODES:
        raise OptionError(f"mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}")


def _checked(model: Program, guide: Program, batch: Sequence[Any], plates: set[str]) -> tuple[Pair, Packing]:
    """The pair and its local latents, or an error that says why there are no gaps of it."""
    found = latents(model, *batch, plates=plates)
    if found.global_:
        raise ModelError(
            f"latent {found.global_[0].name!r} of {program_name(model)} is global: log p(x_n) is that of one datum "
            "given the model; condition the model on a value of it, poutine.condition(model, {...}), and give gaps the "
            "local part of the guide"
        )
    discrete = next((site for site in found.values() if site.discrete), None)
    if discrete is not None:
        raise ModelError(
            f"latent {discrete.name!r} is discrete ({discrete.support_name}): the best q of a datum is found by the "
            "gradient of its draws, which it has none of; sum it out inside the model, as a mixture distribution"
        )
    if not found.local:
        raise ModelError(f"{program_name(model)} has no latent in a data plate: there is no posterior to approximate")
    local_part(guide)
    pair = Pair(model, guide)
    pair.check(batch, plates)
    refuse_untrained(pair, model, guide)
    if not has_density(guide, local=True):
        raise GuideError(
            f"{program_name(guide)} has no density (a point): it has no ELBO and so no gap; give a family with one, "
            "such as DiagonalNormal"
        )
    return pair, Packing(found.local)


def _trainable(pair: Pair) -> bool:
    model = pair.owners.get_submodule("model")
    held = [*model.parameters(), *model.__dict__.get("pyro_modules", {}).values()]
    return any(p.requires_grad for p in held)


@dataclass
class _Job:
    """Everything that is the same for all rows."""

    model: Program
    guide: Program
    packing: Packing
    make: Callable[..., nn.Module] | None
    rule: Rule
    samples: int
    seed: int
    plates: set[str]
    compile: Compile
    ways: Sequence[str] | None = None
    family: str = ""
    blind: bool = False
    graphs: Graphs = field(default_factory=Graphs)

    def run(self, batch: Sequence[Tensor]) -> Part:
        total, first, blocks = len(batch[0]), 0, list[Part]()
        while first < total:
            seeds = [int(s) for s in np.random.SeedSequence([self.seed, first]).generate_state(4)]
            begin = self._starts(tuple(t[first : first + ROWS + 1] for t in batch), seeds[3])
            rows = max(2, min(ROWS // len(begin.values), NUMBERS // begin.numbers))
            rows += total - first - rows == 1  # one row alone has no error
            block = tuple(t[first : first + rows] for t in batch)
            blocks.append(self._block(block, begin.rows(rows), seeds))
            first += len(block[0])
        return Part.joined(blocks)

    def _starts(self, batch: Sequence[Tensor], seed: int) -> Starts:
        begin = starts(self.model, self.guide, batch, self.packing, self.make, seed, self.ways)
        self.family = type(getattr(begin.member, "family", begin.member)).__name__
        return begin

    def _block(self, batch: Sequence[Tensor], begin: Starts, seeds: Sequence[int]) -> Part:
        """These rows, all starts side by side as more rows."""
        q = LogWeightSampler(self.model, self.guide, *batch, plates=self.plates, graphs=self.graphs)
        if q.is_point:
            raise GuideError(f"{program_name(self.guide)} draws nothing: it is a point, and has no ELBO")
        best = self._free(begin, batch)
        star = LogWeightSampler(self.model, best, *batch, plates=self.plates)
        if "encoder" in begin.values:
            _set(best, begin.values["encoder"])
            if not self._same(q, star, seeds[3]):
                begin = self._without_encoder(begin)
        ways = list(begin.values)
        self.blind |= begin.networks and "encoder" not in ways
        stack = tuple(t.repeat(len(ways), *[1] * (t.dim() - 1)) for t in batch)
        free = self._free(begin, stack)
        _set(free, {n: torch.cat([begin.values[way][n] for way in ways]) for n in begin.values[ways[0]]})
        fit = optimise(
            self.model, free, stack, self.rule, unit=begin.unit, seed=seeds[0], plates=self.plates,
            compile=self.compile,
        )  # fmt: skip
        found = [{n: v.chunk(len(ways))[i] for n, v in fit.parameters.items()} for i in range(len(ways))]
        way = choose(best, star, found, 4 * self.rule.samples, seeds[CHOOSE])
        rows = torch.arange(len(way), device=way.device)
        return Part.of(
            *_reported(q, star, self.samples, seeds[REPORT]),
            start=[ways[i] for i in way.tolist()],
            gain=fit.gain.reshape(len(ways), -1)[way, rows],
            fit=fit,
        )

    def _free(self, begin: Starts, batch: Sequence[Tensor]) -> Any:
        import importlib

        free = importlib.import_module("dgm.guides.free").Free
        return free(self.model, *batch, family=begin.maker(), plates=self.plates)

    def _same(self, q: LogWeightSampler, star: LogWeightSampler, seed: int) -> bool:
        mine, theirs = (log_weights_of(sampler, 4, 4, seed) for sampler in (q, star))
        return torch.allclose(mine, theirs, rtol=1e-3, atol=1e-2)

    def _without_encoder(self, begin: Starts) -> Starts:
        if self.make is None:
            raise GuideError(
                f"{program_name(self.guide)} is not the density that its family has at the encoder's output: say of "
                "which family the best q of each datum is, gaps(..., family=DiagonalNormal)"
            )
        return begin.without("encoder")


def choose(free: Any, sampler: LogWeightSampler, found: Sequence[dict[str, Tensor]], samples: int, seed: int) -> Tensor:
    """Give each row of `free` the best of its members; `(B,)`, which. A later one must be better beyond its error."""
    _set(free, found[0])
    if len(found) == 1:
        return torch.zeros(sampler.rows, dtype=torch.long, device=next(iter(found[0].values())).device)
    chunk = sampler.runs.chunk(samples)
    weights = log_weights_of(sampler, samples, chunk, seed)
    way = torch.zeros(weights.shape[1], dtype=torch.long, device=weights.device)
    for i, other in enumerate(found[1:], 1):
        _set(free, other)
        rival = log_weights_of(sampler, samples, chunk, seed)
        gain, error = compared(rival, weights)
        better = gain > error
        weights, way = torch.where(better, rival, weights), torch.where(better, i, way)
    rows = torch.arange(len(way), device=way.device)
    _set(free, {name: torch.stack([members[name] for members in found])[way, rows] for name in found[0]})
    return way


@torch.no_grad()
def _set(free: Any, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        free.members[name.removeprefix("members.").replace(".", "|")].copy_(value)


def _segments(samples: int) -> Iterator[tuple[int, int]]:
    for i, start in enumerate(range(0, samples, SEGMENT)):
        yield i, min(SEGMENT, samples - start)


def _reported(
    q: LogWeightSampler, star: LogWeightSampler, samples: int, seed: int
) -> tuple[Stream, Stream, LogWeightSummary]:
    """Log weights of both guides, and their differences, by common random numbers."""
    ours, theirs, difference = Stream(), Stream(), LogWeightSummary()
    for i, size in _segments(samples):
        chunk = min(q.runs.chunk(size), star.runs.chunk(size))
        a, b = (log_weights_of(sampler, size, chunk, (seed + i) % 2**32) for sampler in (q, star))
        ours.update(a)
        theirs.update(b)
        difference.update(b - a)
    return ours, theirs, difference

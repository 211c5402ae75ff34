"""What a gap is made of, for each row of one set: two ELBOs by common draws, and the evidence above them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .bounds import LogWeightSummary
from .errors import DataError, OptionError
from .estimate import Estimate
from .local_fit import LocalFit, Rule

__all__ = ["Bound", "Evidence", "Part", "Stream", "choose_evidence"]

EFFECTIVE = 10
"""Effective draws below which an importance bound of a row is called loose."""


TENSORS = ("elbo", "elbo_error", "elbo_free", "elbo_free_error", "amortization", "amortization_error", "gain")


@dataclass(frozen=True)
class Bound:
    """An importance bound, and its covariance with the ELBO of the same draws, `(N,)`."""

    estimate: Estimate
    covariance: Tensor


class Stream:
    """Log weights of one guide in chunks: the ELBO, the importance bound, and what they share by chance.

    Cov(mean of w / E w, mean of log w) = (E[w log w] / E[w] - E[log w]) / S.
    """

    def __init__(self) -> None:
        self.summary = LogWeightSummary()
        self._lse = self._tilted = torch.zeros(0)

    def update(self, log_weights: Tensor) -> None:
        lse = torch.logsumexp(log_weights, 0)
        tilted = (torch.softmax(log_weights, 0) * log_weights).nan_to_num(0.0).sum(0)
        if self.summary.count:
            share = torch.sigmoid(lse - self._lse).nan_to_num(0.0)
            self._tilted = (1 - share) * self._tilted + share * tilted
            self._lse = torch.logaddexp(self._lse, lse)
        else:
            self._lse, self._tilted = lse, tilted
        self.summary.update(log_weights)

    def bound(self, method: str) -> Bound:
        covariance = (self._tilted - self.summary.elbo) / max(self.summary.count - 1, 1)
        return Bound(Estimate.of(self.summary, method), covariance.nan_to_num(0.0))


@dataclass(frozen=True)
class Part:
    """One set of rows; tensors are `(N,)`, nats.

    Attributes:
        q, star: importance bounds of the guide's draws, and of those of the best members.
        elbo, elbo_free, amortization, each with its Monte Carlo error; the last one is paired.
        start: where the best member of each row came from. gain: of the last round of its optimisation.
        fits: of each block of rows.
    """

    q: Bound
    star: Bound
    elbo: Tensor
    elbo_error: Tensor
    elbo_free: Tensor
    elbo_free_error: Tensor
    amortization: Tensor
    amortization_error: Tensor
    start: list[str] = field(default_factory=list)
    gain: Tensor = field(default_factory=lambda: torch.zeros(0))
    fits: list[LocalFit] = field(default_factory=list)

    @classmethod
    def of(
        cls, q: Stream, star: Stream, difference: LogWeightSummary, start: list[str], gain: Tensor, fit: LocalFit
    ) -> Part:
        return cls(
            q.bound("importance bound by the guide's draws"),
            star.bound("importance bound by the free guide's draws"),
            q.summary.elbo,
            q.summary.elbo_error,
            star.summary.elbo,
            star.summary.elbo_error,
            difference.elbo,
            difference.elbo_error,
            start,
            gain,
            [fit],
        )

    @classmethod
    def joined(cls, blocks: Sequence[Part]) -> Part:
        """Blocks of rows as one set."""

        def bound(name: str) -> Bound:
            found = [getattr(block, name) for block in blocks]
            parts = {n: torch.cat([getattr(b.estimate, n) for b in found]) for n in ("values", "errors", "ess")}
            return Bound(found[0].estimate.replace(**parts), torch.cat([b.covariance for b in found]))

        tensors: dict[str, Any] = {n: torch.cat([getattr(block, n) for block in blocks]) for n in TENSORS}
        lists: dict[str, Any] = {n: [i for block in blocks for i in getattr(block, n)] for n in ("start", "fits")}
        return cls(bound("q"), bound("star"), **tensors, **lists)

    def split(self, sizes: Sequence[int]) -> list[Part]:
        """The sets that stand one after another."""
        parts, first = [], 0
        for size in sizes:
            rows = torch.arange(first, first + size, device=self.elbo.device)
            bounds: dict[str, Any] = {
                n: Bound(b.estimate.rows(rows), b.covariance[rows]) for n, b in (("q", self.q), ("star", self.star))
            }
            tensors = {n: getattr(self, n)[rows] for n in TENSORS}
            parts.append(replace(self, **bounds, **tensors, start=self.start[first : first + size]))
            first += size
        return parts

    @property
    def converged(self) -> bool:
        return all(fit.converged for fit in self.fits)

    @property
    def steps(self) -> int:
        """Of the block that took longest."""
        return max(fit.steps for fit in self.fits)

    def fit_notes(self, rule: Rule) -> list[str]:
        """What a reader must know of the optimisation."""
        notes = []
        open_ = [fit for fit in self.fits if not fit.converged]
        if open_:
            gained = max(float(fit.gain.mean()) for fit in open_)
            notes.append(
                f"not converged: after {rule.max_steps} steps the last round gained "
                f"{gained:.3g} nats a row (tolerance {rule.tolerance:g}); the amortization gap is too small by what is "
                "missing and the approximation gap too large: raise max_steps"
            )
        failures = sum(fit.failures for fit in self.fits)
        if failures:
            notes.append(f"{failures} rounds of the free guide met a loss that was not finite, and were cut short")
        return notes

    def notes(self, name: str) -> list[str]:
        """What a reader must know of these rows."""
        notes = []
        lost = int((~(self.elbo.isfinite() & self.elbo_free.isfinite())).sum())
        if lost:
            notes.append(f"{name}: the ELBO of {lost} rows is not finite, nor are their gaps and the means")
        error = float(self.amortization_error.square().sum().sqrt()) / len(self.elbo)
        mean = float(self.amortization.mean())
        if mean < -3 * error - 0.005:
            notes.append(
                f"{name}: the ELBO of q* is {-mean:.3g} nats below that of the encoder's q, beyond chance: it is not "
                "the best member (is `family` poorer than the guide's own?)"
            )
        return notes


@dataclass(frozen=True)
class Evidence:
    """log p(x) of every set by one method.

    Attributes:
        told: what it is. exact: no bound. source: "q" or "star" where its draws are those of an ELBO, else "".
        values, errors: by set, `(N,)`, nats. shared: Monte Carlo error of the mean where the rows share their draws.
    """

    told: str
    exact: bool
    source: str
    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    shared: dict[str, float | None]
    notes: list[str] = field(default_factory=list)


Given = Estimate | Tensor | Sequence[Estimate] | None


def choose_evidence(parts: Mapping[str, Part], given: Mapping[str, Given]) -> Evidence:
    """The exact values, or the best lower bound by its mean over all rows of all sets.

    Raises:
        DataError: not one value for each row. OptionError: an upper bound, or one set without what the other has.
    """
    kinds = {name: _kind(given[name]) for name in parts}
    if len(set(kinds.values())) > 1:
        told = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise OptionError(
            f"log p(x) must be of one kind for all rows, got {told}: give log_evidence and train_log_evidence alike"
        )
    if next(iter(kinds.values())) == "exact values":
        values = {n: _exact(given[n], len(p.elbo), p.elbo.device, n) for n, p in parts.items()}
        zeros = {name: torch.zeros_like(value) for name, value in values.items()}
        return Evidence("exact", True, "", values, zeros, dict.fromkeys(parts))
    options: list[tuple[str, dict[str, Estimate]]] = [
        (source, {name: getattr(part, source).estimate for name, part in parts.items()}) for source in ("q", "star")
    ]
    lists = {name: [item] if isinstance(item := given[name], Estimate) else list(item or ()) for name in parts}
    for found in zip(*lists.values(), strict=True):
        options.append(("", dict(zip(parts, found, strict=True))))
    for _, estimates in options:
        for name, estimate in estimates.items():
            _check(estimate, len(parts[name].elbo), name)
    source, best = max(options, key=lambda option: _mean(option[1]))
    first = next(iter(best.values()))
    return Evidence(
        f"{first.method}, K = {first.draws}: a lower bound",
        False,
        source,
        {name: e.values.double().to(parts[name].elbo.device) for name, e in best.items()},
        {name: e.errors.double().to(parts[name].elbo.device) for name, e in best.items()},
        {name: e.shared for name, e in best.items()},
        [note for name, e in best.items() for note in _loose(e, name)],
    )


def _kind(given: Given) -> str:
    if given is None:
        return "none"
    if isinstance(given, Tensor):
        return "exact values"
    estimates = [given] if isinstance(given, Estimate) else list(given)
    wrong = next((e for e in estimates if not isinstance(e, Estimate)), None)
    if wrong is not None or not estimates:
        raise OptionError(f"log_evidence holds {wrong!r}, expected a tensor of exact values, or estimates")
    return ", ".join(e.method for e in estimates)


def _exact(given: Any, rows: int, device: torch.device, name: str) -> Tensor:
    if tuple(given.shape) != (rows,) or not bool(given.isfinite().all()):
        raise DataError(
            f"{name}: log_evidence has shape {tuple(given.shape)}, expected one finite number for each of {rows} rows"
        )
    return given.detach().double().to(device)


def _check(estimate: Estimate, rows: int, name: str) -> None:
    if estimate.side != "lower":
        raise OptionError(
            f"{name}: {estimate.method} is an upper bound of log p(x); gaps are measured from the best lower bound: "
            "give that, or exact values as a tensor"
        )
    if len(estimate.values) != rows:
        raise DataError(f"{name}: {estimate.method} is of {len(estimate.values)} rows, the data have {rows}")


def _mean(estimates: Mapping[str, Estimate]) -> float:
    mean = float(torch.cat([e.values.double().cpu() for e in estimates.values()]).mean())
    return -math.inf if math.isnan(mean) else mean


def _loose(estimate: Estimate, name: str) -> list[str]:
    few = float((estimate.ess < EFFECTIVE).double().mean())
    if few <= 0.05:
        return []
    return [
        f"{name}: fewer than {EFFECTIVE} effective draws for {few:.0%} of the rows: log p(x) is too low there, and the "
        "approximation gap too small; raise num_samples, or give an annealed bound as log_evidence"
    ]

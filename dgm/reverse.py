"""Diagnostics from exact posterior draws: they see the modes that a guide's own draws never visit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bounds import LogWeightSummary
from .errors import DataError, OptionError
from .estimate import Estimate
from .given import held, mapped
from .guide_density import GuideDensity
from .packing import Packing
from .pair import Pair
from .paired_draws import checked_draws
from .programs import Program, evaluating, preserved_rng
from .row_terms import row_terms
from .sites import DATA_PLATE
from .weights import LogWeightSampler, refuse_untrained

__all__ = ["ModeCoverage", "ReverseDiagnostics", "mode_coverage", "reverse_diagnostics"]


@dataclass(frozen=True, eq=False)
class ReverseDiagnostics:
    """A guide seen from both sides; see `reverse_diagnostics`. One entry for each datum, or one for all rows, (N,).

    eubo: mean of log w over exact draws, an upper bound. forward: -log mean 1/w over the same, a tighter one.
    elbo: mean of log w over draws of the guide. forward_ess, reverse_ess: shares of the draws, in [0, 1].
    log_evidence: (N,) where it is known, None where not.
    """

    eubo: Estimate
    forward: Estimate
    elbo: Estimate
    forward_ess: Tensor
    reverse_ess: Tensor
    log_evidence: Tensor | None = None

    @property
    def symmetric_kl(self) -> Tensor:
        """KL(p || q) + KL(q || p) = EUBO - ELBO, (N,), nats: log p(x) cancels, nothing need be known."""
        return self.eubo.values - self.elbo.values

    @property
    def forward_kl(self) -> Tensor:
        """KL(p(z | x) || q) = EUBO - log p(x), (N,), nats.

        Raises:
            OptionError: log p(x) was not given.
        """
        return self.eubo.values - self._known()

    @property
    def reverse_kl(self) -> Tensor:
        """KL(q || p(z | x)) = log p(x) - ELBO, (N,), nats.

        Raises:
            OptionError: log p(x) was not given.
        """
        return self._known() - self.elbo.values

    def _known(self) -> Tensor:
        if self.log_evidence is None:
            raise OptionError(
                "log p(x) is not known here: give log_evidence=..., or read symmetric_kl, which needs none"
            )
        return self.log_evidence

    def __repr__(self) -> str:
        return (
            f"{self.elbo}\n{self.eubo}\n"
            f"KL(p || q) + KL(q || p) = {self.symmetric_kl.mean().item():.4f} nats; "
            f"forward ESS {self.forward_ess.mean().item():.3f}, reverse ESS {self.reverse_ess.mean().item():.3f}"
        )


def reverse_diagnostics(
    model: Program,
    guide: Program,
    *batch: Any,
    exact: Mapping[str, Tensor] | Tensor,
    num_samples: int | None = None,
    log_evidence: Tensor | float | None = None,
    seed: int = 0,
    plates: Iterable[str] = (DATA_PLATE,),
) -> ReverseDiagnostics:
    r"""Evidence upper bound, forward effective sample size and their reverse counterparts.

    .. math:: \mathrm{EUBO} = E_{p(z|x)}[\log w] = \log p(x) + \mathrm{KL}(p \,\|\, q), \qquad w = p(x, z) / q(z | x)

    .. math:: \mathrm{ESS}_f = \frac{1}{E_p[w]\, E_p[1/w]}, \qquad \mathrm{ESS}_r = \frac{E_q[w]^2}{E_q[w^2]}

    Both shares are one number, 1 / E_q[(p/q)^2], seen from exact draws and from the guide's: E_p[w] = E_q[w^2] / p(x)
    and E_p[1/w] = 1 / p(x), which is used in its place where log p(x) is known. A guide that misses a mode has a good
    ELBO and a good reverse estimate: of the two, believe the forward one.

    Reference: Blessing, Jia, Esslinger, Vargas, Neumann, "Beyond ELBOs: a large-scale evaluation of variational methods
    for sampling", 2024; Ji and Shen, "Stochastic variational inference via upper bound", 2019.

    Args:
        model, guide: a pair; the guide's density must be known at any value (`dgm.guide_density`).
        batch: data, rows first.
        exact: exact, independent posterior draws: `(S, *shape)` of every latent by name on its support, S >= 2; or the
            unconstrained vectors `(S, d)` of global, `(S, B, d)` of local latents, in the model's order of sites.
        num_samples: draws of the guide for the reverse side; default S.
        log_evidence: log p(x), (B,) for local latents, a number for global ones, where it is known.
        seed: of the guide's draws. plates: names of the data plates.

    Returns:
        N = B entries where all latents are local; one, for all rows together, where a latent is global.

    Raises:
        DataError: too few draws, a missing latent, or draws that are misshapen, NaN, or outside of the support.
        GuideError: the guide's density is not known.

    >>> from dgm.guides.amortized import Amortized
    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> z = model.posterior(x).sample((10,))
    >>> found = reverse_diagnostics(model, Amortized(model, x), x, exact={"z": z}, log_evidence=model.log_evidence(x))
    >>> found.forward_kl.shape, bool((found.forward_ess <= 1).all())
    (torch.Size([20]), True)
    """
    plates = tuple(plates)
    pair = Pair(model, guide)
    found = pair.check(batch, plates)
    refuse_untrained(pair, model, guide)
    density = GuideDensity(pair.guide, *batch, plates=plates)
    values = _by_site(exact, found)
    q = density.at(values, *batch)
    count = len(q.global_)
    if count < 2:
        raise DataError(f"exact: expected at least 2 draws, got {count}")

    def joint(now: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return row_terms(held(pair.run_model, now, batch), plates, q.global_)

    with evaluating(pair.model, pair.guide):
        rows, rest = mapped(joint, {name: values[name] for name in found}, batch)
    by_row = q.has_local and not q.has_global
    lw = (rows - q.local if by_row else ((rows.sum(-1) - q.local.sum(-1)) + rest - q.global_)[:, None]).double()
    known = _known_evidence(log_evidence, lw.shape[1])
    return _summary(lw, _guide_summary(model, guide, batch, num_samples or count, seed, plates), known)


def _guide_summary(
    model: Program, guide: Program, batch: Any, samples: int, seed: int, plates: Iterable[str]
) -> LogWeightSummary:
    summary = LogWeightSummary()
    with preserved_rng(seed):
        for part in LogWeightSampler(model, guide, *batch, plates=plates).chunks(samples):
            summary.update(part.total[:, None] if part.has_global else part.local)
    return summary


def _summary(lw: Tensor, reverse: LogWeightSummary, known: Tensor | None) -> ReverseDiagnostics:
    draws = len(lw)
    forward = Estimate.of(-lw, "forward importance bound", side="upper")
    log_mean = torch.logsumexp(lw, 0) - math.log(draws)
    log_inverse = torch.logsumexp(-lw, 0) - math.log(draws) if known is None else -known
    share = (-log_mean - log_inverse).exp().clamp(max=1.0)
    eubo = Estimate(
        "evidence upper bound", "upper", lw.mean(0), lw.std(0) / draws**0.5, torch.full_like(share, draws), draws
    )
    values, errors = reverse.elbo, reverse.elbo_error
    counts = torch.full_like(values, reverse.count)
    lower = Estimate("evidence lower bound", "lower", values, errors, counts, reverse.count)
    return ReverseDiagnostics(eubo, forward, lower, share, reverse.ess / reverse.count, known)


def _by_site(exact: Mapping[str, Tensor] | Tensor, found: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if not isinstance(exact, Tensor):
        return exact
    packing = Packing(found.values())
    frame = packing.frame
    lead = () if frame is None else (frame.size, *[1] * (-frame.dim - 1))
    rows = lead[:1]
    if exact.dim() != 2 + len(rows) or tuple(exact.shape[1:]) != (*rows, packing.size):
        shape = ", ".join(["S", *map(str, rows), str(packing.size)])
        raise DataError(f"exact: expected unconstrained vectors ({shape}), got {tuple(exact.shape)}")
    return packing.unpack(exact.reshape(len(exact), *lead, packing.size))[0]


def _known_evidence(log_evidence: Tensor | float | None, count: int) -> Tensor | None:
    if log_evidence is None:
        return None
    known = torch.as_tensor(log_evidence).detach().double().reshape(-1)
    if len(known) != count:
        raise DataError(f"log_evidence: expected {count} values, got {len(known)}: one for each row of local latents")
    return known


@dataclass(frozen=True, eq=False)
class ModeCoverage:
    """Which modes the draws of a guide visit; see `mode_coverage`.

    emc: entropic mode coverage, in [0, 1]; se: its error. divergence: Jensen-Shannon divergence to the true weights, in
    bits, 0 where right, at most 1. occupancy, weights: (M,). missing: the modes that no draw fell into.
    """

    emc: float
    se: float
    divergence: float
    occupancy: Tensor
    weights: Tensor
    missing: tuple[int, ...]


def mode_coverage(
    draws: Any, modes: Tensor | Callable[[Tensor], Tensor], *, weights: Tensor | None = None, reference: Any = None
) -> ModeCoverage:
    r"""Entropy of the assignment of draws to modes: 1 where all are visited equally, 0 where only one is.

    .. math:: \mathrm{EMC} = -\sum_{m=1}^M \pi_m \log_M \pi_m, \qquad \pi_m = \tfrac1S \sum_s p(m | z_s)

    Where modes have unequal weights a perfect guide has EMC < 1 and `divergence` is the number to read: the
    Jensen-Shannon divergence between occupancy and weights.

    Reference: Blessing, Jia, Esslinger, Vargas, Neumann, "Beyond ELBOs: a large-scale evaluation of variational methods
    for sampling", 2024.

    Args:
        draws: of the guide, (S, d), at least 10.
        modes: centres (M, d), to the nearest of which a draw belongs; or a function of draws that gives labels (S,),
            whole numbers from 0, or probabilities (S, M).
        weights: true weights (M,), positive. reference: exact draws (T, d), whose occupancy is taken instead; default
            equal weights. With a function that gives labels one of the two must say how many modes there are.

    Raises:
        DataError: draws that are too few or not finite, or labels that are no modes. OptionError: fewer than two modes,
            both weights and reference, or weights that are none.

    >>> coverage = mode_coverage(torch.randn(50, 1) * 0.1 + 3.0, torch.tensor([[-3.0], [3.0]]))
    >>> coverage.emc, coverage.missing
    (0.0, (0,))
    """
    if weights is not None and reference is not None:
        raise OptionError("mode_coverage: give weights or reference, not both")
    x = checked_draws("draws", draws, 10)
    true: Tensor | None = None
    if weights is not None:
        true = torch.as_tensor(weights).double()
        if true.dim() != 1 or not bool((true > 0).all()):
            raise OptionError("weights: expected positive numbers, one for each mode")
        true = true / true.sum()
    count = len(modes) if isinstance(modes, Tensor) else None if true is None else len(true)
    if reference is not None:
        true = _assigned(checked_draws("reference", reference, 10), modes, count).mean(0)
    assigned = _assigned(x, modes, len(true) if count is None and true is not None else count)
    occupancy = assigned.mean(0)
    size = len(occupancy)
    if size < 2:
        raise OptionError(f"mode_coverage: expected at least 2 modes, got {size}")
    true = torch.full_like(occupancy, 1 / size) if true is None else true.to(occupancy)
    if len(true) != size:
        raise OptionError(f"weights: expected {size} of them, one for each mode, got {len(true)}")
    surprise = -occupancy.clamp(min=1e-300).log()  # the influence of a draw on the entropy
    error = (assigned @ surprise).std().item() / len(x) ** 0.5 / math.log(size)
    middle = (occupancy + true) / 2
    bits = (_entropy(middle) - (_entropy(occupancy) + _entropy(true)) / 2) / math.log(2)
    missing = tuple((assigned.amax(0) < 0.5).nonzero().flatten().tolist())
    emc = min(_entropy(occupancy) / math.log(size), 1.0)
    return ModeCoverage(emc, error, max(bits, 0.0), occupancy, true, missing)


def _assigned(draws: Tensor, modes: Tensor | Callable[[Tensor], Tensor], count: int | None) -> Tensor:
    """Probabilities of the modes for each draw, (S, M)."""
    if isinstance(modes, Tensor):
        if modes.dim() != 2 or modes.shape[1] != draws.shape[1]:
            raise OptionError(f"modes: expected centres (M, {draws.shape[1]}), got {tuple(modes.shape)}")
        labels = torch.cdist(draws, modes.to(draws)).argmin(1)
    else:
        labels = modes(draws)
        if labels.dim() == 2 and len(labels) == len(draws):
            return labels.double()
    if labels.shape != draws.shape[:1] or labels.is_floating_point():
        raise DataError(f"modes: expected labels ({len(draws)},) or probabilities, got {tuple(labels.shape)}")
    count = count if count is not None else int(labels.max()) + 1
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise DataError(f"modes: labels from {int(labels.min())} to {int(labels.max())}, expected 0 to {count - 1}")
    return torch.nn.functional.one_hot(labels, count).double()


def _entropy(p: Tensor) -> float:
    return -torch.special.xlogy(p, p).sum().item() + 0.0  # no -0.0

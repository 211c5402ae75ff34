"""Annealed importance sampling of log p(x) from any guide, and its reverse: bounds from below and from above."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .annealing_path import Path
from .annealing_walk import Schedule, anneal, checked_schedule, pilot
from .errors import DataError, ModelError, OptionError
from .estimate import Estimate
from .heldout import row_chunks
from .hmc import check_target
from .pair import chunk_of
from .programs import Program, preserved_rng, program_name
from .sites import DATA_PLATE

__all__ = ["annealed_bound", "reverse_annealed_bound"]

VALUES_AT_ONCE = 2**20
"""Numbers in the largest tensor of a pass, about: chains times rows times what the program makes of one row."""

LEAST = 0.01
"""Acceptance below which chains of a datum are said to stand still."""


@dataclass(frozen=True)
class _Options:
    chains: int
    steps: int
    leapfrogs: int
    target: float
    schedule: Schedule
    mixing: int
    strict: bool

    def __post_init__(self) -> None:
        for name, least in (("chains", 2), ("steps", 1), ("leapfrogs", 1), ("mixing", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                why = ": one chain has no Monte Carlo error" if name == "chains" else ""
                raise OptionError(f"{name} is {value!r}, expected a whole number of at least {least}{why}")
        check_target(self.target)
        checked_schedule(self.schedule, self.steps)


def annealed_bound(
    model: Program,
    guide: Program | None,
    *batch: Any,
    chains: int = 16,
    steps: int = 1000,
    leapfrogs: int = 10,
    target: float = 0.65,
    schedule: Schedule = "adaptive",
    seed: int = 0,
    strict: bool = True,
    plates: Iterable[str] = (DATA_PLATE,),
) -> Estimate:
    r"""Annealed importance sampling of log p(x_n), with Hamiltonian transitions, from a guide or from the prior.

    .. math:: f_b(u) = q(u | x)^{1 - b}\, p(x, u)^b, \qquad
              \log w = \sum_{t=1}^T (b_t - b_{t-1}) \log \frac{p(x, u_{t-1})}{q(u_{t-1} | x)}, \qquad E[w] = p(x)

    in unconstrained coordinates u, :math:`u_0 \sim q`, and :math:`u_t` by a transition that leaves :math:`f_{b_t}`
    invariant. Where a latent is global there is one datum, all rows together. The schedule, and step sizes for each
    datum and each part of the way, are found by a pilot with draws of its own and are then fixed: the estimate of p(x)
    stays unbiased. The Monte Carlo error is that of chains which differ: where all of them lag behind alike, as from a
    start far from the posterior in few steps, the bound is low and the error does not tell; `dgm.sandwich` does, and a
    longer way.

    Reference: Neal, "Annealed importance sampling", 2001; Wu, Burda, Salakhutdinov, Grosse, "On the quantitative
    analysis of decoder-based generative models", 2017.

    Args:
        model: a Pyro program with continuous latents; its parameters are held fixed.
        guide: where the way begins: any guide whose density is known at any value. None for the prior.
        batch: data, rows first.
        chains: for each datum, at least 2. steps: T, at least 1. leapfrogs: gradients in one transition.
        target: acceptance that step sizes are adapted to, in (0, 1).
        schedule: "adaptive": at equal distances, which the pilot measures; "sigmoid", "linear"; or b_0 = 0, ...,
            b_T = 1 in a tensor.
        seed: of pilot and chains; the random stream outside is left as it was.
        strict: refuse where chains stand still; else `details` counts those data.
        plates: names of the data plates.

    Returns:
        side "lower", values (N,), or (1,) for all rows together. `details`: mean acceptance, that of the datum with the
        smallest, and the geometric mean of the step sizes, in standard deviations of the start.

    Raises:
        OptionError: an argument out of its domain. GuideError: log q is not known at any value: use guide=None.
        ModelError: a discrete latent; no latent; or chains that stand still, with how many data have such.
        DataError: log weights that are NaN.

    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> bound = annealed_bound(model, None, x, chains=4, steps=20, leapfrogs=3)
    >>> bound.side, bound.values.shape
    ('lower', torch.Size([20]))
    """
    options = _Options(chains, steps, leapfrogs, target, schedule, 0, strict)
    return _estimate(model, guide, batch, options, seed, plates, None)


def reverse_annealed_bound(
    model: Program,
    guide: Program | None,
    *batch: Any,
    exact: Mapping[str, Tensor],
    chains: int = 16,
    steps: int = 1000,
    leapfrogs: int = 10,
    target: float = 0.65,
    schedule: Schedule = "adaptive",
    mixing: int = 50,
    seed: int = 0,
    strict: bool = True,
    plates: Iterable[str] = (DATA_PLATE,),
) -> Estimate:
    r"""An upper bound on log p(x_n) by annealing from exact posterior draws back to the guide, or to the prior.

    .. math:: \hat\ell = -\log \tfrac1C \sum_c 1 / w_c, \qquad E[1 / w] = 1 / p(x)

    The latents that made simulated data are such draws (`dgm.simulate.simulate`). Chains that share one draw are made
    less alike by `mixing` transitions at the posterior itself; the Monte Carlo error leaves out what likeness remains,
    the error over data does not.

    Reference: Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015.

    Args:
        exact: the latents by name, on their supports: one draw for all chains, in the shapes of the model, or one for
            each chain, with (chains,) in front.
        mixing: transitions at the posterior before the way begins, at least 0.
        model, guide, batch, chains, steps, leapfrogs, target, schedule, seed, strict, plates: as of `annealed_bound`.

    Returns:
        side "upper", values (N,), or (1,) for all rows together.

    Raises:
        DataError: `exact` lacks a latent, or has another shape or support. Others as of `annealed_bound`.

    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> exact = {"z": model.posterior(x).sample((4,))}
    >>> reverse_annealed_bound(model, None, x, exact=exact, chains=4, steps=20, leapfrogs=3, mixing=2).side
    'upper'
    """
    options = _Options(chains, steps, leapfrogs, target, schedule, mixing, strict)
    return _estimate(model, guide, batch, options, seed, plates, exact)


def _estimate(
    model: Program,
    guide: Program | None,
    batch: Sequence[Any],
    options: _Options,
    seed: int,
    plates: Iterable[str],
    exact: Mapping[str, Tensor] | None,
) -> Estimate:
    plates = set(plates)
    parts: list[_Part] = []
    with preserved_rng(seed):
        first = Path(model, guide, batch, plates)
        ends = None if exact is None else _exact(first, exact, options.chains)
        for start, chunk in _chunks(first, batch, options.chains):
            with contextlib.ExitStack() as stack:
                if chunk is batch:
                    path = first
                else:
                    count = len(next(t for t in chunk if isinstance(t, Tensor) and t.dim()))
                    stack.enter_context(chunk_of(first.data, torch.arange(start, start + count)))
                    path = Path(model, guide, chunk, plates)
                own = None if ends is None else ends[:, start : start + path.data]
                parts.append(_Part.of(path, options, own))
    pilot, mean = torch.cat([p.pilot for p in parts]), torch.cat([p.acceptance for p in parts])
    details: dict[str, float] = {}
    if options.steps > 1:
        still = int(((pilot < LEAST) | (mean < LEAST)).sum())
        if still and options.strict:
            raise ModelError(
                f"annealing of {program_name(model)}: the chains of {still} of {len(mean)} data stand still, with an "
                f"acceptance below {LEAST:.0%} at every step size tried: look at the density of those data "
                "(infinite, or not differentiable), use float64, more steps or another guide; strict=False gives the "
                "bound as it is"
            )
        details = {
            "acceptance": mean.mean().item(),
            "smallest acceptance": mean.min().item(),
            "step size": torch.cat([p.log_step for p in parts]).mean().exp().item(),
        } | ({"data that stand still": float(still)} if still else {})
    name = "annealed importance sampling" if exact is None else "reverse annealed importance sampling"
    side: Any = "lower" if exact is None else "upper"
    return Estimate.of(torch.cat([p.log_weights for p in parts], 1), name, side, **details)


@dataclass(frozen=True)
class _Part:
    """What the chains of some rows gave: log_weights (C, n); acceptance of pilot and chains, log step size, (n,)."""

    log_weights: Tensor
    pilot: Tensor
    acceptance: Tensor
    log_step: Tensor

    @staticmethod
    def of(path: Path, options: _Options, ends: Tensor | None) -> _Part:
        run = path.densities(options.chains)
        with torch.no_grad():
            scale = _spread(path.draw(max(16, options.chains)))
            betas = checked_schedule(options.schedule, options.steps)
            found = None
            if options.steps > 1:
                first, most = path.draw(options.chains), max(50, options.steps // 4)
                found = pilot(run, first, options.leapfrogs, scale, options.target, most)
                betas = found.schedule(options.steps) if betas is None else betas
                steps = found.steps_at(betas)
            else:
                betas, steps = torch.tensor([0.0, 1.0]).double(), torch.full_like(scale[:, 0], 0.5).expand(2, -1)
            if ends is None:
                u = path.draw(options.chains)
            else:
                u, betas, steps = ends.to(scale), betas.flip(0), steps.flip(0)
            mixing = 0 if ends is None else options.mixing
            log_weights, acceptance = anneal(run, u, betas, steps, options.leapfrogs, scale, mixing)
        before = acceptance if found is None else found.acceptance[len(found.acceptance) // 2 :].mean(0).double()
        return _Part(log_weights, before, acceptance, steps.double().log().mean(0))


def _spread(u: Tensor) -> Tensor:
    """Standard deviations of the start by the quartiles of draws, `(N, d)`, which heavy tails do not move."""
    low, high = torch.quantile(u, torch.tensor([0.25, 0.75], dtype=u.dtype, device=u.device), dim=0)
    spread = (high - low) / 1.35
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def _chunks(path: Path, batch: Sequence[Any], chains: int) -> Iterator[tuple[int, Sequence[Any]]]:
    """The rows in chunks that fit memory, as equal as can be, each with the number of its first row."""
    if not path.joint.by_datum:
        yield 0, batch
        return
    each = max(math.ceil(path.widest / path.data), 1)
    most = max(1, VALUES_AT_ONCE // (chains * each))
    rows = math.ceil(path.data / math.ceil(path.data / most))
    start = 0
    for chunk in row_chunks(batch, rows):
        yield start, batch if rows >= path.data else chunk
        start += rows


def _exact(path: Path, exact: Mapping[str, Tensor], chains: int) -> Tensor:
    """Posterior draws by name as u `(C, N, d)`."""
    values = {}
    for packing in path.joint.packings:
        for site in packing.sites:
            if site.name not in exact:
                raise DataError(f"exact: no draw of the latent {site.name!r}; it has {sorted(exact)}")
            value, shape = torch.as_tensor(exact[site.name]).detach(), tuple(site.batch_shape + site.event_shape)
            if tuple(value.shape) not in (shape, (chains, *shape)):
                raise DataError(
                    f"exact: the draw of {site.name!r} has shape {tuple(value.shape)}, expected {shape}, or one for "
                    f"each chain, {(chains, *shape)}"
                )
            if not bool(torch.as_tensor(site.support.check(value)).all()):
                raise DataError(f"exact: the draw of {site.name!r} leaves the support ({site.support_name})")
            values[site.name] = value.expand(chains, *shape)
    return path.joint.pack(values)

"""NUTS: draws of the posterior itself by Hamiltonian Monte Carlo, as the reference row of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.mcmc import NUTS as Kernel
from torch import Tensor

from dgm.distributions import sample_sites
from dgm.errors import GuideError, ModelError, OptionError
from dgm.log_joint import Gradient, LogJoint
from dgm.mixing import diagnose
from dgm.packing import Packing
from dgm.pair import all_rows, current_rows
from dgm.programs import Program, isolated, preserved_rng, program_name, with_home
from dgm.sites import DATA_PLATE, latents, start_values, trace_once

from .amortized import DataPlate
from .global_ import select
from .mode import Finished, whole
from .one_of import OneOf

__all__ = ["NUTS"]


class NUTS(Finished):
    """q(u) = 1/S sum_s delta(u - u_s): draws u_1, ..., u_S of p(u | x) by the No-U-Turn sampler, one picked at random.

    Hoffman and Gelman, "The No-U-Turn Sampler", 2014; Vehtari et al., "Rank-normalization, folding, and
    localization: an improved R-hat", 2021.

    The reference that other guides are held against, where it is feasible: every step of the sampler is a gradient over
    all rows. There is nothing to train: `dgm.fit` calls `finish`, which runs Pyro's kernel, chain after chain in this
    process, on the log joint density traced once as a graph. Before it the guide is a point at the start. It has no
    density (`has_density` is False): no bound and no k-hat, but the predictive score.

    Args:
        model: the model, without trainable parameters; continuous latents.
        batch: all rows of data, as the model takes it.
        draws: of each chain, at least 4. warmup: steps before them, in which step size and metric adapt.
        chains: at least 1; R-hat across two or more sees what one does not.
        target: acceptance probability that the step size is adapted to, in (0, 1).
        depth: largest depth of a trajectory's tree, up to 2^depth gradients. The default keeps a comparison to minutes:
            1e5 gradients over all rows at most, each a millisecond for a small network. Where `notes` say that many
            trajectories ended there, a larger one mixes better; Stan and Pyro have 10.
        scale: chains start at the start values plus normal noise of this standard deviation, unconstrained.
        sites: names of the latents to serve; all of the model's.
        init: constrained start values by site name, as in `Global`.
        limit: largest number of unconstrained latents, those of every row counted.
        plates: names of the data plates.

    Attributes:
        samples: (chains * draws, d), the unconstrained draws, chain after chain.
        rhat, ess: (d,), rank-normalised split R-hat and bulk effective sample size of each coordinate.
        log_density: (2,), the same two of log p itself, which does not care how the units of a network are numbered.
        divergences, full: (), trajectories after warm-up that diverged, and the share that reached `depth`.
        notes: the worst of these in words.
        evaluations: rows whose density `finish` evaluated.

    No parameters; a sample costs one look-up.

    Raises:
        OptionError: an argument out of its domain. ModelError: a latent is discrete.
        GuideError: a model with trainable parameters, by name; more latents than `limit`; latents left out. In
            `finish`: a start where the density is not finite, or other rows than those given here.

    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, batch = example()
    >>> guide = NUTS(model, *batch, draws=20, warmup=20)
    >>> guide.finish(model, *batch)
    >>> guide(*batch)["w"].shape, guide.samples.shape
    (torch.Size([3]), torch.Size([40, 3]))
    """

    has_density = False
    samples: Tensor
    rhat: Tensor
    ess: Tensor
    log_density: Tensor
    divergences: Tensor
    full: Tensor
    acceptance: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        draws: int = 500,
        warmup: int = 300,
        chains: int = 2,
        target: float = 0.8,
        depth: int = 6,
        scale: float = 0.5,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        limit: int = 2000,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        for name, value in (("draws", draws), ("warmup", warmup), ("chains", chains), ("depth", depth)):
            whole("NUTS", name, value, 4 if name == "draws" else 1)  # R-hat splits each chain
        whole("NUTS", "limit", limit)
        if not 0 < target < 1 or not 0 <= scale < math.inf:
            raise OptionError(f"NUTS: target is {target!r} and scale {scale!r}, expected one in (0, 1) and one >= 0")
        super().__init__()
        self.draws, self.warmup, self.chains = draws, warmup, chains
        self.target, self.depth, self.scale, self.plates = target, depth, scale, tuple(plates)
        refuse_parameters(model, batch)
        found = latents(model, *batch, plates=self.plates)
        for site in found.values():
            if site.discrete:
                raise ModelError(
                    f"NUTS: latent {site.name!r} is discrete ({site.support_name}), and the sampler follows gradients: "
                    "sum it out by hand (a mixture distribution), or use Joint, which gives it probabilities"
                )
        chosen = select(found, sites)
        left = sorted(set(found) - {site.name for site in chosen})
        if left or not chosen:
            what = f"leaves out the latent {left[0]!r}" if left else "finds no latent to draw"
            raise GuideError(f"NUTS {what}: it draws all latents of a model together")
        start = start_values(model, batch, chosen, init)
        self.packings, parts = [], []
        self.data_plates: list[DataPlate | None] = []
        for plate in dict.fromkeys(site.plate for site in chosen):
            packing = Packing([site for site in chosen if site.plate == plate])
            self.packings.append(packing)
            self.data_plates.append(None if plate is None else DataPlate(packing.sites[0], batch))
            parts.append(packing.pack(start).flatten())
        joint = LogJoint(model, self.packings, self.plates)
        self.sizes = joint.sizes
        if joint.size > limit:
            raise GuideError(
                f"NUTS: {joint.size} unconstrained latents, those of every row counted, are more than limit={limit}: "
                "take Global or Joint, fewer rows, or a larger limit if you have the time"
            )
        self.register_buffer("samples", torch.cat(parts).expand(chains * draws, joint.size).clone())
        shapes = {"rhat": (joint.size,), "ess": (joint.size,), "log_density": (2,)}
        for name, shape in (shapes | {"divergences": (), "full": (), "acceptance": ()}).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.evaluations = 0

    @property
    def notes(self) -> list[str]:
        if not self.done:
            return self.unfinished()
        worst, least = self._name(int(self.rhat.nan_to_num(math.inf).argmax())), self._name(int(self.ess.argmin()))
        return [
            f"NUTS: {self.chains} chain{'s' * (self.chains > 1)} of {self.draws} draws, R-hat at most "
            f"{float(self.rhat.max()):.3f} ({worst}), "
            f"effective sample size at least {float(self.ess.min()):.0f} ({least}), of log p itself "
            f"{float(self.log_density[0]):.3f} and {float(self.log_density[1]):.0f}; {int(self.divergences)} "
            f"divergences, mean acceptance {float(self.acceptance):.2f}"
            + (f"; {float(self.full):.0%} of the trajectories were cut at depth={self.depth}" if self.full else "")
        ]

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        u = pyro.sample("_draw", OneOf(self.samples if self.done else self.samples[:1]), infer={"is_auxiliary": True})
        values: dict[str, Tensor] = {}
        for packing, plate, part in zip(self.packings, self.data_plates, u.split(self.sizes, -1), strict=True):
            if plate is None:
                values.update(sample_sites(packing, part, False))
                continue
            count = plate.count(batch)
            rows = current_rows()
            total = all_rows() or (count if rows is None else plate.rows)
            if total != plate.rows:
                raise GuideError(
                    f"NUTS holds draws of the latents of {plate.rows} rows and sees {total}: it has none of held-out "
                    "rows; use it for models whose latents are global, or look at the rows it was made with"
                )
            own = part.unflatten(-1, (plate.rows, packing.size))  # (*S, rows, d)
            own = own if rows is None else torch.index_select(own, -2, rows)
            with plate.open(batch) as shape:
                values.update(sample_sites(packing, own.unflatten(-2, shape), False))
        return values

    def finish(self, model: Callable[..., Any], *data: Any, seed: int = 0) -> None:
        """Draw from the posterior given all rows.

        Args:
            model: the model. data: the rows that the guide was made with. seed: of starts and chains.

        Raises:
            GuideError: a density that is not finite at a start; rows other than those of the constructor.
        """
        for plate in self.data_plates:
            if plate is not None and plate.count(data) != plate.rows:
                raise GuideError(f"NUTS was made for {plate.rows} rows, finish got {plate.count(data)}")
        joint, start = LogJoint(model, self.packings, self.plates), self.samples[0].clone()
        counted = _Counted(joint.traced(start, *data), data)
        chains, divergences, accepted = [], 0, 0.0
        with preserved_rng(seed), poutine.block(), isolated(validate=False):
            for _ in range(self.chains):
                first = start + self.scale * torch.randn_like(start)
                if not all(bool(torch.isfinite(t).all()) for t in counted(first, *data)):
                    first = start.clone()
                value, slope = counted(first, *data)
                if not bool(torch.isfinite(value)) or not bool(torch.isfinite(slope).all()):
                    raise GuideError(
                        "NUTS: the log density or its gradient is not finite at the start: give start values by init="
                    )
                kernel, chain = self._chain(lambda z: _Potential.apply(z["u"], counted, data), first, counted)
                chains.append(chain)
                divergences += len(kernel._divergences)
                accepted += float(kernel._mean_accept_prob) / self.chains
        drawn = torch.stack(chains)  # (chains, draws, d + 2): log p and whether the tree was full stand behind u
        size = len(start)
        self.samples.copy_(drawn[..., :size].flatten(0, 1))
        self.full.fill_(float(drawn[..., -1].mean()))
        self.divergences.fill_(divergences)
        self.acceptance.fill_(accepted)
        rhat, ess = diagnose(drawn[..., : size + 1])
        self.rhat.copy_(rhat[:size])
        self.ess.copy_(ess[:size])
        self.log_density.copy_(torch.stack([rhat[size], ess[size]]))
        rows = next((len(item) for item in data if isinstance(item, Tensor) and item.dim()), 1)
        self.evaluations = counted.calls * rows
        self.mark()

    def _chain(self, potential: Any, first: Tensor, counted: _Counted) -> tuple[Any, Tensor]:
        """The kernel, and its draws `(draws, d + 2)`: u, log p(u), and whether the trajectory was cut at `depth`."""
        kernel = Kernel(potential_fn=potential, target_accept_prob=self.target, max_tree_depth=self.depth)
        kernel.initial_params = {"u": first}
        kernel.setup(self.warmup)
        state, kept = kernel.initial_params, []
        for step in range(self.warmup + self.draws):
            before = counted.calls
            state = kernel.sample(state)
            if step >= self.warmup:
                full = counted.calls - before >= 2**self.depth - 1
                energy = kernel._fetch_from_cache()[1].detach()
                kept.append(torch.cat([state["u"].detach(), torch.stack([-energy, torch.full_like(energy, full)])]))
        return kernel, torch.stack(kept)

    def _name(self, place: int) -> str:
        """The site that a coordinate belongs to."""
        for packing, size in zip(self.packings, self.sizes, strict=True):
            if place < size:
                place %= packing.size
                return next(b.site.name for b in packing.blocks if b.start <= place < b.stop)
            place -= size
        return ""


def refuse_parameters(model: Program, batch: Any) -> None:
    """A posterior of the latents is that of one model: its parameters must be fixed.

    Raises:
        GuideError: the model has trainable parameters.
    """
    program, home = with_home(model)
    trace_once(program, *batch)  # makes the parameters of pyro.param
    names = [name for name, p in home.named_parameters() if p.requires_grad]
    names += [name for name, p in home.__dict__.get("pyro_modules", {}).items() if p.requires_grad]
    if names:
        raise GuideError(
            f"NUTS: {program_name(model)} has the trainable parameter {names[0]!r}: draws are of the posterior of one "
            "model, so train it with another guide first and freeze it (requires_grad_(False)), or give it a prior"
        )


class _Counted:
    def __init__(self, gradient: Gradient, data: Any):
        self.gradient, self.calls = gradient, 0

    def __call__(self, u: Tensor, *data: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.gradient(u, *data)


class _Potential(torch.autograd.Function):
    """-log p with the gradient that came with it, for a kernel that asks autograd."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, gradient: Gradient, data: Any) -> Tensor:
        value, slope = gradient(u.detach(), *data)
        ctx.save_for_backward(slope)
        return -value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return -upstream * ctx.saved_tensors[0], None, None

"""Hamiltonian annealing: leapfrog steps from the encoder's normal towards the posterior, differentiated through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import InferDict
from torch import Tensor, nn

from dgm.distributions import sample_sites
from dgm.errors import OptionError
from dgm.inside import log_target, refuse_unknown
from dgm.sites import DATA_PLATE, latents

from .amortized import Amortized
from .diagonal_normal import DiagonalNormal
from .domains import check_scale, check_size

__all__ = ["HamiltonianAnnealing"]


class HamiltonianAnnealing(Amortized):
    """u_K at the end of K uncorrected Hamiltonian steps through (1 - b) log q_0 + b log p(x, z), with the weight

        log w = log p(x, z_K) - log q_0(u_0) + sum_k [log N(rho_k; 0, I) - log N(rho'_k; 0, I)]
        rho'_k = eta rho_(k-1) + sqrt(1 - eta^2) eps_k,    (u_k, rho_k) = leapfrog(u_(k-1), rho'_k; b_k)

    whose mean is p(x): the leapfrog keeps volume and the refreshment keeps N(0, I), so nothing else remains of the
    densities of the way there and back. No step is rejected, and all is differentiable. (Geffner and Domke, "MCMC
    Variational Inference via Uncorrected Hamiltonian Annealing", 2021; Zhang, Hsu, Li, Finn and Grosse, "Differentiable
    Annealed Importance Sampling and the Perils of Gradient Noise", 2021.) q_0 is the encoder's diagonal normal; the
    dynamics run in its standardised coordinates, so that a step is in units of its scale. Step size, eta (with two
    steps or more) and the bridges 0 < b_1 < ... < b_K < 1 are learned.

    Starts as Amortized with a diagonal normal does, bridges at k / (K + 1). Attaches to any model with continuous local
    latents of one data plate. Global latents are refused: their target holds all rows, and the gradient noise of a
    minibatch at every step is what Zhang et al. warn of; in Joint another guide serves them, and this one is given
    their values. A draw costs K + 1 gradients of the model's density, and the density at its end.

    Args:
        model: the model; the guide keeps a reference, its parameters stay the model's.
        batch: data, as the model takes it.
        encoder: a factory `in_features -> module`, or a ready module `(B, in_features) -> (B, c)`.
        steps: K, at least 1.
        step_size: of the leapfrog at the start, > 0, in standard deviations of q_0.
        damping: eta at the start, in (0, 1): how much of the momentum a refreshment keeps.
        sites, inputs, init_scale, plates: as of `Amortized`.

    Raises:
        GuideError: as of Amortized; or a local latent is left out.
        OptionError: steps < 1, a step size that is not positive, or a damping outside (0, 1).

    >>> from dgm.models.vae import example
    >>> from .encoders import mlp
    >>> model, batch = example()
    >>> guide = HamiltonianAnnealing(model, *batch, encoder=mlp(16), steps=2)
    >>> guide(*batch)["z"].shape, guide.evaluations_per_step
    (torch.Size([20, 2]), 4)
    """

    conditional = True
    reverse_density = True  # its log q holds the way back, whose parameters may not be held fixed

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        encoder: Callable[..., nn.Module] | nn.Module | None = None,
        steps: int = 4,
        step_size: float = 0.1,
        damping: float = 0.9,
        sites: Iterable[str] | None = None,
        inputs: Iterable[str | int] | None = None,
        init_scale: float | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        check_size("HamiltonianAnnealing: steps", steps, why="; Amortized takes none")
        check_scale("HamiltonianAnnealing: step_size", step_size)
        if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < 1:
            raise OptionError(f"HamiltonianAnnealing: damping is {damping!r}, expected a number in (0, 1)")
        plates = tuple(plates)
        super().__init__(
            model,
            *batch,
            family=DiagonalNormal,
            encoder=encoder,
            sites=sites,
            inputs=inputs,
            init_scale=init_scale,
            plates=plates,
        )
        refuse_unknown(latents(model, *batch, plates=plates), self.packing.sites, type(self).__name__)
        self.family: DiagonalNormal
        self.__dict__["model"] = model  # a reference: its parameters are the model's, not the guide's
        self.steps = steps
        self.log_step = nn.Parameter(torch.tensor(math.log(step_size)))
        self.bridge = nn.Parameter(torch.zeros(steps + 1))
        if steps > 1:
            self.keep = nn.Parameter(torch.tensor(math.log(damping / (1 - damping))))
        self.to(self.packing.dtype)

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the model's density for one draw: K + 1 gradients, and that of the bound."""
        return self.steps + 2

    def forward(self, *batch: Any, given: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        context = self.encoder(self.features(batch))  # (B, c)
        name, own = f"_{self.packing.plate}", InferDict(is_auxiliary=True)
        shape = (len(context), *[1] * (-self.plate.dim - 1))
        plate = self.plate.open(batch)  # entered twice: the model opens its own in between
        loc, log_scale = self.family.loc_and_log_scale(context.reshape(*shape, -1))
        scale = log_scale.exp()
        with plate:
            first = dist.Normal(loc, scale, validate_args=False).to_event(1)
            u = pyro.sample(f"{name}_start", first, infer=own)  # (*S, B, d)

        target = log_target(self.model, self.packing, batch, u, given, kwargs)
        v, ratio = self.anneal((u - loc) / scale, torch.func.grad(lambda v: target(loc + scale * v)))
        with plate:
            u = pyro.sample(name, dist.Delta(loc + scale * v, -ratio, event_dim=1), infer=own)
            return sample_sites(self.packing, u)

    def anneal(self, v: Tensor, slope: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The end of the way and sum_k [log N(rho_k) - log N(rho'_k)], from `(*S, B, d)` standardised, `(*S, B)`.

        Args:
            v: draws of q_0, standardised: there q_0 is N(0, I).
            slope: gradient of log p(x, z) in v.
        """
        step, bridges = self.log_step.exp(), torch.softmax(self.bridge, 0).cumsum(0)
        noise = torch.randn(self.steps, *v.shape, dtype=v.dtype, device=v.device)
        rho, ratio, force = noise[0], torch.zeros_like(v[..., 0]), slope(v)
        for k in range(self.steps):
            if k > 0:
                eta = torch.sigmoid(self.keep)
                rho = eta * rho + (1 - eta.square()).sqrt() * noise[k]
            before, b = rho, bridges[k]
            rho = rho + 0.5 * step * (b * force - (1 - b) * v)
            v = v + step * rho
            force = slope(v)  # of the model alone, so that the next bridge takes it up as it is
            rho = rho + 0.5 * step * (b * force - (1 - b) * v)
            ratio = ratio + 0.5 * (before.square() - rho.square()).sum(-1)
        return v, ratio

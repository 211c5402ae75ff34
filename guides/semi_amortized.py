"""Semi-amortized inference: the encoder's normal, refined for each datum by unrolled gradient steps of its own ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from dgm.distributions import as_pyro, auxiliary, sample_sites
from dgm.inside import log_target, refuse_unknown
from dgm.sites import DATA_PLATE, latents

from .amortized import Amortized
from .diagonal_normal import DiagonalNormal
from .domains import check_scale, check_size

__all__ = ["SemiAmortized"]


class SemiAmortized(Amortized):
    """q(z_n | x_n) = N(u; loc_T, exp(log_scale_T)^2) |du/dz|, T gradient steps away from what the encoder says.

        lambda_0 = encoder(x_n),    lambda_(t+1) = lambda_t + step * clip(grad_lambda L_n(lambda_t, eps_t))
        L_n(lambda, eps) = log p(x_n, z(u)) + log |dz/du| + sum log_scale,    u = loc + exp(log_scale) eps

    (Kim, Wiseman, Miller, Sontag and Rush, "Semi-Amortized Variational Autoencoders", 2018; Marino, Yue and Mandt,
    "Iterative Amortized Inference", 2018.) Training differentiates through the steps, into the encoder, the model and
    the step sizes. Refinement is a part of q: it runs in evaluation as well. Its noise eps_t is drawn anew for each
    step and given to no one, so that q given eps is a normal density, every log weight an importance weight, and the
    bound valid.

    Starts as Amortized with a diagonal normal does. Attaches to any model with continuous local latents of one data
    plate, whose other latents are global: alone, or in Joint, which gives it their values. A draw costs `steps`
    gradients of the model's density in training, each also differentiated; `evaluations_per_step` counts the density
    itself as well, so that guides can be compared at equal cost.

    Args:
        model: the model; the guide keeps a reference, its parameters stay the model's.
        batch: data, as the model takes it.
        encoder: a factory `in_features -> module`, or a ready module `(B, in_features) -> (B, c)`.
        steps: T, at least 1.
        step_size: at the start, > 0, of location and log scale alike; both are learned.
        clip: largest norm of a row's gradient, > 0.
        second_order: False takes each step's gradient as a constant: cheaper, and biased (Kim et al. compare both).
        sites, inputs, init_scale, plates: as of `Amortized`.

    Raises:
        GuideError: as of Amortized; or a local latent is left out.
        OptionError: steps < 1, or a step size or clip that is not positive.

    >>> from dgm.models.vae import example
    >>> from .encoders import mlp
    >>> model, batch = example()
    >>> guide = SemiAmortized(model, *batch, encoder=mlp(16), steps=2)
    >>> guide(*batch)["z"].shape, guide.evaluations_per_step
    (torch.Size([20, 2]), 3)
    """

    conditional = True

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        encoder: Callable[..., nn.Module] | nn.Module | None = None,
        steps: int = 5,
        step_size: float = 0.1,
        clip: float = 5.0,
        second_order: bool = True,
        sites: Iterable[str] | None = None,
        inputs: Iterable[str | int] | None = None,
        init_scale: float | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        check_size("SemiAmortized: steps", steps, why="; Amortized takes none")
        check_scale("SemiAmortized: step_size", step_size)
        check_scale("SemiAmortized: clip", clip)
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
        self.steps, self.clip, self.second_order = steps, float(clip), second_order
        self.log_step = nn.Parameter(torch.full((2,), math.log(step_size), dtype=self.packing.dtype))

    @property
    def evaluations_per_step(self) -> int:
        """Evaluations of the model's density for one draw: the refinement's, and that of the bound."""
        return 1 + self.steps

    def forward(self, *batch: Any, given: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Tensor]:
        context = self.encoder(self.features(batch))  # (B, c)
        shape = (len(context), *[1] * (-self.plate.dim - 1))
        loc, log_scale = self.family.loc_and_log_scale(context.reshape(*shape, -1))
        loc, log_scale = self.refine(loc, log_scale, batch, given, kwargs)
        with self.plate.open(batch):
            density = dist.Normal(loc, log_scale.exp(), validate_args=False).to_event(1)
            u = pyro.sample(f"_{self.packing.plate}", as_pyro(density), infer=auxiliary(self.packing))  # (*S, B, d)
            return sample_sites(self.packing, u)

    def refine(
        self,
        loc: Tensor,
        log_scale: Tensor,
        batch: Any,
        given: Mapping[str, Tensor] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Location and log scale, `(B, d)`, after the gradient steps."""

        target = log_target(self.model, self.packing, batch, loc, given, options)

        def local_elbo(loc: Tensor, log_scale: Tensor, eps: Tensor) -> Tensor:
            return target(loc + log_scale.exp() * eps) + log_scale.sum()

        noise = torch.randn(self.steps, *loc.shape, dtype=loc.dtype, device=loc.device)
        step = self.log_step.exp()
        for eps in noise.unbind(0):
            slope = torch.stack(torch.func.grad(local_elbo, argnums=(0, 1))(loc, log_scale, eps))  # (2, B, d)
            if not self.second_order:
                slope = slope.detach()
            norm = slope.square().sum((0, -1)).clamp_min(1e-12).sqrt().unsqueeze(-1)  # (B, 1)
            slope = slope * (self.clip / norm.clamp_min(self.clip))
            loc, log_scale = loc + step[0] * slope[0], log_scale + step[1] * slope[1]
        return loc, log_scale

"""Multiplicative normalizing flow: normal weights whose means are multiplied by a flow's draw, one for each input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.distributions import as_pyro, sample_sites
from dgm.errors import GuideError
from dgm.packing import Packing
from dgm.sites import DATA_PLATE

from .domains import check_scale, check_size, check_widths
from .inverse_autoregressive_flow import GatedStep, InverseAutoregressiveFlow
from .layers import global_sites, matrices_of, packed_start, spread

__all__ = ["MultiplicativeFlow"]


class MultiplicativeFlow(PyroModule):
    """q(W) = int prod_ij N(W_ij; z_j M_ij, S_ij^2) q(z) dz with a flow q(z) over the inputs of each layer.

        log w = log p(D, W) - log q(W | z) - log q(z) + log r(z | W),    z ~ q(z),    W ~ q(W | z)

    C. Louizos, M. Welling: Multiplicative Normalizing Flows for Variational Bayesian Neural Networks, 2017. q(W) is no
    normal: one draw of z moves all weights of an input together. Its density is an integral, so a reverse model
    r(z | W) is learned beside it. E[w] is the evidence and E[log w] a bound on it: the weights are those of importance
    sampling on the pair (W, z), valid for whatever r is (`has_density` is True); the bound is as tight as r is good.

        q(z): inverse autoregressive flow about 1;    r(z | W): v = T((z - a) / b),    v_j ~ N(k_j t, exp(l_j t)^2)
        t = mean over outputs of tanh(c' W'),    T: gated autoregressive steps in their fast direction

    Weights are the real global latents with two axes or more, (outputs, inputs, ...), and a vector that stands alone in
    its layer, as one row: the coefficients of a regression. All others (biases, scales) have a diagonal normal. It
    starts at the network's own weights. A layer of n inputs has a mean and a scale for each weight and two masked
    networks of some 3 n h + h parameters for each step (h hidden units); a draw costs those networks' products.

    Args:
        model: the model; only its sites are read.
        batch: a batch of data, as the model takes it.
        transforms: steps of the flow, and of the reverse model, at least 1.
        hidden: widths of the masked networks' hidden layers, one or more.
        init_scale: standard deviation of the weights at the start; else the model's `init_scale`, else 0.1.
        z_scale: that of z, > 0: relative to the weights. Too small a start stays: the gradient of the flow is
            proportional to it.
        sites: names of the latents to serve; default all.
        init: constrained start values by site name; otherwise the model's `init_values()`, else the prior's median.
        plates: names of the data plates.

    Raises:
        OptionError: a scale that is not positive and finite, transforms < 1, or hidden empty or with a width < 1.
        GuideError: a latent is local, a name is unknown, or none is a weight.
        ModelError: a latent is discrete.

    >>> from dgm.models.bnn import example
    >>> model, batch = example()
    >>> MultiplicativeFlow(model, *batch)(*batch)["network.2.weight"].shape
    torch.Size([1, 8])
    """

    has_density = True
    draw_costs = "its networks, one pass for all weights of an input"
    reverse_density = True  # log q holds parameters of r: no estimator may leave out their gradient

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        transforms: int = 2,
        hidden: Sequence[int] = (32,),
        init_scale: float | None = None,
        z_scale: float = 0.3,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ) -> None:
        super().__init__()
        scale = init_scale if init_scale is not None else getattr(model, "init_scale", 0.1)
        for name, value in (("init_scale", scale), ("z_scale", z_scale)):
            check_scale(f"MultiplicativeFlow: {name}", value)
        check_size("MultiplicativeFlow: transforms", transforms)
        check_widths("MultiplicativeFlow", hidden)
        self.packing = Packing(global_sites(model, batch, sites, plates, "MultiplicativeFlow"))
        self.matrices = matrices_of(self.packing, vectors=True)
        if not self.matrices:
            raise GuideError(
                f"MultiplicativeFlow: none of the latents {[s.name for s in self.packing.sites]} is a real matrix, "
                "(outputs, inputs), or a vector of coefficients: use Global"
            )
        start = packed_start(self.packing, model, batch, init)  # (d,)
        self.loc = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(torch.full_like(start, math.log(scale)))
        self.flows, self.reverses = nn.ModuleDict(), nn.ModuleDict()
        for name, matrix in self.matrices.items():
            flow = InverseAutoregressiveFlow(matrix.inputs, transforms=transforms, hidden=hidden).to(start.dtype)
            flow.initialise(torch.ones(matrix.inputs), z_scale)
            self.flows[_key(name)] = flow
            self.reverses[_key(name)] = Reverse(matrix.inputs, transforms, hidden, z_scale).to(start.dtype)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        z = {
            name: pyro.sample(f"_global_{name}", as_pyro(self.flows[_key(name)]()), infer={"is_auxiliary": True})
            for name in self.matrices
        }  # (*S, inputs)
        factor = spread(self.packing, self.matrices, {name: value.unsqueeze(-2) for name, value in z.items()})
        density = dist.Normal(self.loc * factor, self.log_scale.exp(), validate_args=False).to_event(1)
        u = pyro.sample("_global", density, infer={"is_auxiliary": True})  # (*S, d)
        log_r = self.loc.new_zeros(())
        for block in self.packing.blocks:
            matrix = self.matrices.get(block.site.name)
            if matrix is not None:
                w = u[..., block.start : block.stop].unflatten(-1, (matrix.outputs, matrix.inputs, matrix.rest))
                log_r = log_r + self.reverses[_key(matrix.name)](z[matrix.name], w)
        return sample_sites(self.packing, u, extra=-log_r)


class Reverse(nn.Module):
    """r(z | W): the density of z, (*S, n), told by the weights it multiplied, (*S, outputs, n, rest).

    Args:
        inputs: n, at least 1.
        transforms: number of steps; none for a single input.
        hidden: widths of their masked networks' hidden layers.
        scale: standard deviation of z at the start, where it is that of the flow itself.
    """

    def __init__(self, inputs: int, transforms: int, hidden: Sequence[int], scale: float) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.ones(inputs))
        self.log_scale = nn.Parameter(torch.full((inputs,), math.log(scale)))
        order = torch.arange(1, inputs + 1)
        self.steps = nn.ModuleList(
            GatedStep(order.flip(0) if t % 2 else order, 0, hidden) for t in range(transforms if inputs > 1 else 0)
        )
        self.c = nn.Parameter(torch.randn(inputs) / math.sqrt(inputs))
        # not zero: in their products with t they would leave c without a gradient
        self.mean = nn.Parameter(0.01 * torch.randn(inputs))
        self.log_spread = nn.Parameter(0.01 * torch.randn(inputs))

    def forward(self, z: Tensor, w: Tensor) -> Tensor:
        v = (z - self.loc) * (-self.log_scale).exp()
        log_det = -self.log_scale.sum(-1)
        for step in self.steps:
            push, _ = step(None)
            v, change = push(v)
            log_det = log_det + change
        t = torch.einsum("...oir,i->...or", w, self.c).tanh().mean((-2, -1)).unsqueeze(-1)  # (*S, 1)
        normal = dist.Normal(self.mean * t, (self.log_spread * t).exp(), validate_args=False)
        return normal.log_prob(v).sum(-1) + log_det


def _key(name: str) -> str:
    return name.replace(".", "|")  # a module's name holds no dots

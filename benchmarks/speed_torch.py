"""Rivals in PyTorch: stock `pyro.infer.SVI`, and the same models by hand with fused Adam, eager, compiled and vmapped.

A factory returns `train(block) -> loss`: one step for each entry of a block of row numbers (steps, B), or (steps, K, B)
where it trains K replicas, and the last loss, of the full data and averaged over replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from pyro.nn import PyroModule, PyroSample
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from dgm.programs import preserved_rng

from .by_hand import VAEByHand
from .speed_cases import CLASSES, HIDDEN, LR, PIXELS, Case

Train = Callable[[Tensor], float]
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


# ---------------------------------------------------------------------------------------------- by hand: VAE


class HandVAE(VAEByHand):
    """The case's VAE."""

    def __init__(self, case: Case) -> None:
        super().__init__(PIXELS, HIDDEN, case.latent)


class HandManyVAE(HandVAE):
    """The same with K draws of z: the mean of K bounds, or the importance bound

    -sum_n log (1/K) sum_k p(x_n, z_nk) / q(z_nk | x_n).
    """

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.draws, self.importance = case.particles, case.importance

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        loc, log_scale = self.loc(h), self.log_scale(h)
        eps = torch.randn(self.draws, *loc.shape)
        z = loc + log_scale.exp() * eps
        logits = self.decoder(z)
        log_p = (x * logits - F.softplus(logits)).sum(-1)
        log_w = log_p + (0.5 * eps.square() - 0.5 * z.square() + log_scale).sum(-1)  # (K, B)
        if not self.importance:
            return -log_w.mean(0).sum()
        return -(torch.logsumexp(log_w, 0) - math.log(self.draws)).sum()


class HandFlowVAE(HandVAE):
    """The same with dgm's inverse autoregressive flow: two gated steps, masked networks of 128 hidden units."""

    def __init__(self, case: Case, hidden: int = 128) -> None:
        super().__init__(case)
        d = case.latent
        self.first = nn.ModuleList(nn.Linear(d, hidden) for _ in range(2))
        self.context = nn.ModuleList(nn.Linear(HIDDEN[-1], hidden, bias=False) for _ in range(2))
        self.last = nn.ModuleList(nn.Linear(hidden, 2 * d) for _ in range(2))
        degree = torch.arange(hidden) * d // hidden
        for t, order in enumerate((torch.arange(d) + 1, d - torch.arange(d))):
            self.register_buffer(f"in{t}", (degree[:, None] >= order).float())
            self.register_buffer(f"out{t}", (order[:, None] > degree).float().repeat(2, 1))

    def warp(self, eps: Tensor, h: Tensor) -> tuple[Tensor, Tensor | float]:
        u, log_det = eps, torch.zeros(())
        for t in range(2):
            first: Any = self.first[t]
            last: Any = self.last[t]
            inside = F.linear(u, first.weight * getattr(self, f"in{t}"), first.bias) + self.context[t](h)
            shift, gate = F.linear(inside.relu(), last.weight * getattr(self, f"out{t}"), last.bias).chunk(2, -1)
            log_gain = F.logsigmoid(gate + 1.5) + math.log1p(math.exp(-1.5))
            u, log_det = log_gain.exp() * u + shift, log_det + log_gain.sum()
        return u, log_det


# ---------------------------------------------------------------------------------------------- by hand: BNN


class HandBNN(nn.Module):
    """Mean-field BNN as one writes it in plain PyTorch: one vector of locations and one of log scales.

    `forward` is the negative ELBO scaled to the full data, for one draw of the weights.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.widths = (13, 50, 1) if case.kind == "bnn" else (PIXELS, 400, 400, CLASSES)
        self.noisy = case.kind == "bnn"  # a latent noise scale, LogNormal(-1, 1)
        self.scale = case.scale
        start = []
        for m, n in pairwise(self.widths):
            layer = nn.Linear(m, n)
            start += [layer.weight.detach().flatten(), layer.bias.detach()]
        if self.noisy:
            start.append(torch.tensor([-0.5]))
        self.sizes = [len(t) for t in start]
        self.loc = nn.Parameter(torch.cat(start))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(0.02)))

    def forward(self, x: Tensor, y: Tensor, eps: Tensor | None = None) -> Tensor:
        eps = torch.randn_like(self.loc) if eps is None else eps
        w = self.loc + self.log_scale.exp() * eps
        parts = list(torch.split(w, self.sizes))
        h = x
        for i, (m, n) in enumerate(pairwise(self.widths)):
            h = F.linear(h if i == 0 else h.relu(), parts[2 * i].view(n, m), parts[2 * i + 1])
        # constants of the prior's and the guide's densities cancel: both are standard normals of the same dimension
        divergence = -self.log_scale.sum() - 0.5 * eps.square().sum()
        if self.noisy:
            u = parts[-1]
            divergence = divergence + 0.5 * sum(p.square().sum() for p in parts[:-1]) + 0.5 * (u + 1.0).square().sum()
            misfit = (0.5 * ((y - h[:, 0]) / u.exp()).square() + u + HALF_LOG_2PI).sum()
        else:
            divergence = divergence + 0.5 * w.square().sum()
            misfit = F.cross_entropy(h, y, reduction="sum")
        return self.scale * misfit + divergence


def hand_module(case: Case) -> nn.Module:
    """The case's model and guide by hand; its `forward(*batch)` is the loss, up to N/B for a VAE."""
    with preserved_rng(0):
        if case.kind != "vae":
            return HandBNN(case)
        if case.particles > 1:
            return HandManyVAE(case)
        return HandVAE(case) if case.guide == "diagonal-normal" else HandFlowVAE(case)


def by_hand(case: Case, compiled: bool = False) -> Train:
    """Loss, backward and fused Adam; `compiled` puts `torch.compile` around the module."""
    module = hand_module(case)
    data, factor = case.data, case.scale if case.kind == "vae" else 1.0
    optimiser = torch.optim.Adam(module.parameters(), lr=LR, fused=True)
    loss_of: Any = torch.compile(module, dynamic=False) if compiled else module

    def train(block: Tensor) -> float:
        value = 0.0
        for index in block:
            optimiser.zero_grad(set_to_none=True)
            loss = loss_of(*(t[index] for t in data)) * factor
            loss.backward()
            optimiser.step()
            value = loss.item()
        return value

    return train


def by_hand_vmapped(case: Case) -> Train:
    """All replicas of the BNN by hand at once: `torch.func.vmap` of its gradient, fused Adam on stacked parameters."""
    module = hand_module(case)
    stacked = {n: p.detach().repeat(case.replicas, 1).requires_grad_() for n, p in module.named_parameters()}
    optimiser = torch.optim.Adam(stacked.values(), lr=LR, fused=True)
    x, y = case.data

    def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x, y, eps))

    gradients: Any = torch.func.vmap(torch.func.grad_and_value(loss_of))

    def train(block: Tensor) -> float:
        value = 0.0
        for index in block:
            given = {n: p.detach() for n, p in stacked.items()}
            grads, losses = gradients(given, x[index], y[index], torch.randn_like(given["loc"]))
            for name, p in stacked.items():
                p.grad = grads[name]
            optimiser.step()
            value = losses.mean().item()
        return value

    return train


# ---------------------------------------------------------------------------------------------- stock Pyro


class PyroVAE(nn.Module):
    """The VAE as Pyro's tutorial writes it, with the batch scaled to the full data."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.hand: Any = hand_module(case)
        self.latent, self.scale = case.latent, case.scale

    def model(self, x: Tensor) -> None:
        decoder = pyro.module("decoder", self.hand.decoder)
        with pyro.plate("data", len(x)), poutine.scale(scale=self.scale):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        for name in ("encoder", "loc", "log_scale"):
            pyro.module(name, getattr(self.hand, name))
        with pyro.plate("data", len(x)), poutine.scale(scale=self.scale):
            h = self.hand.encoder(x)
            pyro.sample("z", dist.Normal(self.hand.loc(h), self.hand.log_scale(h).exp()).to_event(1))


class PyroBNN(PyroModule):
    """The BNN as Pyro's tutorial writes it: `PyroSample` priors on the layers of a `PyroModule`."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        widths = (13, 50, 1) if case.kind == "bnn" else (PIXELS, 400, 400, CLASSES)
        self.noisy, self.factor = case.kind == "bnn", case.scale
        linear: Any = PyroModule[nn.Linear]
        layers = [linear(m, n) for m, n in pairwise(widths)]
        for layer, m, n in zip(layers, widths, widths[1:], strict=False):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([n, m]).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([n]).to_event(1))
        holder: Any = PyroModule[nn.ModuleList]
        self.layers = holder(layers)

    def forward(self, x: Tensor, y: Tensor) -> None:
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(h if i == 0 else h.relu())
        noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0)) if self.noisy else None
        with pyro.plate("data", len(x)), poutine.scale(scale=self.factor):
            density = dist.Categorical(logits=h) if noise is None else dist.Normal(h[..., 0], noise)
            pyro.sample("y", density, obs=y)


def stock_pyro(case: Case, validate: bool = True) -> Train:
    """`pyro.infer.SVI` and `pyro.optim.Adam` on the model as Pyro's tutorials write it; validation as Pyro ships it."""
    with preserved_rng(0):
        if case.kind == "vae":
            vae = PyroVAE(case)
            return _stock(case, vae.model, vae.guide, validate)
        bnn = PyroBNN(case)
        return _stock(case, bnn, AutoDiagonalNormal(bnn, init_scale=0.02), validate)


def stock_same_pair(case: Case) -> Train:
    """`pyro.infer.SVI` and `pyro.optim.Adam` on dgm's own model and guide."""
    return stock_on_pair(case, *case.pair())


def stock_on_pair(case: Any, model: Any, guide: Any) -> Train:
    """The same for a pair at hand; `case` has `kind`, `scale`, `loss` and `data`."""
    if case.kind == "vae":  # every site is in the data plate
        return _stock(case, poutine.scale(model, scale=case.scale), poutine.scale(guide, scale=case.scale))
    return _stock(case, _ScaledLikelihood(model, case.scale), guide)


class _ScaledLikelihood(nn.Module):
    """A model of global latents whose observations count `scale` times."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, *batch: Tensor) -> Any:
        with _ScaleObserved(self.scale):
            return self.model(*batch)


class _ScaleObserved(Messenger):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.scale


def _stock(case: Any, model: Any, guide: Any, validate: bool = True) -> Train:
    """Steps of stock SVI, in a parameter store of its own that is put in place once for a block."""
    optim: Any = pyro.optim  # its modules are made of torch's at import
    svi = pyro.infer.SVI(model, guide, optim.Adam({"lr": LR}), case.loss or Trace_ELBO())
    state: Any = {"params": {}, "constraints": {}}
    data = case.data

    def train(block: Tensor) -> float:
        value = 0.0
        with pyro.get_param_store().scope(state), pyro.validation_enabled(validate):
            for index in block:
                value = float(svi.step(*(t[index] for t in data)))
        return value

    return train

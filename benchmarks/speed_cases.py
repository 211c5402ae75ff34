"""What is timed: the cases of `python -m dgm.benchmarks speed`, their data, and their pairs as dgm has them.

Data are drawn from a process of the model's own kind, so that training neither collapses nor ends in the first steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor, nn

import dgm
from dgm.errors import OptionError
from dgm.guides import attached
from dgm.guides.encoders import mlp
from dgm.models.bnn import BNN
from dgm.models.likelihoods import Categorical
from dgm.models.vae import VAE
from dgm.programs import preserved_rng

PIXELS, HIDDEN, CLASSES = 784, (200, 200), 10
LR = 1e-3


@dataclass(frozen=True)
class Case:
    """One row of the table: a model, a guide, a batch and how many trainings at once.

    Attributes:
        name: on the command line.
        kind: "vae" (784 pixels, two hidden layers of 200 in encoder and decoder), "bnn" (13-50-1, latent noise scale)
            or "bnn-mnist" (784-400-400-10).
        batch, rows: rows of a step and of the data.
        latent: dimension of a VAE's z.
        guide: family of guides.
        particles: draws of the guide in a step; with `importance` the K of the importance bound.
        replicas: independent trainings.
        axis, value: of a scaling case, what grows and where it stands.
    """

    name: str
    kind: str
    batch: int
    rows: int
    latent: int = 50
    guide: str = "diagonal-normal"
    particles: int = 1
    importance: bool = False
    replicas: int = 1
    axis: str = ""
    value: int = 0

    @cached_property
    def data(self) -> tuple[Tensor, ...]:
        """The training data, rows first; the same in every process."""
        with preserved_rng(0):
            if self.kind == "vae":
                return images(self.rows)
            return smooth(self.rows) if self.kind == "bnn" else labelled(self.rows)

    def pair(self, seed: int = 0) -> tuple[Any, Any]:
        """dgm's model and guide, started from the seed."""
        with preserved_rng(seed):
            if self.kind == "vae":
                model: Any = VAE(PIXELS, latent=self.latent, hidden=HIDDEN)
            elif self.kind == "bnn":
                model = BNN(regression_network())
            else:
                model = BNN(classification_network(), Categorical())
            options = {"encoder": mlp(*HIDDEN)} if self.kind == "vae" else {}
            return model, attached([self.guide], **options)[self.guide](model, *(t[:1000] for t in self.data))

    @property
    def stacked(self) -> bool:
        """Whether replicas run as one computation, with a replica axis in front."""
        return self.replicas > 1 or self.axis == "replicas"

    @property
    def loss(self) -> Any:
        """The objective as Pyro knows it; None for the ELBO of one draw."""
        if self.importance:
            return RenyiELBO(alpha=0.0, num_particles=self.particles, vectorize_particles=True)
        if self.particles > 1:
            return Trace_ELBO(num_particles=self.particles, vectorize_particles=True)
        return None

    @property
    def objective(self) -> Any:
        """The same as dgm has it."""
        if self.importance:
            return dgm.ImportanceELBO(self.particles)
        return dgm.ELBO(self.particles) if self.particles > 1 else None

    @property
    def scan(self) -> int:
        """Steps in one scanned call: enough to hide the call."""
        return 200 if self.kind == "bnn" else 50

    @property
    def scale(self) -> float:
        """N / B, what a minibatch's terms count."""
        return self.rows / self.batch


def regression_network() -> nn.Sequential:
    """13-50-1, ReLU."""
    return nn.Sequential(nn.Linear(13, 50), nn.ReLU(), nn.Linear(50, 1))


def classification_network() -> nn.Sequential:
    """784-400-400-10, ReLU."""
    return nn.Sequential(
        nn.Linear(PIXELS, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, CLASSES)
    )  # fmt: skip


def images(rows: int, latent: int = 10, width: int = 100) -> tuple[Tensor, ...]:
    """Binary pixels (rows, 784) of a fixed random decoder with latents that matter.

    z ~ N(0, I_10),  h = tanh(W z / sqrt(10)),  x_i ~ Bernoulli(sigmoid(-1.5 + 6 v_i h / sqrt(100)))
    """
    z = torch.randn(rows, latent)
    h = torch.tanh(1.5 * z @ torch.randn(latent, width) / math.sqrt(latent))
    return (torch.bernoulli(torch.sigmoid(-1.5 + 6.0 * h @ torch.randn(width, PIXELS) / math.sqrt(width))),)


def smooth(rows: int, features: int = 13) -> tuple[Tensor, ...]:
    """Standardised inputs (rows, 13), and a smooth function of them plus noise, scaled to unit variance."""
    x = torch.randn(rows, features)
    directions = torch.randn(features, 3) / math.sqrt(features)
    y = torch.sin(2.0 * x @ directions).sum(-1) + x[:, 0] + 0.3 * torch.randn(rows)
    return x, (y - y.mean()) / y.std()


def labelled(rows: int) -> tuple[Tensor, ...]:
    """Binary images and the class that a fixed random network gives them, with 5 % of the labels drawn anew."""
    (x,) = images(rows)
    logits = torch.tanh((x - x.mean(0)) @ torch.randn(PIXELS, 64) / 5.0) @ torch.randn(64, CLASSES)
    y = logits.argmax(1)
    return x, torch.where(torch.rand(rows) < 0.05, torch.randint(CLASSES, (rows,)), y)


_VAE = Case("vae128", "vae", 128, 10_000)
_BNN = Case("bnn32", "bnn", 32, 455)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        replace(_VAE, name="vae20", batch=20),
        _VAE,
        replace(_VAE, name="iwae20", batch=20, particles=50, importance=True),
        _BNN,
        replace(_BNN, name="bnn100", batch=100),
        replace(_BNN, name="bnn32x20", replicas=20),
        replace(_BNN, name="bnn100x20", batch=100, replicas=20),
        Case("bnn-mnist", "bnn-mnist", 128, 10_000),
        replace(_VAE, name="vae-iaf", guide="inverse-autoregressive-flow"),
    )
}
"""The cases of the table by name."""

SCALING: dict[str, Case] = {
    case.name: case
    for case in (
        *(replace(_BNN, name=f"replicas-{k}", replicas=k, axis="replicas", value=k) for k in (1, 5, 20, 50, 200)),
        *(
            replace(_VAE, name=f"particles-{s}", batch=20, particles=s, axis="particles", value=s)
            for s in (1, 10, 100, 500)
        ),
        *(replace(_VAE, name=f"latent-{d}", latent=d, axis="latent size", value=d) for d in (2, 10, 50, 200)),
        *(
            replace(_BNN, name=f"rows-{n}", rows=n, axis="rows of data", value=n)
            for n in (455, 4550, 45_500, 455_000)
        ),
    )
}  # fmt: skip
"""The cases in which one quantity grows, by name."""


def find_case(name: str) -> Case:
    """The case of this name.

    Raises:
        OptionError: no such case.
    """
    known = CASES | SCALING
    if name not in known:
        raise OptionError(f"case {name!r}: expected one of {', '.join(known)}")
    return known[name]

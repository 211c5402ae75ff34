"""Models, guides and objectives of the density suite, from the plain settings of a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import dgm
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import mlp
from dgm.models.deep_latent_gaussian import DeepLatentGaussian
from dgm.models.hierarchical_vae import HierarchicalVAE
from dgm.models.likelihoods import Bernoulli, Normal
from dgm.models.vae import VAE, DecoderModel, network
from dgm.registry import families

Settings = Mapping[str, Any]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
TOP_HIDDEN = (100, 100)
"""Hidden layers between the two stochastic layers, in the model and in its guide."""


def model_of(settings: Settings, train: Tensor) -> DecoderModel:
    """The model of a cell for training rows `(N, pixels)`.

    settings: model, "vae", "two layers" (Burda, Grosse and Salakhutdinov, 2016) or "dlgm" (Rezende, Mohamed and
    Wierstra, 2014); latents, of the layer next to the data first; hidden; activation; likelihood; start, "torch" for
    torch's own weights, or "glorot" for Glorot's, zero biases and an output bias at the marginal of each pixel.
    """
    activation, latents = ACTIVATIONS[settings["activation"]], tuple(settings["latents"])
    likelihood = Normal("learned") if settings["likelihood"] == "normal" else Bernoulli()
    shared: Any = {"hidden": tuple(settings["hidden"]), "likelihood": likelihood, "activation": activation}
    pixels = train.shape[1]
    model: DecoderModel
    if settings["model"] == "vae":
        model = VAE(pixels, latents[0], **shared)
    elif settings["model"] == "dlgm":
        model = DeepLatentGaussian(pixels, latents, **shared)
    else:
        model = HierarchicalVAE(pixels, latents, **shared)
        below, above = latents
        model.priors = nn.ModuleList([network([above, *TOP_HIDDEN, 2 * below], activation)])
    if settings["start"] == "glorot":
        glorot(model)
        model.initialise_output_bias(train)
        start_scale(model, train)
    return model


class BottomUp(PyroModule):
    """q(z_1 | x) q(z_2 | z_1), both diagonal normals by networks; the guide of Burda, Grosse and Salakhutdinov, 2016.

    Args:
        pixels: columns of x. latents: dimensions of z_1 and z_2. hidden: widths between x and z_1.

    >>> guide = BottomUp(6, (3, 2), (8,), nn.Tanh)
    >>> guide(torch.zeros(5, 6))["z_2"].shape
    torch.Size([5, 2])
    """

    def __init__(
        self, pixels: int, latents: tuple[int, int], hidden: tuple[int, ...], activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        below, above = latents
        self.first = network([pixels, *hidden, 2 * below], activation)
        self.second = network([below, *TOP_HIDDEN, 2 * above], activation)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with pyro.plate("data", len(x)):
            z_1 = pyro.sample("z_1", _normal(self.first(x)))  # (B, below)
            z_2 = pyro.sample("z_2", _normal(self.second(z_1)))  # (B, above)
        return {"z_1": z_1, "z_2": z_2}


def _normal(output: Tensor) -> Any:
    loc, log_scale = output.chunk(2, -1)
    return dist.Normal(loc, log_scale.exp()).to_event(1)


def guide_of(settings: Settings, model: DecoderModel, train: Tensor) -> Any:
    """The guide of a cell. settings: family; the encoder mirrors the decoder."""
    activation, hidden = ACTIVATIONS[settings["activation"]], tuple(settings["hidden"])
    if settings["family"] == "bottom-up":
        below, above = settings["latents"]
        guide: Any = BottomUp(train.shape[1], (below, above), hidden, activation)
        network_ = guide
    else:
        encoder = mlp(*hidden, activation=activation)
        guide = Amortized(model, train[:1000], family=families()[settings["family"]].make, encoder=encoder)
        network_ = guide.encoder
    if settings["start"] == "glorot":
        glorot(network_)
    return guide


@torch.no_grad()
def glorot(module: nn.Module) -> None:
    """Glorot's uniform weights and zero biases in every linear layer that has a bias; mixing matrices stay as they are.

    (Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.)
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


@torch.no_grad()
def start_scale(model: DecoderModel, train: Tensor) -> None:
    """A learned noise scale begins at that of the pixels about their means: from 1, Adam takes a thousand steps."""
    scale = getattr(model.likelihood, "log_scale", None)
    if scale is not None:
        scale.fill_(float(train.std(0).square().mean().sqrt().log()))


def loss_of(settings: Settings) -> Any:
    """The objective. settings: objective, "ELBO", "IWAE" or "DReG"; samples, of each row in a step."""
    if settings["objective"] == "ELBO":
        return dgm.ELBO(settings["samples"])
    return dgm.ImportanceELBO(settings["samples"], estimator="dreg" if settings["objective"] == "DReG" else "pathwise")


def schedule_of(settings: Settings) -> Callable[[torch.optim.Optimizer], Any]:
    """The step size is multiplied by `decay` after each epoch of `milestones`."""
    return partial(
        torch.optim.lr_scheduler.MultiStepLR, milestones=list(settings["milestones"]), gamma=settings["decay"]
    )

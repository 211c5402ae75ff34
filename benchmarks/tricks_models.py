"""The four models of the suite `tricks`, with everything that a trick may change as a plain setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import dgm
from dgm.files import Dataset
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import Network, mlp
from dgm.guides.global_ import Global
from dgm.models.bnn import BNN, fan_in_prior
from dgm.models.likelihoods import Bernoulli, Normal
from dgm.models.vae import VAE

Settings = dict[str, Any]

DIGITS, FREY, YACHT, DIABETES = "digits VAE", "Frey faces VAE", "yacht BNN", "diabetes BNN"
VAES, BNNS = (DIGITS, FREY), (YACHT, DIABETES)
FILES = {DIGITS: "digits", FREY: "frey-faces", YACHT: "uci-yacht", DIABETES: "diabetes"}

PLAIN: Settings = {  # no trick at all
    "objective": "elbo", "particles": 1, "estimator": "pathwise", "kl": "sampled", "free_bits": 0.0,
    "layer_noise": "shared", "init_scale": 1.0, "warmup": 0.0, "decay": "none", "clip": 0.0, "output_bias": False,
    "batch_norm": False, "prior": "unit", "noise": "learned", "seed_shift": 0, "batch_size": 100,
}  # fmt: skip
"""warmup: share of the steps. clip: largest norm of the gradient of the loss for one row; 0 for none."""

OWN: dict[str, Settings] = {
    DIGITS: {"lr": 2e-3, "hidden": 100, "latent": 10},
    FREY: {"lr": 3e-3, "hidden": 100, "latent": 10, "batch_size": 50},
    YACHT: {"lr": 1e-2, "hidden": 50, "init_scale": 0.02},
    DIABETES: {"lr": 1e-2, "hidden": 50, "init_scale": 0.02},
}


def data_of(task: str, split: int) -> Dataset:
    """One partition of a model's data; pixels of the digits are drawn anew for each batch.

    Raises:
        DataError: the file is missing.
    """
    if task == FREY:
        return dgm.load(FILES[task], split="random", seed=split)
    return dgm.load(FILES[task], split=split, seed=split)


def maker_of(task: str, settings: Settings, columns: int) -> Callable[[], nn.Module]:
    """Makes the model for data of so many columns."""
    return partial(_vae if task in VAES else _bnn, task, settings, columns)


def _vae(task: str, settings: Settings, columns: int) -> VAE:
    likelihood = Bernoulli() if task == DIGITS else _normal(settings)
    model = VAE(columns, settings["latent"], (settings["hidden"],), likelihood)
    if settings["batch_norm"]:
        first, activation, last = model.decoder
        model.decoder = nn.Sequential(first, nn.BatchNorm1d(settings["hidden"]), activation, last)
    return model


def _bnn(task: str, settings: Settings, columns: int) -> BNN:
    network = nn.Sequential(nn.Linear(columns, settings["hidden"]), nn.ReLU(), nn.Linear(settings["hidden"], 1))
    prior: Any = fan_in_prior() if settings["prior"] == "fan-in" else 1.0
    return BNN(network, _normal(settings), prior)


def _normal(settings: Settings) -> Normal:
    return Normal(1.0 if settings["noise"] == "unit" else "learned")


def guide_of(task: str, settings: Settings) -> Callable[..., Any]:
    """`(model, *batch) -> guide`: a diagonal normal, of the codes or of the weights."""
    if task in BNNS:
        return partial(Global, init_scale=settings["init_scale"])
    encoder = partial(_normalised, settings["hidden"]) if settings["batch_norm"] else mlp(settings["hidden"])

    def make(model: VAE, x: Tensor) -> Amortized:
        if settings["output_bias"]:
            model.initialise_output_bias(x)
        return Amortized(model, x, encoder=encoder, init_scale=settings["init_scale"])

    return make


def _normalised(hidden: int, in_features: int) -> Network:
    return Network(hidden, nn.Linear(in_features, hidden), nn.BatchNorm1d(hidden), nn.ReLU())


def loss_of(settings: Settings) -> Any:
    """The objective of these settings."""
    if settings["objective"] == "importance":
        return dgm.ImportanceELBO(settings["particles"], estimator=settings["estimator"])
    groups: Any = "dimension" if settings["free_bits"] else "site"
    return dgm.ELBO(
        settings["particles"], estimator=settings["estimator"], kl=settings["kl"], free_bits=settings["free_bits"],
        groups=groups, layer_noise=settings["layer_noise"],
    )  # fmt: skip


def trained(task: str, settings: Settings, parts: Sequence[Dataset], splits: Sequence[int]) -> list[Any]:
    """A `Fit` for each split: all are trained at once, replica k on the rows of split k with the seed k.

    Starts, data order and noise depend on the seed alone, so that the same split of two settings is a pair.
    """
    columns = [part.train for part in parts]
    train = tuple(torch.cat(tensors) for tensors in zip(*columns, strict=True))
    sizes = [len(own[0]) for own in columns]
    steps = settings["steps"]
    schedule = None
    if settings["decay"] == "cosine":
        schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
    return dgm.fit(
        maker_of(task, settings, train[0].shape[1]), guide_of(task, settings), train,
        steps=steps, batch_size=settings["batch_size"], lr=settings["lr"], loss=loss_of(settings), schedule=schedule,
        kl_warmup=settings["warmup"] * steps, clip=settings["clip"] * sizes[0] or None, compile=settings["compile"],
        transform=parts[0].transform,
        replicas={
            "seed": [split + settings["seed_shift"] for split in splits],
            "rows": torch.arange(len(train[0])).split(sizes),
        },
    )  # fmt: skip


__all__ = ["BNNS", "DIABETES", "DIGITS", "FREY", "OWN", "PLAIN", "VAES", "YACHT", "data_of", "guide_of", "trained"]

"""Checks before the first step: each refusal names the site or argument, the expected, the actual and the fix."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dgm
from dgm.checks import check_all_rows
from dgm.errors import DataError, GuideError, ModelError, OptionError
from dgm.guides.amortized import Amortized
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import linear
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.models.vae import VAE
from dgm.predictive import predict
from dgm.programs import preserved_rng
from dgm.registry import models

ADAM = partial(torch.optim.Adam, lr=1e-3)
with preserved_rng(0):
    X, Y, PIXELS = torch.randn(12, 3), torch.randn(12), torch.rand(8, 4)
LABELS = torch.arange(12) % 4


def train(model: Any, guide: Any, *data: Any, **options: Any) -> Any:
    return dgm.fit(model, guide, *data, **{"steps": 2, "compile": False, **options})


def global_(model: Any, *batch: Any) -> Any:
    with preserved_rng(0):
        return Global(model, *batch, family=DiagonalNormal)


def changed(data: Tensor, value: float, *place: int) -> Tensor:
    data = data.clone()
    data[place] = value
    return data


# --- programs --------------------------------------------------------------------------------------------------------


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def other_regression(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    v = pyro.sample("v", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ v, 1.0), obs=y)
    return {"loc": x @ v, "scale": torch.ones(())}


def likelihood(make: Callable[[Tensor, Tensor], Any], observed: bool = True) -> Callable[[Tensor], None]:
    """A positive latent and a likelihood of each row."""

    def model(x: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", make(s, x), obs=x if observed else None)

    return model


normal = likelihood(lambda s, x: dist.Normal(0.0, s))
pixels = likelihood(lambda s, x: dist.Bernoulli(logits=s.expand(x.shape)).to_event(1))
unchecked = likelihood(lambda s, x: dist.Bernoulli(logits=s.expand(x.shape), validate_args=False).to_event(1))
counts = likelihood(lambda s, x: dist.Poisson(s))


def local(x: Tensor, idx: Any = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class Network(PyroModule):
    """y_n ~ Normal(f(x_n), s), with what is wrong about it as options."""

    def __init__(self, outputs: int = 1, event: int = 0, features: int = 3, **where: Any):
        super().__init__()
        self.net, self.event = nn.Linear(features, outputs, **where), event

    def forward(self, x: Tensor, y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        mean = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, s).to_event(self.event), obs=y)


class Classifier(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](3, 4)
        self.net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([4, 3]).to_event(2))

    def forward(self, x: Tensor, y: Tensor) -> None:
        logits = self.net(x)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)


class Convolution(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> None:
        h = self.net(x).mean((1, 2, 3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal((z + h)[:, None], 1.0).expand(x.shape).to_event(1), obs=x)


class Normalised(PyroModule):
    """A decoder with batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)


def evaluated(part: Any) -> Any:
    part.eval()
    return part


def frozen(part: Any) -> Any:
    part.requires_grad_(False)
    return part


def no_plate(x: Tensor, event: int = 1) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(m, 1.0).expand([len(x)]).to_event(event), obs=x)


def plate_of(count: Callable[[Tensor], int], name: str = "data", **options: Any) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate(name, count(x), **options) as rows:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x if len(rows) == len(x) else x[: len(rows)])

    return model


def prior_of(shape: int) -> Callable[[Tensor, Tensor], None]:
    """A site whose entries stand in no plate."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(shape), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    return model


def features_in_the_plate(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, torch.ones(x.shape[1])), obs=x)


def observed_outside(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def second_stream(x: Tensor, y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=x)
    with pyro.plate("labels", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def latent_outside(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scaled_by_hand(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=12 / len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def named_twice(x: Tensor) -> None:
    pyro.sample("m", dist.Normal(0.0, 1.0))
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def writes(x: Tensor) -> None:
    x -= x.mean()
    normal(x)


def column(x: Tensor, y: Tensor) -> None:
    """The observation stands outside of a plate: Pyro broadcasts it without a word."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)


def broadcast(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x @ w)[:, None], 1.0), obs=y[:, None])


def without_data(x: Tensor | None = None) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 12):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


# --- guides ----------------------------------------------------------------------------------------------------------


def guide_of(make: Callable[[Tensor], Any], name: str = "s", **options: Any) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        pyro.sample(name, make(pyro.param("loc", torch.tensor(3.0))), **options)

    return guide


def twice(x: Tensor) -> None:
    guide_of(dist.Exponential)(x)
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


def in_plate(name: str, site: str = "z") -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate(name, len(x)):
            pyro.sample(site, dist.LogNormal(loc, 1.0) if site == "s" else dist.Normal(loc, 1.0))

    return guide


def no_parameters(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def without_arguments() -> None:
    pyro.sample("s", dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def set_up_without_data() -> Any:
    guide = AutoNormal(without_data)
    with pyro.get_param_store().scope():
        guide()
    return guide


class Own(PyroModule):
    """q(s) = LogNormal(loc, 1): detached, or with a parameter that takes no part."""

    def __init__(self, detached: bool = False):
        super().__init__()
        self.loc, self.idle, self.detached = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(())), detached

    def forward(self, x: Tensor) -> None:
        pyro.sample("s", dist.LogNormal(self.loc.detach() if self.detached else self.loc, 1.0))


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A mistake, what is raised, and what its message says: site or argument, the expected, the actual, the fix."""

    name: str
    run: Callable[[], Any]
    error: type[Exception]
    told: str  # parts of the message, between " | "


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"age": range(12), **columns, "b": np.ones(12)})


def reg(x: Any = X, y: Any = Y, **options: Any) -> Any:
    return train(regression, global_(regression, X, Y), x, y, **options)


def svi(model: Any, guide: Any, *batch: Any, **options: Any) -> Any:
    return dgm.SVI(model, guide, ADAM, **options).step(*batch)


def auto(model: Any, *data: Any, **options: Any) -> Any:
    return train(model, AutoNormal(model), *data, **options)


def labels(y: Tensor) -> Any:
    with preserved_rng(0):
        model = Classifier()
    return train(model, global_(model, X, LABELS), X, y)


IMAGES = torch.zeros(6, 1, 28, 28)
GREY = changed(torch.ones(12, 4), 0.5, 11, 0)
NAN = float("nan")

DATA = [
    Case("F10 nan in x", lambda: reg(changed(X, NAN, 3, 0)), DataError, "column 0 of x | 1 NaN (row 3) | impute"),
    Case("F10 inf in x", lambda: reg(changed(X, np.inf, 3, 1)), DataError, "column 1 of x | 1 inf (row 3) | drop"),
    Case("F10 nan in y", lambda: reg(X, changed(Y, NAN, 3)), DataError, "y has | 1 NaN (row 3) | drop or impute"),
    Case(
        "pandas nan",
        lambda: reg(frame(c=[1.0, NAN] + [0.0] * 10)),
        DataError,
        "column 'c' (1) of x | 1 NaN (row 1) | drop",
    ),
    Case(
        "one word among numbers",
        lambda: reg(frame(c=pd.Series([1.0] * 7 + ["?"] + [1.0] * 4, dtype=object))),
        DataError,
        "column 'c' (1) of x | not numbers | row 7: '?' | encode it or drop it",
    ),
    Case(
        "numbers as objects",
        lambda: reg(frame(c=pd.Series([1.0] * 12, dtype=object))),
        DataError,
        "column 'c' | not numbers | object | .astype(float)",
    ),
    Case(
        "category",
        lambda: reg(frame(c=pd.Categorical(["u", "v"] * 6))),
        DataError,
        "column 'c' | not numbers | category | encode",
    ),
    Case("names of classes", lambda: reg(X, np.array(["a", "b"] * 6)), DataError, "y is | numbers | <U1 | np.unique(y"),
    Case(
        "rows in another order",
        lambda: reg(frame(c=np.ones(12)), pd.Series(range(12), index=[1, 0, *range(2, 12)])),
        DataError,
        "x and y | same rows | index 0 in x and 1 in y | y.loc[x.index]",
    ),
    Case("lengths", lambda: reg(X, Y[:-1]), DataError, "x has 12 | same data point | y has 11 rows | row n of each"),
    Case("sparse", lambda: reg(X.to_sparse()), DataError, "x is | sparse | x.to_dense()"),
    Case("F27 no rows", lambda: reg(X[:0], Y[:0]), DataError, "x is empty | (0, 3) | give one row or more"),
    Case("F27 batch > rows", lambda: reg(batch_size=13), DataError, "batch_size=13 | at most 12 | 12 rows | or None"),
    Case(
        "F27 loader without batches",
        lambda: train(
            regression, global_(regression, X, Y), DataLoader(TensorDataset(X, Y), batch_size=40, drop_last=True)
        ),
        DataError,
        "DataLoader | 0 batches (12 rows, batch_size 40) | drop_last",
    ),
    Case(
        "F27 loader whose last batch is one row",
        lambda: train(Normalised(), Joint(Normalised(), X), DataLoader(TensorDataset(torch.zeros(13, 3)), 4)),
        DataError,
        "'net.1' (BatchNorm1d) | cannot train on one | 13 rows by 4 | drop_last=True",
    ),
    Case(
        "F27 batches of one row",
        lambda: train(Normalised(), Joint(Normalised(), X), torch.zeros(13, 3), batch_size=1),
        ModelError,
        "Normalised | batches of 2 rows or more | [1, 3] | give batches of 2 rows",
    ),
    Case(
        "F15 grey pixels",
        lambda: auto(pixels, PIXELS),
        DataError,
        "'x' | {0, 1} of Bernoulli | 100 % of the observed values | binarize=",
    ),
    Case("F15 0 to 255", lambda: auto(pixels, 255 * PIXELS), DataError, "'x' | {0, 1} | float32, min | divide by 255"),
    Case(
        "F15 uint8",
        lambda: auto(pixels, (255 * PIXELS).to(torch.uint8)),
        DataError,
        "'x' | {0, 1} | max | divide by 255",
    ),
    Case(
        "F15 validate_args=False",
        lambda: auto(unchecked, PIXELS),
        DataError,
        "'x' | {0, 1} | 100 % | ContinuousBernoulli",
    ),
    Case("F15 nan", lambda: auto(pixels, changed(PIXELS, NAN, 2, 1)), DataError, "column 1 of x | row 2 | drop"),
    Case(
        "one grey pixel in the third batch of a loader",
        lambda: train(pixels, AutoNormal(pixels), DataLoader(TensorDataset(GREY), batch_size=4), epochs=1, steps=None),
        DataError,
        "'x' | {0, 1} of Bernoulli | 6.25 % | grey",
    ),
    Case(
        "edge of (0, 1)",
        lambda: auto(likelihood(lambda s, x: dist.Beta(s + 1, s + 1)), changed(changed(Y.sigmoid(), 0, 0), 1, 1)),
        DataError,
        "'x' | (0,1) | 2 observed values (16.7 %) | .clamp(1e-3",
    ),
    Case("counts", lambda: auto(counts, Y.abs()), DataError, "'x' | {0, 1, ...} of Poisson | min | round them"),
    Case("negative", lambda: auto(counts, LABELS - 3), DataError, "'x' | {0, 1, ...} | 75 % | below 0"),
    Case(
        "flags",
        lambda: auto(likelihood(lambda s, x: dist.Bernoulli(s.sigmoid())), Y > 0),
        DataError,
        "'x' | floating | int64 | .float()",
    ),
    Case("class 4 of 4", lambda: labels(LABELS + (LABELS == 3).long()), DataError, "'y' | {0, ..., 3} | 25 % | 5"),
    Case("from one", lambda: labels(LABELS + 1), DataError, "'y' | {0, ..., 3} | min 1, max 4 | subtract 1"),
    Case("class -1", lambda: labels(LABELS - 1), DataError, "'y' | {0, ..., 3} | min -1 | recode"),
    Case("half", lambda: labels(LABELS + 0.5), DataError, "'y' | of Categorical | float32 | whole numbers"),
    Case("one-hot", lambda: labels(nn.functional.one_hot(LABELS)), DataError, "'y' | (12,) | (12, 4) | .argmax(-1)"),
    Case(
        "classes for one-hot",
        lambda: auto(likelihood(lambda s, x: dist.OneHotCategorical(logits=s.expand(len(x), 4))), LABELS),
        DataError,
        "'x' | (12, 4) | (12,) | one_hot(y, 4)",
    ),
    Case("F14 column target", lambda: reg(X, Y[:, None]), DataError, "'y' | (12,) | (12, 1) | .squeeze(-1)"),
    Case(
        "F14 hidden by to_event",
        lambda: train(column, global_(column, X, Y), X, Y[:, None]),
        DataError,
        "'y' | (12,) | (12, 1) | .squeeze(-1)",
    ),
    Case(
        "F14 network of one output",
        lambda: auto(Network(), X, Y),
        DataError,
        "'y' | (12, 12) | (12,) | (N, 1) met a plate of N rows",
    ),
    Case(
        "F14 the same under to_event",
        lambda: auto(Network(event=1), X, Y),
        DataError,
        "'y' | (12, 1) | (12,) | .squeeze(-1)",
    ),
    Case(
        "F14 both are columns",
        lambda: train(broadcast, global_(broadcast, X, Y), X, Y),
        DataError,
        "'y' | (12, 12) | (12, 1) | .to_event(1)",
    ),
    Case(
        "images for a vector model",
        lambda: train(VAE(784), Joint(VAE(784), IMAGES.flatten(1)), IMAGES),
        ModelError,
        "'x' | (N, 784) | (6, 1, 28, 28) | x.flatten(1)",
    ),
    Case(
        "images for a network",
        lambda: auto(Network(features=784), IMAGES, Y[:6]),
        ModelError,
        "layer 'net' | 784 features | (6, 1, 28, 28) | x.flatten(1)",
    ),
    Case("other features", lambda: auto(Network(), X[:, :2], Y), ModelError, "'net' | 3 features | (12, 2) | model 2"),
    Case(
        "vectors for a convolution",
        lambda: auto(Convolution(), PIXELS),
        ModelError,
        "layer 'net' | images of 1 channels | (8, 4) | x.reshape(-1, 1",
    ),
]

KINDS = [
    Case(
        "F29 float64 for float32",
        lambda: svi(Network(), AutoNormal(Network()), X.double(), Y),
        ModelError,
        "x is float64 | 'net.weight' float32 | float64 | dgm.fit(dtype=torch.float64)",
    ),
    Case(
        "F29 whole numbers for a network",
        lambda: svi(Network(), AutoNormal(Network()), X.long(), Y),
        ModelError,
        "x is int64 | float32 | int64 | x.to(torch.float32)",
    ),
    Case(
        "F29 numpy for a step",
        lambda: svi(regression, global_(regression, X, Y), X.numpy(), Y.numpy()),
        ModelError,
        "x is a ndarray | give tensors | ndarray | dgm.as_tensors",
    ),
    Case(
        "F29 a float64 model that makes float32 tensors",
        lambda: train(Normalised().double(), Joint(Normalised(), X), X),
        ModelError,
        "'net.0.weight' | float64 | float32 | x.new_zeros",
    ),
    Case(
        "model on another device",
        lambda: auto(Network(device="meta"), X, Y),
        ModelError,
        "'net.weight' | one device | on meta and x on cpu | .to(device)",
    ),
    Case(
        "guide on another device",
        lambda: train(regression, global_(regression, X, Y).to("meta"), X, Y),
        GuideError,
        "'guide.family.loc.bias' | values | meta device | .to_empty(device=...)",
    ),
    Case("data without values", lambda: reg(X.to("meta")), DataError, "x is | that has some | meta | give a tensor"),
    Case("no such device", lambda: reg(device="gpu"), OptionError, "device | 'cpu' or 'cuda:0' | 'gpu' | such as"),
    Case("device meta", lambda: reg(device="meta"), OptionError, "device | it has cpu | 'meta' | it has"),
    Case("dtype", lambda: reg(dtype="float64"), OptionError, "dtype | torch dtype | 'float64' | torch.float64"),
]

PLATES = [
    Case(
        "missing to_event",
        lambda: auto(prior_of(3), X, Y),
        ModelError,
        "'w' (Normal, test_checks.py: | plates are: none | batch shape (3,) | .to_event(1)",
    ),
    Case(
        "observation in no plate",
        lambda: auto(partial(no_plate, event=0), Y),
        ModelError,
        "'x' | none | (12,) | open a pyro.plate",
    ),
    Case(
        "features in the data plate",
        lambda: auto(features_in_the_plate, X),
        ModelError,
        "site x | one value | 12 vs 3 | .to_event(1)",
    ),
    Case(
        "plate of 100, 12 rows",
        lambda: auto(likelihood_of_100, Y),
        ModelError,
        "plate 'data' | 12 rows | counts 100 | len(x)",
    ),
    Case(
        "plate of the features",
        lambda: auto(plate_of(lambda x: 3), Y),
        ModelError,
        "plate 'data' | 12 rows | counts 3 | pyro.plate(\"data\", len(x))",
    ),
    Case(
        "F27 subsample larger than the rows",
        lambda: auto(plate_of(len, subsample_size=40), Y),
        ModelError,
        "subsample | pyro.plate(name, len(x)) | 40 vs 12 | makes the batches",
    ),
    Case(
        "F13 another plate in minibatches",
        lambda: auto(plate_of(len, "rows"), Y, batch_size=4),
        ModelError,
        "plate 'data' | pyro.plate(\"data\", len(x)) | its plates: 'rows' | name its plate in sizes",
    ),
    Case(
        "F13 no plate in minibatches",
        lambda: auto(no_plate, Y, batch_size=4),
        ModelError,
        "'data' | pyro.plate | its plates: none | around the rows",
    ),
    Case(
        "F13 observed outside of the plate",
        lambda: train(observed_outside, Joint(observed_outside, Y), Y, batch_size=4),
        ModelError,
        "'x' | plates 'data' | (4,) | pyro.plate(\"data\", len(x))",
    ),
    Case(
        "F13 a second stream",
        lambda: auto(second_stream, X, Y, batch_size=4),
        ModelError,
        "'y' | plates 'data' | (4,) | inside",
    ),
    Case(
        "F13 a latent of each row outside of the plate",
        lambda: train(latent_outside, global_(latent_outside, Y[:4]), Y, batch_size=4),
        ModelError,
        "'z' | plates 'data' | (4,) | inside",
    ),
    Case(
        "scaled twice",
        lambda: auto(scaled_by_hand, Y, batch_size=4),
        ModelError,
        "'x' | N/B of the plate 'data' | scaled by 3 | leave poutine.scale out",
    ),
    Case("one name", lambda: auto(named_twice, Y), ModelError, "'m' | Multiple sample sites | line"),
    Case("writes to its data", lambda: auto(writes, Y), ModelError, "argument x | a new tensor | writes | x = x - 1"),
    Case(
        "F16 forgotten obs",
        lambda: auto(likelihood(lambda s, x: dist.Normal(0.0, s), observed=False), Y),
        ModelError,
        "model | obs=x | observes nothing | give the data to a site",
    ),
    Case("arguments", lambda: auto(normal, X, Y), ModelError, "model | all arrays | 2 were given | in their order"),
    Case("no model", lambda: train(3, AutoNormal(normal), Y), ModelError, "model | Pyro program | int | function"),
    Case(
        "F19 model in evaluation mode",
        lambda: train(evaluated(Normalised()), Joint(Normalised(), X), X),
        ModelError,
        "'net.1' (BatchNorm1d) | in training | evaluation mode | call .train()",
    ),
]


def likelihood_of_100(x: Tensor) -> None:
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 100):
        pyro.sample("x", dist.Normal(0.0, s), obs=x)


GUIDES = [
    Case(
        "F16 misspelt",
        lambda: train(normal, guide_of(dist.Exponential, "ss"), Y),
        GuideError,
        "'s' | latent 's' | does not sample | did you mean 'ss'",
    ),
    Case(
        "F17 set up without data",
        lambda: train(without_data, set_up_without_data(), Y),
        GuideError,
        "'x' | is observed | samples 'x' | make it again with a batch",
    ),
    Case(
        "F18 guide of another model",
        lambda: predict(other_regression, global_(regression, X, Y), X, Y, num_samples=10),
        GuideError,
        "'v' | known:  | drawn from the prior | the model that the guide was trained with",
    ),
    Case(
        "guide of another model",
        lambda: train(other_regression, global_(regression, X, Y), X, Y),
        GuideError,
        "'v' | latent | does not sample | known: w",
    ),
    Case(
        "guide of a wider model", lambda: reg(X[:, :2]), GuideError, "'w' | (2,) | (3,) | make the guide for this model"
    ),
    Case(
        "support",
        lambda: train(normal, guide_of(lambda loc: dist.Normal(loc, 0.1)), Y),
        GuideError,
        "'s' | positive | support real | LogNormal",
    ),
    Case(
        "values outside of the support",
        lambda: train(normal, guide_of(lambda loc: dist.Normal(-loc, 0.1)), Y),
        GuideError,
        "'s' | positive | real | biject_to",
    ),
    Case(
        "point outside of the support",
        lambda: train(normal, guide_of(lambda loc: dist.Delta(-loc)), Y),
        GuideError,
        "'s' | positive | outside | biject_to",
    ),
    Case(
        "learnt bounds",
        lambda: train(normal, guide_of(lambda loc: dist.Uniform(loc, loc + torch.ones(()))), Y),
        GuideError,
        "'s' | positive | interval with bounds of its own | use a distribution with that support",
    ),
    Case(
        "observes a latent",
        lambda: train(normal, guide_of(dist.Exponential, obs=torch.tensor(1.0)), Y),
        GuideError,
        "'s' | a guide samples | observes | leave obs out",
    ),
    Case("one name twice", lambda: train(normal, twice, Y), GuideError, "'s' | Multiple sample sites | line"),
    Case(
        "global latent in a plate",
        lambda: train(normal, in_plate("data", "s"), Y),
        GuideError,
        "'s' | the model () | (12,) | outside of the plate 'data'",
    ),
    Case(
        "another plate",
        lambda: train(local, in_plate("rows"), Y),
        GuideError,
        "'z' | plate 'data' | outside that plate | pyro.plate(\"data\", len(x))",
    ),
    Case(
        "arguments of the guide",
        lambda: train(normal, without_arguments, Y),
        GuideError,
        "without_arguments | all arrays | 1 was given | in their order",
    ),
    Case(
        "a maker instead of a guide",
        lambda: train(normal, partial(Global, family=DiagonalNormal), Y),
        GuideError,
        "guide | guide(model, *batch) | partial of the class Global | call it",
    ),
    Case("no guide", lambda: train(normal, 3, Y), GuideError, "guide | Pyro program | int | a function"),
    Case(
        "F12 rows of the first batch, equal batches",
        lambda: train(local, AutoNormal(local), Y, batch_size=6),
        GuideError,
        "'z' | 12 | AutoNormal holds parameters for 6 rows | Amortized or Free",
    ),
    Case(
        "F12 a smaller last batch",
        lambda: train(local, AutoNormal(local), Y, batch_size=8),
        GuideError,
        "'z' is one for each row | 12 | AutoNormal holds parameters for 8 rows | Amortized or Free",
    ),
    Case(
        "F11 rows that the caller chose",
        lambda: auto(chosen_rows([]), Y, torch.arange(12), batch_size=4),
        GuideError,
        "'z' | 12 | 4 rows | Amortized or Free",
    ),
    Case(
        "no parameters",
        lambda: train(local, no_parameters, Y),
        GuideError,
        "guide no_parameters | train | 0 parameters | nothing to train",
    ),
    Case(
        "all parameters frozen",
        lambda: train(regression, frozen(global_(regression, X, Y)), X, Y),
        GuideError,
        "guide Global | train | 0 parameters | nothing to train",
    ),
    Case(
        "detached parameters",
        lambda: train(normal, Own(detached=True), Y),
        GuideError,
        "Own | takes part in the loss | none of the 2 parameters | .detach()",
    ),
    Case(
        "F2 an optimiser made before the guide's parameters",
        lambda: train(regression, global_(regression, X, Y), X, Y, optim=ADAM([nn.Parameter(torch.zeros(2))])),
        GuideError,
        "'guide.family.loc.bias' | never be trained | does not hold | give a factory",
    ),
]


MORE = [
    Case(
        "held-out class",
        lambda: train(Classifier(), global_(Classifier(), X, LABELS), X, LABELS, validation=(X, LABELS + 1)),
        DataError,
        "held-out rows: site 'y' | {0, ..., 3} | min 1, max 4 | subtract 1",
    ),
    Case(
        "held-out nan",
        lambda: reg(validation=(changed(X, NAN, 3, 0), Y)),
        DataError,
        "column 0 of x of validation | 1 NaN (row 3) | drop or impute",
    ),
    Case(
        "F13 rows of more data than was told",
        lambda: dgm.SVI(normal, AutoNormal(normal), ADAM).step(Y, rows=torch.arange(12) + 100),
        OptionError,
        "plate 'data' | need the scale N/B | row 111 | sizes={'data': number of all rows}",
    ),
    Case("the model as its guide", lambda: train(normal, normal, Y), GuideError, "'x' | samples | observes | another"),
    Case(
        "a plate opened twice",
        lambda: auto(opened_twice, Y),
        ModelError,
        "'data' | a name of its own | Multiple | rows = pyro.plate",
    ),
]


def opened_twice(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(m, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def chosen_rows(seen: list[list[int]]) -> Callable[..., None]:
    """A plate whose rows are chosen by the caller; `seen` learns which it used."""

    def model(x: Tensor, rows: Tensor) -> None:
        with pyro.plate("data", 12, subsample=rows) as used:
            seen.append(used.tolist())
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


@pytest.mark.parametrize("case", [*DATA, *KINDS, *PLATES, *GUIDES, *MORE], ids=lambda case: case.name)
def test_refused_before_the_first_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(dgm.SVI, "_update", lambda self, *rest: steps.append(1) or True)
    with pytest.raises(case.error) as caught:
        case.run()
    message = str(caught.value)
    for part in case.told.split(" | "):
        assert part in message, f"{part!r} is missing in: {message}"
    assert "\n" not in message and "Trace Shapes" not in message and len(message) < 700, message
    assert len(steps) <= 2 if "loader" in case.name else not steps  # a loader's third batch comes when it comes


def test_every_message_has_its_four_parts() -> None:
    for case in [*DATA, *KINDS, *PLATES, *GUIDES, *MORE]:
        assert len(case.told.split(" | ")) >= 3, case.name


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lr": float("inf")}, "lr is inf, expected a positive number such as 1e-3"),
    ({"lr": "0.1"}, "lr is '0.1', expected a positive number"),
    ({"lr": True}, "lr is True, expected"),
    ({"optim": partial(torch.optim.Adam, lr=float("inf"))}, "lr is inf, expected a number"),
    ({"epochs": 2.5, "steps": None}, "epochs is 2.5, expected a positive whole number"),
    ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
    ({"batch_size": True}, "batch_size must be a whole number"),
    ({"clip": "1"}, "clip is '1', expected a positive gradient norm"),
    ({"clip": True}, "clip is True, expected"),
    ({"validation": True}, "validation is True, expected the share of the rows"),
    ({"validation": 1}, "validation is 1, expected the share of the rows"),
    ({"validation": 1.5}, "validation is 1.5, expected the share .* between 0 and 1"),
    ({"validation": "x.npy"}, "validation is 'x.npy', expected the share"),
    ({"patience": 2.5, "validation": 0.5}, "patience is 2.5, expected a number of validations >= 2"),
    ({"patience": True, "validation": 0.5}, "patience is True, expected"),
    ({"validate_every": 1.5, "validation": 0.5}, "validate_every is 1.5, expected a number of epochs >= 1"),
    ({"validate_every": "a", "validation": 0.5}, "validate_every is 'a', expected"),
    ({"sizes": {"data": True}}, r"sizes\['data'\] is True, expected the number of rows"),
    ({"sizes": [12]}, r"sizes is \[12\], expected \{plate name: rows"),
    ({"kl_warmup": "a"}, "kl_warmup is 'a', expected a number >= 0"),
    ({"kl_weight": float("nan")}, "kl_weight is nan, expected a number >= 0"),
    ({"loss": Trace_ELBO}, r"loss is the class Trace_ELBO, .* write Trace_ELBO\(\)"),
    ({"loss": "elbo"}, "loss is 'elbo', expected a Pyro ELBO"),
    ({"loss": Trace_ELBO(num_particles=0)}, "num_particles of Trace_ELBO is 0, expected a whole number, at least 1"),
    ({"seed": -1}, "seed is -1, expected a whole number from 0"),
    ({"seed": True}, "seed is True, expected"),
    ({"seed": 2**64}, "seed is 18446744073709551616, expected"),
    ({"schedule": 3}, "schedule is 3, expected a function such as"),
    ({"transform": 3}, "transform is 3, expected a function such as"),
    ({"transform": lambda batch, generator: None}, "transform makes a NoneType of 12 rows, expected"),
    ({"transform": lambda batch, generator: (batch[0][:2], batch[1])}, r"transform makes arrays of \[2, 12\] rows"),
    ({"device": 3.5}, "device is 3.5, expected one such as 'cpu'"),
    ({"dtype": torch.int64}, "dtype is torch.int64, expected a floating one"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda o: re.sub(" at 0x.*", "", str(o))[:40])
def test_options_out_of_their_domain(options: dict[str, Any], message: str) -> None:
    """F26, F28: refused before the first step, with the option, its value and what is expected."""
    with pytest.raises(OptionError, match=message):
        reg(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_here() -> None:
    with pytest.raises(OptionError, match="device is 'cuda', which this machine does not have"):
        reg(device="cuda")


@pytest.mark.parametrize("seed", [3, np.int64(3), np.uint8(3), 2**32, 2**63 - 1])
def test_seeds_of_any_whole_type(seed: Any) -> None:
    assert reg(seed=seed).steps == 2


# --- what is right stays quiet ---------------------------------------------------------------------------------------


def test_rows_that_the_caller_chooses_are_the_rows_of_the_plate() -> None:
    """F11: the guide takes the model's subsample, at every step."""
    seen: list[list[int]] = []
    model = chosen_rows(seen)
    rows = torch.arange(12)
    with preserved_rng(0):
        guide = Amortized(model, Y, rows, family=DiagonalNormal, encoder=linear(), inputs=["x"])
    guide_rows: list[list[int]] = []
    result = train(
        model, guide, Y, rows, steps=6, batch_size=4, transform=lambda b, g: (guide_rows.append(b[1].tolist()), b)[1]
    )
    assert result.steps == 6 and len(guide_rows) >= 6
    assert seen[-6:] == guide_rows[-6:] and sorted(row for part in seen[-3:] for row in part) == list(range(12))


def quiet(caplog: pytest.LogCaptureFixture, run: Callable[[], Any]) -> Any:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "dgm"):
        result = run()
    assert not caplog.records, caplog.text
    return result


def scaled(x: Tensor) -> None:
    """Weights of the rows that are not N/B."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=0.5):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def pseudo_observation(x: Tensor) -> None:
    """An observation of four numbers that are not those of the batch's four rows, and a factor: global terms."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.sample("known", dist.Normal(m, 1.0).expand([4]).to_event(1), obs=torch.zeros(4))
    pyro.factor("penalty", -(m**2))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def frozen_normalisation() -> Any:
    model = Normalised()
    model.net[1].eval()
    return train(model, Joint(model, X), X)


RIGHT: dict[str, Callable[[], Any]] = {
    "labels as floats": lambda: labels(LABELS.float()),
    "flags as floats": lambda: auto(likelihood(lambda s, x: dist.Bernoulli(s.sigmoid())), (Y > 0).float()),
    "counts as whole numbers": lambda: auto(counts, LABELS),
    "counts as floats": lambda: auto(counts, LABELS.float()),
    "float64 arrays for a float32 model": lambda: reg(X.double().numpy(), Y.double().numpy()),
    "float64 all over": lambda: auto(Network(event=1).double(), X.double(), Y.double()[:, None]),
    "frames whose index was never the same": lambda: reg(
        frame(c=np.ones(12)), pd.Series(range(12), index=range(40, 52))
    ),
    "frames with one index": lambda: reg(frame(c=np.ones(12)), pd.Series(range(12))),
    "all rows without a plate": lambda: auto(no_plate, Y),
    "all rows, the observation outside of the plate": lambda: train(observed_outside, Joint(observed_outside, Y), Y),
    "weights of rows": lambda: auto(scaled, Y, batch_size=4),
    "global terms as long as a batch": lambda: auto(pseudo_observation, Y, batch_size=4),
    "a plate that draws its rows": lambda: auto(plate_of(len, subsample_size=4), Y),
    "one row": lambda: reg(X[:1], Y[:1]),
    "one frozen layer": frozen_normalisation,
    "evaluation mode where it changes nothing": lambda: train(regression, evaluated(global_(regression, X, Y)), X, Y),
    "a loader": lambda: train(regression, global_(regression, X, Y), DataLoader(TensorDataset(X, Y), 5)),
    "a transform that gives a list": lambda: reg(transform=lambda batch, generator: list(batch)),
    "dropout": lambda: train(Normalised(), Joint(Normalised(), X), X),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_trained_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert quiet(caplog, RIGHT[name]).steps == 2


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("half", [False, True], ids=["all rows", "half of the rows"])
def test_the_zoo_is_prepared_without_a_word(name: str, half: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = models()[name].module.example()
    rows = len(batch[0])
    with preserved_rng(0):
        guide = Joint(model, *batch)
    part = tuple(item[: max(2, rows // 2)] for item in batch) if half else batch

    def prepare() -> int:
        sizes = {"data": rows} if "data" in dgm.latents(model, *batch).plates else {}
        check_all_rows(model, batch, {"data"}, whole=not half)
        dgm.SVI(model, guide, ADAM, sizes=sizes).prepare(*part, rows=torch.arange(len(part[0])))
        return rows

    assert quiet(caplog, prepare) == rows


# --- what is said in the log -----------------------------------------------------------------------------------------


def noisy(x: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m + torch.randn(len(x)), 1.0), obs=x)


def test_draws_outside_of_sites_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dgm"):
        auto(noisy, Y)
        auto(noisy, Y)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    for part in ("noisy draws random numbers outside of its sites", "'x'", "pyro.sample"):
        assert part in said[0]


def test_parameters_without_a_part_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dgm"):
        train(normal, Own(), Y)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 2 parameters take no part in the loss and will not be trained: 'guide.idle'"
    ]


# --- what a check leaves behind --------------------------------------------------------------------------------------


def test_data_that_a_program_wrote_to_are_given_back() -> None:
    y = Y.clone()
    with pytest.raises(ModelError, match="writes to its argument x"):
        auto(writes, y)
    assert torch.equal(y, Y)

    def guide(x: Tensor) -> None:
        x[0] = 0.0
        guide_of(dist.Exponential)(x)

    with pytest.raises(GuideError, match="guide writes to its argument x"):
        train(normal, guide, y)
    assert torch.equal(y, Y)


def test_evaluation_leaves_batch_statistics_and_modes_as_they_were() -> None:
    """F19."""
    with preserved_rng(0):
        model = Normalised()
        guide = Joint(model, X)
    train(model, guide, X)
    model.net[2].eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    modes = [part.training for part in model.modules()]
    first, second = (dgm.log_weights(model, guide, X, num_samples=3, seed=1) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert [part.training for part in model.modules()] == modes
    train(model, guide, X)
    assert not torch.equal(model.net[1].running_mean, before["net.1.running_mean"])  # training moves them


def test_a_second_model_in_the_process_knows_nothing_of_the_first() -> None:
    """F1, section 3: sites of one name and other shapes."""
    for features in (3, 2):
        assert auto(regression, X[:, :features], Y).steps == 2


def test_the_line_of_a_site_is_that_of_the_program() -> None:
    line = prior_of(3).__code__.co_firstlineno + 1
    with pytest.raises(ModelError, match=rf"'w' \(Normal, test_checks.py:{line}\)"):
        auto(prior_of(3), X, Y)

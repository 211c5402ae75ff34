"""New data from a trained pair: draws of what the model observes, and where they are written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

from .errors import GuideError, OptionError
from .files import Dataset
from .metrics import CategoricalPrediction
from .pair import Pair
from .predictive import predict
from .programs import Program, StartValues, evaluating, preserved_rng
from .sites import latents
from .store import write_whole


def draws(model: Program, guide: Program, *batch: Any, n: int = 16, seed: int = 0) -> dict[str, Tensor]:
    """n runs of the model with its global latents from the guide, all else from the model itself.

    w ~ q(w),  z ~ p(z | w),  x ~ p(x | z, w): the posterior predictive of rows that were never seen.

    Args:
        model, guide: the trained pair.
        batch: says how many rows a run has, and holds the inputs of a supervised model; what it observes is not used.
        n: number of runs, at least 1.
        seed: of the draws; the random stream outside is left as it was.

    Returns:
        `(n, rows, ...)` for each observed site, by name.

    Raises:
        OptionError: n < 1. GuideError: the guide does not serve a global latent.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    >>> def guide(x):
    ...     pyro.sample("m", dist.Normal(2.0, 0.1))
    >>> draws(model, guide, torch.zeros(3), n=5)["x"].shape
    torch.Size([5, 3])
    """
    if n < 1:
        raise OptionError(f"n is {n}, expected at least 1")
    found = latents(model, *batch)
    wanted = [site.name for site in found.global_]
    pair = Pair(model, guide)
    out: dict[str, list[Any]] = {name: [] for name in found.observed}
    with preserved_rng(seed), evaluating(model, guide), pair.running():
        for _ in range(n):
            values: dict[str, Any] = {}
            if wanted:
                trace = poutine.trace(pair.run_guide).get_trace(*batch)
                missing = [name for name in wanted if name not in trace.nodes]
                if missing:
                    raise GuideError(f"the guide does not sample the latent {missing[0]!r}")
                values = {name: trace.nodes[name]["value"] for name in wanted}
            with StartValues(values):
                trace = poutine.trace(poutine.uncondition(pair.run_model)).get_trace(*batch)
            for name, kept in out.items():
                kept.append(trace.nodes[name]["value"])
    stacked = {name: torch.stack(kept) for name, kept in out.items()}
    return {name: value for name, value in stacked.items() if value.numel()}  # a factor has no value


def write_draws(
    model: Any, guide: Program, data: Dataset, path: Path | None, folder: Path, *, n: int, seed: int, mean: bool
) -> Path:
    """Write n draws: a PNG of images, a CSV of rows, or for a supervised model a CSV of its test part.

    Args:
        path: where to; None for `samples.png` or `samples.csv` in the folder.
        mean: for images, E[x | z] of n draws of z, the usual picture; else x itself.

    Raises:
        OptionError: n < 1, or a path that cannot be written to.
    """
    if n < 1:
        raise OptionError(f"n is {n}, expected at least 1")
    if len(data.train) > 1:
        frame = predictions(model, guide, data, n=n, seed=seed)
        return _write(path or folder / "samples.csv", lambda part: frame.to_csv(part, index=False))
    values = _unsupervised(model, guide, data, n, seed, mean)
    shape, first = data.image_shape, next(iter(values.values()))
    png = path.suffix.lower() == ".png" if path is not None else None
    if shape is not None and png is not False and len(values) == 1 and first[0].numel() == math.prod(shape):
        figure = picture(first.reshape(n, *shape))
        return _write(path or folder / "samples.png", lambda part: figure.savefig(part, format="png", dpi=150))
    if png:
        raise OptionError(f"{data.name!r} holds no images: write its draws to a .csv")
    columns = {}
    for name, value in values.items():
        flat = value.reshape(n, -1)
        columns.update({f"{name}_{i}" if flat.shape[1] > 1 else name: flat[:, i].numpy() for i in range(flat.shape[1])})
    return _write(path or folder / "samples.csv", lambda part: pd.DataFrame(columns).to_csv(part, index=False))


def _unsupervised(model: Any, guide: Program, data: Dataset, n: int, seed: int, mean: bool) -> dict[str, Tensor]:
    if callable(getattr(model, "sample", None)) and not latents(model, *data.test).global_:
        generator = torch.Generator().manual_seed(seed)
        with evaluating(model):
            return {"x": model.sample(n, generator, **({"mean": True} if mean and data.image_shape else {}))}
    one = tuple(t[:1] for t in data.test)  # one row in a run: each draw has global latents of its own
    return {name: value[:, 0] for name, value in draws(model, guide, *one, n=n, seed=seed).items()}


def predictions(model: Program, guide: Program, data: Dataset, *, n: int, seed: int) -> pd.DataFrame:
    """The test part with its posterior predictive: y, its mean and sd (or class probabilities), and n draws.

    A regression stands on the original scale of y.
    """
    columns: dict[str, Any] = {"y": _original(data.test[-1], data)}
    with preserved_rng(seed):
        prediction = predict(model, guide, *data.test, num_samples=1000)
    if isinstance(prediction, CategoricalPrediction):
        columns.update({f"p_{k}": p.numpy() for k, p in enumerate(prediction.probs.T)})
    elif prediction is not None:
        variance = prediction.loc.var(0, correction=0) + prediction.scale.square().mean(0)
        columns.update(mean=_original(prediction.loc.mean(0), data), sd=variance.sqrt().numpy() * data.y_std)
    values = draws(model, guide, *data.test, n=n, seed=seed)
    for i, row in enumerate(next(iter(values.values()))):
        columns[f"draw_{i + 1}"] = _original(row, data)
    return pd.DataFrame(columns)


def _original(y: Tensor, data: Dataset) -> Any:
    return y.numpy() if data.kind != "regression" else (y * data.y_std + data.y_mean).numpy()


def picture(images: Tensor) -> Figure:
    """Images `(n, height, width)` side by side, dark on light.

    >>> len(picture(torch.zeros(3, 8, 8)).axes)
    3
    """
    across = math.ceil(math.sqrt(len(images)))
    down = math.ceil(len(images) / across)
    height, width = images.shape[1:]
    figure = Figure(figsize=(0.8 * across, 0.8 * down * height / width), layout="constrained", facecolor="white")
    for i, image in enumerate(images):
        axes = figure.add_subplot(down, across, i + 1)
        axes.imshow(image.numpy(), cmap="gray_r", vmin=0.0, vmax=1.0, interpolation="nearest")
        axes.set_axis_off()
    return figure


def _write(path: Path, write: Any) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_whole(path, write)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror or error}; give another file by --out") from error


__all__ = ["draws", "picture", "predictions", "write_draws"]

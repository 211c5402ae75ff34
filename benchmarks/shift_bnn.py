"""The network of the shift suite under many guides: training, and what each says of held-out, shifted, foreign images.

One set of weights drawn from a guide looks at all images, so that what changes between them is the image alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import dgm
from dgm.bench_cells import Cell
from dgm.guides.dropout import Dropout
from dgm.guides.ensemble import Ensemble
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.laplace import Laplace
from dgm.guides.last_layer import LastLayer
from dgm.guides.low_rank_normal import LowRankNormal
from dgm.guides.matrix_normal import MatrixNormal
from dgm.guides.multiplicative_flow import MultiplicativeFlow
from dgm.guides.per_layer import PerLayer
from dgm.guides.rank_one import RankOne
from dgm.guides.swag import SWAG
from dgm.metrics import CategoricalPrediction
from dgm.models.bnn import BNN, fan_in_prior
from dgm.models.likelihoods import Categorical
from dgm.predictive import predict
from dgm.programs import preserved_rng
from dgm.registry import families
from dgm.uncertainty import decompose, detection, ood

from .shift_images import SEVERITIES, STEPS, corrupted, foreign, foreign_of, halved, held_out, training

NAMED = {"diagonal normal": "diagonal-normal", "radial normal": "radial-normal"}
OTHERS: dict[str, Callable[..., Any]] = {
    "low-rank normal": partial(Global, family=partial(LowRankNormal, rank=5)),
    "matrix normal per layer": partial(PerLayer, family=MatrixNormal),
    "last layer, full normal": partial(LastLayer, family=FullNormal),
    "rank-one": RankOne,
    "multiplicative flow": MultiplicativeFlow,
    "dropout": partial(Dropout, rate=0.2),
    "ensemble of 5 points": partial(Ensemble, members=5),
    "SWAG": partial(SWAG, rank=10, collect=20, every=50),
    "Laplace, Kronecker": partial(Laplace, structure="kronecker"),
}
GUIDES = ("point", *NAMED, *OTHERS)
PLACES = ("other", "drawings", "noise")
"""Foreign images in columns: the other data set, OMNIGLOT, noise."""
SMOKE = ("point", "diagonal normal")


def classifier(inputs: int, hidden: Sequence[int], prior: float) -> BNN:
    """ReLU layers, ten classes; weights N(0, prior^2 / inputs), biases N(0, prior^2) a priori."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return BNN(nn.Sequential(*layers, nn.Linear(widths[-1], 10)), Categorical(), fan_in_prior(prior))


def guide_of(name: str) -> Callable[..., Any]:
    """`(model, *batch) -> guide`."""
    return OTHERS[name] if name in OTHERS else partial(Global, family=families()[NAMED.get(name, name)].make)


def run_task(cells: Sequence[Cell]) -> Iterator[Any]:
    """A row for each seed of one guide on one task; all are trained at once, each on rows of its own."""
    first, settings = cells[0], cells[0].settings
    x, y = training(first.task)
    x = halved(x) if settings["halved"] else x
    own = [(torch.arange(settings["rows"]) + settings["rows"] * cell.repeat) % len(x) for cell in cells]
    steps = settings["steps"]
    fits = dgm.fit(
        partial(classifier, x.shape[1], settings["hidden"], settings["prior"]), guide_of(first.guide), x, y,
        steps=steps, batch_size=settings["batch_size"], lr=settings["lr"], compile=settings["compile"],
        replicas={"seed": [cell.repeat for cell in cells], "rows": own},
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )  # fmt: skip
    shown = exhibits(first.task, settings)
    for fit, cell, rows in zip(fits, cells, own, strict=True):
        if fit.error is not None:
            yield RuntimeError(fit.error)
            continue
        floor = nearest_mean(x[rows], y[rows], *shown["clean"])
        yield {**row_of(fit, shown, cell), "nearest_mean": floor, "seconds": fit.seconds}


Shown = dict[str, tuple[Tensor, Tensor]]
"""Images and labels by name."""


def exhibits(task: str, settings: Any) -> Shown:
    """What is judged: "clean", corrupted ones as "rotation 1", and foreign ones, whose labels mean nothing.

    "rotation 0" and so on do not stand there: they are the first `shifted` of the clean ones.
    """
    images, labels = held_out(task, settings["test"])
    few = settings["shifted"]
    found = {"clean": (images, labels)}
    for kind in STEPS:
        for severity in SEVERITIES:
            found[f"{kind} {severity}"] = corrupted(images[:few], kind, severity), labels[:few]
    for name in foreign_of(task):
        others = foreign(name, settings["foreign"])
        found[name] = others, torch.zeros(len(others), dtype=torch.long)
    return {name: (halved(x), y) for name, (x, y) in found.items()} if settings["halved"] else found


def judged(fit: Any, shown: Shown, draws: int, seed: int) -> dict[str, CategoricalPrediction]:
    """Predictions for each name, all by the same draws of the weights."""
    x, y = (torch.cat(parts) for parts in zip(*shown.values(), strict=True))
    with preserved_rng(seed):
        whole = predict(fit.model, fit.guide, x, y, num_samples=draws)
    if not isinstance(whole, CategoricalPrediction):
        raise TypeError("the network is no classifier")
    sizes = [len(labels) for _, labels in shown.values()]
    parts = zip(shown, whole.logits.split(sizes, 1), y.split(sizes), strict=True)
    return {name: CategoricalPrediction(logits, labels) for name, logits, labels in parts}


def scores(prediction: CategoricalPrediction) -> dict[str, float]:
    """What is followed as the shift grows."""
    found = {name: float(prediction.scores()[name].mean()) for name in ("accuracy", "log_likelihood", "entropy")}
    return {**found, "calibration_error": prediction.expected_calibration_error()}


def row_of(fit: Any, shown: Shown, cell: Cell) -> dict[str, Any]:
    """Scores of clean images, of each corruption at each severity, and how well foreign images are told."""
    start = time.perf_counter()
    seen = judged(fit, shown, cell.settings["draws"], cell.repeat)
    took = time.perf_counter() - start
    clean, few = seen["clean"], cell.settings["shifted"]
    row: dict[str, Any] = {**scores(clean), "brier": clean.brier(), "per_datum": clean.log_likelihoods().float()}
    row["single_log_likelihood"] = float(
        clean.logits.gather(2, clean.y.expand(len(clean.logits), -1)[..., None]).mean()
    )
    row["calibration_error_adaptive"] = clean.expected_calibration_error(kind="equal-mass")
    row["calibration_chance"] = clean.reliability().chance
    row["epistemic"] = float(decompose(clean)["epistemic"].mean())
    same = CategoricalPrediction(clean.logits[:, :few], clean.y[:few])
    row |= {f"{name}_shift_0": value for name, value in scores(same).items()}
    for kind in STEPS:
        for severity in SEVERITIES:
            found = scores(seen[f"{kind} {severity}"])
            row |= {f"{name}_{kind}_{severity}": value for name, value in found.items()}
    for name in ("accuracy", "log_likelihood", "calibration_error"):
        values = [row[f"{name}_{kind}_{severity}"] for kind in STEPS for severity in SEVERITIES]
        row[f"{name}_shifted"] = sum(values) / len(values)
    row |= detections(cell.task, seen)
    weights = sum(p.numel() for p in fit.guide.parameters())
    return {**row, "parameters": weights, "predict_seconds": took}


def detections(task: str, seen: dict[str, CategoricalPrediction]) -> dict[str, float]:
    """How well a score tells foreign images from held-out ones, and, as a check, one half of these from the other."""
    clean, row = seen["clean"], {}
    for place, name in zip(PLACES, foreign_of(task), strict=True):
        parts = ood(clean, seen[name])
        confidence = detection(-clean.probs.max(-1).values, -seen[name].probs.max(-1).values)
        row[f"auroc_entropy_{place}"] = parts["predictive_entropy"].auroc
        row[f"auroc_epistemic_{place}"] = parts["mutual_information"].auroc
        row[f"auroc_confidence_{place}"] = confidence.auroc
        row[f"fpr95_{place}"] = parts["predictive_entropy"].fpr95
    for score in ("entropy", "epistemic", "confidence"):
        row[f"auroc_{score}"] = sum(row[f"auroc_{score}_{place}"] for place in PLACES) / len(PLACES)
    row["fpr95"] = sum(row[f"fpr95_{place}"] for place in PLACES) / len(PLACES)
    uncertainty = clean.predictive_entropy()
    halves = detection(uncertainty[::2], uncertainty[1::2])
    return {**row, "auroc_halves": halves.auroc, "auroc_halves_se": halves.auroc_se}


def nearest_mean(x: Tensor, y: Tensor, test: Tensor, labels: Tensor) -> float:
    """Accuracy of taking the class whose mean training image is nearest: what every network should beat."""
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    return float((torch.cdist(test, means).argmin(1) == labels).double().mean())

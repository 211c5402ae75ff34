"""The cells of the density suite: methods by name, protocols as plain settings, and what each budget asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dgm.bench_cells import Cell

FAMILIES = ("full-normal", "inverse-autoregressive-flow", "diagonal-normal")
"""The long ones first."""

PYTHAE: dict[str, Any] = {
    "model": "vae", "latents": [40], "hidden": [400], "activation": "relu", "likelihood": "bernoulli",
    "start": "torch", "family": "diagonal-normal", "objective": "ELBO", "samples": 1, "epochs": 500,
    "batch_size": 100, "lr": 1e-4, "eps": 1e-8, "milestones": [200, 350], "decay": 10**-0.2, "validate_every": 5,
    "patience": 12, "train_rows": 0, "valid_rows": 0, "test_rows": 0, "draws": 200, "tight_rows": 250,
    "tight_draws": 5000, "gap_rows": 50, "gap_steps": 3000, "compile": "trace",
}  # fmt: skip
"""The recipe of pythae's reproduction of a VAE on fixed binarized MNIST, stopped where 60 epochs gain nothing."""

BURDA: dict[str, Any] = {
    **PYTHAE, "latents": [50], "hidden": [200, 200], "activation": "tanh", "start": "glorot", "batch_size": 20,
    "lr": 1e-3, "eps": 1e-4, "epochs": 3280, "milestones": [1, 4, 13, 40, 121, 364, 1093], "decay": 10 ** (-1 / 7),
    "validate_every": 10, "patience": 0, "valid_rows": 1000, "draws": 5000, "tight_rows": 0, "gap_rows": 0,
}  # fmt: skip
"""The protocol of Burda, Grosse and Salakhutdinov, 2016: 3^i epochs at 1e-3 10^(-i/7), i = 0 .. 7."""

SHORT: dict[str, Any] = {
    **BURDA, "epochs": 8, "milestones": [6, 7], "decay": 10**-0.5, "validate_every": 1, "draws": 1000,
    "test_rows": 1000,
}  # fmt: skip
"""Its short counterpart: the same models, guides, start and batches; 8 epochs, bounds of 1000 draws on 1000 images."""

OWN: dict[str, dict[str, Any]] = {
    "mnist": {},
    "omniglot": {"epochs": 10, "milestones": [7, 9]},
    "fashion-mnist": {"epochs": 10, "milestones": [7, 9], "batch_size": 100, "eps": 1e-8},
    "frey-faces": {
        "likelihood": "normal", "hidden": [200], "latents": [20], "epochs": 300, "milestones": [200, 250],
        "batch_size": 100, "eps": 1e-8, "validate_every": 5, "patience": 8, "test_rows": 0,
    },
}  # fmt: skip
"""What differs of `SHORT`, by data set."""

TWO = {"model": "two layers", "latents": [100, 50], "family": "bottom-up"}
DLGM = {"model": "dlgm", "latents": [100, 50]}
METHODS: dict[str, dict[str, Any]] = {
    "IWAE, 2 layers, K=50": {**TWO, "objective": "IWAE", "samples": 50},
    "IWAE, 1 layer, K=50": {"objective": "IWAE", "samples": 50},
    "IWAE, 2 layers, K=5": {**TWO, "objective": "IWAE", "samples": 5},
    "DReG, 1 layer, K=5": {"objective": "DReG", "samples": 5},
    "DLGM, 2 layers, IWAE K=5": {**DLGM, "objective": "IWAE", "samples": 5},
    "IWAE, 1 layer, K=5": {"objective": "IWAE", "samples": 5},
    "VAE, 1 layer, K=5": {"samples": 5},
    "VAE, 2 layers, K=1": TWO,
    "DLGM, 2 layers, K=1": DLGM,
    "full-normal, 1 layer, K=1": {"family": "full-normal"},
    "inverse-autoregressive-flow, 1 layer, K=1": {"family": "inverse-autoregressive-flow"},
    "VAE, 1 layer, K=1": {},
}
"""Names as those of the published tables where they have one; the long ones first. K: samples of each row in a step."""

CHOICE: dict[str, Sequence[str]] = {
    "mnist": tuple(METHODS),
    "omniglot": ("IWAE, 2 layers, K=5", "IWAE, 1 layer, K=5", "VAE, 2 layers, K=1", "full-normal, 1 layer, K=1",
                 "inverse-autoregressive-flow, 1 layer, K=1", "VAE, 1 layer, K=1"),
    "fashion-mnist": ("IWAE, 1 layer, K=5", "DLGM, 2 layers, K=1", "full-normal, 1 layer, K=1",
                      "inverse-autoregressive-flow, 1 layer, K=1", "VAE, 1 layer, K=1"),
    "frey-faces": ("IWAE, 1 layer, K=5", "full-normal, 1 layer, K=1", "inverse-autoregressive-flow, 1 layer, K=1",
                   "VAE, 1 layer, K=1"),
}  # fmt: skip
SEEDS = {"frey-faces": 3}
SMOKE: dict[str, Any] = {
    "epochs": 2, "validate_every": 1, "patience": 0, "train_rows": 300, "valid_rows": 50, "test_rows": 20,
    "draws": 100, "tight_rows": 0, "gap_rows": 0, "compile": False,
}  # fmt: skip
SMOKE_METHODS = ("IWAE, 2 layers, K=5", "DReG, 1 layer, K=5", "DLGM, 2 layers, K=1", "IWAE, 1 layer, K=5",
                 "VAE, 1 layer, K=1")  # fmt: skip
STATIC = "binarized-mnist"


def cells(budget: str) -> list[Cell]:
    """The pythae recipe on fixed binarized MNIST, then the methods on the other sets; the long ones first.

    A task that is not the published protocol says so in its name, and then stands beside no published number.
    """
    if budget == "full":
        return [
            *(_cell(STATIC, name, seed, PYTHAE, {"family": name}) for name in FAMILIES for seed in range(5)),
            *(_cell(task, name, 0, BURDA, METHODS[name])
              for task in ("mnist", STATIC, "omniglot") for name in METHODS),
            *(cell for task in ("fashion-mnist", "frey-faces") for cell in _short(task, 5)),
        ]  # fmt: skip
    if budget == "smoke":
        return [
            *(_cell(f"{STATIC}, smoke", name, 0, {**PYTHAE, **SMOKE}, {"family": name}) for name in FAMILIES),
            *(_cell("mnist, smoke", name, 0, {**SHORT, **SMOKE}, METHODS[name]) for name in SMOKE_METHODS),
            _cell("frey-faces, smoke", SMOKE_METHODS[-1], 0, {**SHORT, **OWN["frey-faces"], **SMOKE}, {}),
        ]
    return [
        *(_cell(STATIC, name, 0, PYTHAE, {"family": name}) for name in FAMILIES),
        *(cell for task in CHOICE for cell in _short(task, SEEDS.get(task, 1))),
    ]


def _short(task: str, seeds: int) -> list[Cell]:
    settings = {**SHORT, **OWN[task]}
    return [
        _cell(f"{task}, short protocol", name, seed, settings, METHODS[name])
        for name in CHOICE[task]
        for seed in range(seeds)
    ]


def _cell(task: str, guide: str, seed: int, base: Mapping[str, Any], own: Mapping[str, Any]) -> Cell:
    return Cell(task, guide, seed, {**base, **own})


def seconds(cell: Cell) -> float:
    """A rough estimate, on one core."""
    s = cell.settings
    rows = s["train_rows"] or {"omniglot": 23_330, "frey-faces": 1565}.get(cell.task.partition(",")[0], 55_000)
    wide = 1.4 if s["model"] == "two layers" else 1.0
    step = 1.2e-3 + 1.5e-5 * s["batch_size"] * (1 + 1.4 * wide * s["samples"])
    step += {"full-normal": 2e-5, "inverse-autoregressive-flow": 1.5e-5}.get(s["family"], 0.0) * s["batch_size"]
    epochs = s["epochs"] * (0.8 if s["patience"] else 1.0)
    tested = s["test_rows"] or (200 if "frey" in cell.task else 10_000)
    draws = tested * s["draws"] + s["tight_rows"] * s["tight_draws"]
    return 3.0 + step * epochs * max(1.0, rows / s["batch_size"]) + 1.5e-5 * draws + 2.0 * s["gap_rows"]

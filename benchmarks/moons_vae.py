"""VAEs of the moons suite: settings that fail, their cures, and what is measured of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

import dgm
from dgm.bench_cells import Cell
from dgm.doctor import doctor
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import mlp
from dgm.models.likelihoods import Normal
from dgm.models.vae import VAE
from dgm.pair import Pair
from dgm.programs import evaluating, preserved_rng
from dgm.registry import families

from .moons_models import StrongDecoder, log_truth

HIDDEN = (64, 64)
CHECKS = ("posterior collapse", "likelihood scale", "khat", "trivial baseline")
"""What the doctor is asked for: the symptoms of a latent variable model of real columns."""


def vae(scale: Any = "learned") -> VAE:
    """z in the plane, tanh layers, a normal likelihood of one scale for both columns."""
    return VAE(2, latent=2, hidden=HIDDEN, likelihood=Normal(scale), activation=nn.Tanh)


@dataclass(frozen=True)
class Setting:
    """A model, a family of q, and what differs in training.

    fails: whether it is one of the usual settings that fail. warmup: share of the steps over which the KL's weight
    rises.
    """

    model: Callable[[], Any] = vae
    family: str = "diagonal-normal"
    loss: Callable[[], Any] | None = None
    warmup: float = 0.0
    fails: bool = False
    options: dict[str, Any] = field(default_factory=dict)


SCALE, FAMILY, COLLAPSE = "VAE: likelihood scale", "VAE: family of q", "VAE: strong decoder"
SETTINGS: dict[str, dict[str, Setting]] = {
    SCALE: {
        "scale 1 (squared error)": Setting(partial(vae, 1.0), fails=True),
        "scale 0.01": Setting(partial(vae, 0.01), fails=True),
        "scale learned": Setting(),
    },
    FAMILY: {
        "diagonal normal": Setting(fails=True),
        "diagonal normal, 16 weights": Setting(loss=partial(dgm.ImportanceELBO, 16)),
        "full normal": Setting(family="full-normal"),
        "mixture": Setting(family="mixture"),
        "autoregressive flow": Setting(family="inverse-autoregressive-flow"),
    },
    COLLAPSE: {
        "KL from the start": Setting(StrongDecoder, fails=True),
        "KL warm-up": Setting(StrongDecoder, warmup=0.5),
        "free bits 0.5": Setting(StrongDecoder, loss=partial(dgm.ELBO, kl="analytic", free_bits=0.5)),
    },
}
CURES = {SCALE: "scale learned", FAMILY: "autoregressive flow", COLLAPSE: "free bits 0.5"}
"""The setting that each failure is cured by."""
SMOKE = ("scale 1 (squared error)", "scale learned", "autoregressive flow", "diagonal normal", "free bits 0.5",
         "KL from the start")  # fmt: skip


def vae_cells(size: dict[str, Any], smoke: bool) -> list[Cell]:
    """Every setting for each seed."""
    settings = {k: size[k] for k in ("steps", "draws", "doctor_steps")}
    settings = {**settings, "batch_size": 200, "lr": 5e-3}
    return [
        Cell(task, name, seed, settings)
        for task, named in SETTINGS.items()
        for name in named
        if not smoke or name in SMOKE
        for seed in range(size["seeds"])
    ]


def guide_of(family: str, encoder: Sequence[int] = HIDDEN) -> Callable[..., Any]:
    """`(model, *batch) -> guide`, amortized."""
    return partial(Amortized, family=families()[family].make, encoder=mlp(*encoder, activation=nn.Tanh))


def run_vae(cells: Sequence[Cell]) -> list[Any]:
    """A row for each seed of one setting; all are trained at once. The doctor sees the first seed's."""
    first, settings = cells[0], cells[0].settings
    setting = SETTINGS[first.task][first.guide]
    (x,), (held_out,) = (part[:1] for part in _points())
    steps = settings["steps"]
    fits = dgm.fit(
        setting.model, guide_of(setting.family), x, steps=steps, batch_size=settings["batch_size"], lr=settings["lr"],
        loss=setting.loss() if setting.loss is not None else None, kl_warmup=setting.warmup * steps, clip=100.0,
        compile="trace", replicas={"seed": [cell.repeat for cell in cells]},
        schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
    )  # fmt: skip
    rows = [
        fit if isinstance(fit, Exception) else _row(fit, held_out, cell) for fit, cell in zip(fits, cells, strict=True)
    ]
    if isinstance(rows[0], dict):
        rows[0].update(diagnosis(setting, x, settings))
    return rows


def _points() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    data = dgm.load("moons-points")
    return data.train, data.test


def _row(fit: Any, held_out: Tensor, cell: Cell) -> Any:
    if fit.error is not None:
        return RuntimeError(fit.error)
    draws, seed = cell.settings["draws"], cell.repeat
    found = dgm.evaluate(fit.model, fit.guide, held_out, num_samples=draws, seed=seed)
    latents = dgm.latent_diagnostics(fit.model, fit.guide, held_out, num_samples=16, seed=seed)
    bound = torch.tensor(found.per_datum["bound"].to_numpy())
    lacks = log_truth(held_out) - bound
    learned = getattr(getattr(fit.model, "likelihood", None), "log_scale", None)
    return {
        "log_likelihood": float(bound.mean()), "per_datum": bound.float(), "elbo": found.summary["elbo"],
        "below_truth": float(lacks.mean()), "below_truth_se": float(lacks.std() / len(lacks) ** 0.5),
        "active_units": latents.active, "units": latents.total_units, "kl": latents.kl,
        "information": max(latents.aggregate.information, 0.0) if latents.aggregate is not None else None,
        "khat_bad": found.summary["khat_bad"], "khat_median": found.summary["khat_median"],
        "scale": float(learned.detach().exp()) if learned is not None else None,
        "samples": fit.model.sample(1000, generator=torch.Generator().manual_seed(seed)).float(),
        "codes": codes(fit.model, fit.guide, held_out, seed), "seconds": fit.seconds,
    }  # fmt: skip


def codes(model: Any, guide: Any, x: Tensor, seed: int) -> Tensor:
    """One draw of z for each row, `(N, latent)`: together the aggregate posterior."""
    pair = Pair(model, guide)
    with preserved_rng(seed), evaluating(model, guide), pair.running():
        trace: Any = poutine.trace(pair.run_guide).get_trace(x)
    return trace.nodes["z"]["value"].detach().float()


def diagnosis(setting: Setting, x: Tensor, settings: Any) -> dict[str, Any]:
    """What `dgm.doctor` finds before the long training: the name of its first finding, and its three sentences."""
    steps = settings["doctor_steps"]
    if not steps or setting.warmup:  # it has no warm-up of its own, and tries one as a cure
        return {}
    found = doctor(
        setting.model, x, guide=guide_of(setting.family), batch_size=settings["batch_size"], lr=settings["lr"],
        steps=steps, loss=setting.loss() if setting.loss is not None else None, checks=CHECKS,
    )  # fmt: skip
    skipped = "; ".join(f"{name}: {why}" for name, why in found.skipped.items())
    row = {
        "doctor": "; ".join(found.names) or "nothing found",
        "doctor_skipped": skipped,
        "doctor_seconds": found.seconds,
    }
    if found:
        first = found[0]
        row |= {"evidence": first.evidence, "consequence": first.consequence, "cure": first.cure}
    return row

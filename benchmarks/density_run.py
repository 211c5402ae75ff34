"""One cell of the density suite: train, bound log p of held-out rows, and say what the latents carry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dgm
from dgm.bench_cells import Cell
from dgm.bounds import mean_and_standard_error
from dgm.fitted import Fit
from dgm.gaps import gaps
from dgm.heldout import spaced
from dgm.optim import adam
from dgm.programs import preserved_rng

from .density_data import Parts, parts_of
from .density_models import Settings, guide_of, loss_of, model_of, schedule_of

LATENT_ROWS = 1000
"""Held-out rows, at most, over which active units are counted."""
PICTURES = 40


def run(cell: Cell) -> dict[str, Any]:
    """The row of a cell."""
    parts = parts_of(cell.task, cell.repeat, cell.settings)
    fit = trained(cell, parts)
    return {
        **_training(fit, cell.settings), **bounds(fit, parts.test, cell), **latents(fit, parts.test, cell),
        **free_gaps(fit, parts.test, cell),
    }  # fmt: skip


def trained(cell: Cell, parts: Parts) -> Fit:
    """The pair of a cell, trained; seeds from the cell alone.

    eps of Adam is meant for the loss of one row, and the loss here is that of all.
    """
    settings, seed = cell.settings, cell.repeat
    with preserved_rng(seed):
        model = model_of(settings, parts.train)
        guide = guide_of(settings, model, parts.train)
    return dgm.fit(
        model, guide, parts.train, epochs=settings["epochs"], batch_size=settings["batch_size"],
        optim=adam(settings["lr"], eps=settings["eps"] * len(parts.train)), loss=loss_of(settings),
        schedule=schedule_of(settings), validation=(parts.valid,), validate_every=settings["validate_every"],
        patience=settings["patience"] or None, seed=seed, transform=parts.transform, compile=settings["compile"],
    )  # fmt: skip


def _training(fit: Fit, settings: Settings) -> dict[str, Any]:
    """How it went: epochs, the one whose parameters were kept, and the curves, nats a row."""
    history: Any = fit.history
    seen = history[history["valid_elbo"].notna()]
    kept = seen.loc[seen["valid_elbo"].idxmax()] if settings["patience"] else seen.iloc[-1]
    curves = {
        "epoch": history["epoch"].to_numpy(), "train_elbo": history["elbo"].to_numpy(),
        "valid_epoch": seen["epoch"].to_numpy(), "valid_elbo": seen["valid_elbo"].to_numpy(),
    }  # fmt: skip
    return {
        "epochs_trained": int(history["epoch"].iloc[-1]), "epoch_kept": int(kept["epoch"]),
        "elbo_valid": float(kept["valid_elbo"]), "elbo_train": float(history["elbo"].iloc[-1]),
        "training_seconds": fit.seconds, "training_cpu_seconds": fit.cpu_seconds, **curves,
    }  # fmt: skip


def bounds(fit: Fit, test: Tensor, cell: Cell) -> dict[str, Any]:
    """-log p(x_n) at most, by the importance bound of `draws` draws; the ELBO; and the bound of `tight_draws` draws.

    The last is measured on `tight_rows` rows: its mean over all is the first one's minus the mean gain there.
    """
    settings = cell.settings
    found = dgm.evaluate(fit.model, fit.guide, test, num_samples=settings["draws"], seed=cell.repeat)
    bound, elbo = (torch.tensor(found.per_datum[name].to_numpy()).double() for name in ("bound", "elbo"))
    nll, nll_se = mean_and_standard_error(-bound)
    gap, gap_se = mean_and_standard_error(bound - elbo)
    row = {
        "nll": nll, "nll_se": nll_se, "elbo": float(elbo.mean()), "gap": gap, "gap_se": gap_se,
        "khat_bad": found.summary["khat_bad"], "per_datum": (-bound).float(),
    }  # fmt: skip
    if settings["tight_rows"]:
        (some,), rows = spaced((test,), settings["tight_rows"])
        tight = dgm.evaluate(fit.model, fit.guide, some, num_samples=settings["tight_draws"], seed=cell.repeat + 1)
        gain = torch.tensor(tight.per_datum["bound"].to_numpy()).double() - bound[rows]
        mean, se = mean_and_standard_error(gain)
        row |= {"nll_tight": nll - mean, "nll_tight_gain": mean, "nll_tight_gain_se": se}
    return row


def latents(fit: Fit, test: Tensor, cell: Cell) -> dict[str, Any]:
    """Active units by the rule of Burda et al., 2016, in all and by layer; KL of a row; and pictures of the prior."""
    (some,), _ = spaced((test,), LATENT_ROWS)
    found = dgm.latent_diagnostics(fit.model, fit.guide, some, num_samples=32, max_rows=0, seed=cell.repeat)
    generator = torch.Generator().manual_seed(cell.repeat)
    model: Any = fit.model
    sites = found.sites
    return {
        "active_units": found.active, "units": found.total_units, "kl": found.kl,
        "active_by_layer": " + ".join(f"{int(n)}" for n in sites.sort_values("site")["active"]),
        "pictures": model.sample(PICTURES, generator=generator, mean=True).float(),
    }  # fmt: skip


def free_gaps(fit: Fit, test: Tensor, cell: Cell) -> dict[str, Any]:
    """Approximation and amortization gap on `gap_rows` rows (Cremer, Li and Duvenaud, 2018); nothing for 0 rows."""
    settings = cell.settings
    if not settings["gap_rows"]:
        return {}
    (some,), _ = spaced((test,), settings["gap_rows"])
    found = gaps(
        fit.model, fit.guide, some, num_samples=1000, tolerance=0.02, max_steps=settings["gap_steps"],
        seed=cell.repeat, mode="joint training",
    )  # fmt: skip
    keys = ("approximation", "approximation_se", "amortization", "amortization_se")
    return {**{key: found.summary[key] for key in keys}, "gap_converged": bool(found.converged)}

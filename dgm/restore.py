"""A trained pair given back from its folder, in any process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from .checkpoint import Checkpoints
from .errors import DataError, GuideError
from .fitted import HISTORY, Fit
from .programs import Program, preserved_rng
from .resume import rows_of
from .starting import maker
from .store_run import RECIPE, Run, load_run

__all__ = ["restore"]


def restore(folder: str | os.PathLike[str], model: Any, guide: Program | Callable[..., Any], *batch: Any) -> Fit:
    """The trained pair that `fit(..., checkpoint=folder)` or `dgm train --out folder` left.

    A training that was cut short gives the parameters of its newest checkpoint. Nothing in the folder is ever run: the
    model and the guide are code, and the caller's.

    Args:
        folder: of the training; of replica k, `folder / "replica-000k"`.
        model: the model, or what makes it.
        guide: the guide, made for this model, or what makes it, `(model, *batch) -> guide`.
        batch: what the guide is made with; default the rows that were kept of the data. `Free` holds parameters for
            each row, and needs all of them.

    Returns:
        the pair with its weights, its history, and why training ended.

    Raises:
        DataError: nothing is there, or it is damaged; the message names the file.
        ModelError: the weights are not of this pair; the message names the first that does not fit.

    >>> import tempfile, dgm, torch
    >>> from dgm.guides.amortized import Amortized
    >>> from dgm.models.linear_vae import example
    >>> model, batch = example()
    >>> with tempfile.TemporaryDirectory() as place:
    ...     fitted = dgm.fit(model, Amortized(model, *batch), *batch, steps=2, checkpoint=place)
    ...     again = restore(place, example()[0], Amortized)
    >>> all(torch.equal(a, b) for a, b in zip(again.guide.parameters(), fitted.guide.parameters()))
    True
    """
    folder = Path(folder)
    run, stopped = _read(folder)
    given = batch or run.example
    if not given:
        raise DataError(f"{folder} keeps no rows of its data: give a batch, restore(folder, model, guide, *batch)")
    with preserved_rng(0):
        made = model if isinstance(model, nn.Module) else maker(model)()
        attached = guide if isinstance(guide, nn.Module) else guide(made, *given)
    if not callable(attached):
        raise GuideError(
            f"guide gave {type(attached).__name__}, expected a guide, or what makes it: (model, *batch) -> guide"
        )
    pair = run.restore(made, attached, *given)
    about = run.about
    return Fit(
        *pair,
        history=run.history,
        steps=int(about["steps"]),
        evaluations=int(about["evaluations"]),
        seconds=float(about["seconds"]),
        stopped=stopped,
        seed=int(about["seed"]),
        engine=str(about.get("engine", "")),
    )


def _read(folder: Path) -> tuple[Run, str]:
    """The finished run, or the newest state of one that was cut short, and why it ended."""
    if (folder / RECIPE).is_file():
        run = load_run(folder)
        return run, str(run.about["stopped"])
    place = folder if Checkpoints(folder).steps_kept() else folder / "checkpoints"
    saved = Checkpoints(place).latest()
    if saved is None:
        groups = sorted(path.name for path in folder.glob("group-*")) if folder.is_dir() else []
        if groups:
            raise DataError(
                f"{folder} holds {len(groups)} unfinished groups of replicas: finish them by the call to fit that "
                "began them"
            )
        raise DataError(f"nothing to restore in {os.fspath(folder)!r}: no {RECIPE} and no checkpoint")
    state: Mapping[str, Any] = saved.state
    if "weights" not in state:
        raise DataError(
            f"{saved.path} holds replicas that are unfinished: finish them by the call to fit that began them"
        )
    weights: dict[str, Tensor] = dict(state["weights"])
    about = {"steps": saved.step, "seed": state["told"]["seed"], **{n: state[n] for n in ("evaluations", "seconds")}}
    history = pd.DataFrame(rows_of(state["history"]), columns=HISTORY)
    run = Run(folder, {}, weights, about, history, tuple(state["example"]))
    return run, str(state["why"]) or f"cut short: the checkpoint of step {saved.step}"

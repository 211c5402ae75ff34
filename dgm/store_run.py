"""One trained pair on disk: weights as safetensors, everything else as JSON and CSV, nothing that runs code."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from . import __version__
from .errors import DataError
from .fitted import Fit
from .pair import Pair
from .pair_weights import load_weights, weights
from .programs import Program
from .provenance import provenance
from .resume import example_of
from .store import writable, write_whole

FORMAT = 1
RECIPE, WEIGHTS, HISTORY = "run.json", "weights.safetensors", "history.csv"


@dataclass(frozen=True)
class Run:
    """What `save_run` wrote.

    Attributes:
        spec: how model, data and guide are made again, as it was given to `save_run`.
        weights: of the model ("model.<name>"), the guide ("guide.<name>"), and of modules that a function closes over
            ("other.<name>").
        about: steps, evaluations, seconds, why training stopped, how the steps ran, versions and command.
        history: the training curve, as in `Fit`.
        example: a few rows of the data, with which the guide can be made again; empty where none were kept.
    """

    folder: Path
    spec: dict[str, Any]
    weights: dict[str, Tensor]
    about: dict[str, Any]
    history: pd.DataFrame
    example: tuple[Tensor, ...] = ()

    def restore(self, model: Program, guide: Program, *batch: Any) -> tuple[Program, Program]:
        """The pair with the weights of the run; `batch` is what the pair was made with.

        Raises:
            ModelError: the weights do not fit: the model is not the one that was trained.
        """
        pair = Pair(model, guide)
        pair.check(batch)  # creates the parameters that Pyro makes lazily
        load_weights(pair, self.weights, self.folder)
        return pair.model, pair.guide


def save_run(folder: str | os.PathLike[str], spec: Mapping[str, Any], fit: Fit, example: Sequence[Any] = ()) -> Path:
    """Write a trained pair; each file appears whole or not at all, `run.json` last.

    Args:
        folder: where to; made if need be.
        spec: whatever is needed to make model, data and guide again; must be plain JSON.
        fit: the trained pair.
        example: a batch as model and guide take it; a few rows of its tensors are kept.

    Raises:
        OptionError: the folder cannot be written to.
    """
    folder = writable(Path(folder))
    state = weights(Pair(fit.model, fit.guide))
    kept = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    about = {
        "steps": fit.steps,
        "evaluations": fit.evaluations,
        "seconds": fit.seconds,
        "stopped": fit.stopped,
        "engine": fit.engine,
        "seed": fit.seed,
        **provenance(),
    }
    kept.update({f"example.{i}": t.contiguous() for i, t in enumerate(example_of(example))})
    payload = save(kept)
    told = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    content = {"format": FORMAT, "dgm": __version__, "spec": dict(spec), "about": about, "weights": told}
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
    (folder / RECIPE).unlink(missing_ok=True)  # the weights of one run never stand beside the recipe of another
    write_whole(folder / WEIGHTS, lambda part: part.write_bytes(payload))
    write_whole(folder / HISTORY, lambda part: fit.history.to_csv(part, index=False))
    write_whole(folder / RECIPE, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    return folder


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Read what `save_run` wrote; nothing in the folder is ever run.

    Raises:
        DataError: no run there, a file that is missing or damaged, or a run of a newer dgm.
    """
    folder = Path(folder)
    path = folder / RECIPE
    if not path.is_file():
        raise DataError(
            f"no trained pair in {os.fspath(folder)!r} (no {RECIPE}): make one by `dgm train --out {folder}`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        number, spec, about = int(content["format"]), dict(content["spec"]), dict(content["about"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if number > FORMAT:
        raise DataError(
            f"{path} was written by dgm {content.get('dgm')}, this is {__version__}: use that version or newer"
        )
    told = content.get("weights")  # absent in a run of the first version
    try:
        payload = (folder / WEIGHTS).read_bytes()
        if isinstance(told, dict) and hashlib.sha256(payload).hexdigest() != told.get("sha256"):
            raise ValueError(
                f"{WEIGHTS} holds {len(payload)} bytes that do not give the SHA-256 in {RECIPE}, "
                f"expected {told.get('bytes')} bytes"
            )
        found = load(payload)
        history = pd.read_csv(folder / HISTORY)
    except (OSError, SafetensorError, ValueError) as error:
        raise DataError(f"a file of the run {os.fspath(folder)!r} is missing or damaged: {error}") from error
    rows = sorted((name for name in found if name.startswith("example.")), key=lambda name: (len(name), name))
    example = tuple(found.pop(name) for name in rows)
    return Run(folder, spec, found, about, history, example)


__all__ = ["Run", "load_run", "save_run"]

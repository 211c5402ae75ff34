"""Reading posteriordb (https://github.com/stan-dev/posteriordb): posteriors, their data and their reference draws.

A folder is a checkout of that repository, or one with its files in `posteriors/`, `data/` and `reference_draws/`.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgm.errors import DataError, did_you_mean

from .posteriordb_models import Model, Values, models

DATA = ("data/data", "data")
DRAWS = ("reference_posteriors/draws/draws", "reference_draws")


@dataclass(frozen=True)
class Posterior:
    """A posterior with a reference: its program, and draws of its parameters.

    names: of the D parameters, `beta[1]` and so on. draws: `(chains, draws, D)`, double precision.
    """

    name: str
    model: Model
    names: tuple[str, ...]
    draws: Tensor

    @property
    def reference(self) -> Tensor:
        """All chains one after another, `(S, D)`."""
        return self.draws.flatten(0, 1)

    def values(self, matrix: Tensor) -> Values:
        """Columns of a matrix `(S, D)` of parameters as posteriordb's variables."""
        return grouped(self.names, matrix)

    def matrix(self, latents: Values) -> Tensor:
        """Draws of the program's latents as a matrix `(S, D)` of posteriordb's parameters."""
        values = self.model.to_parameters(latents)
        columns = {key: values[key].reshape(len(values[key]), -1) for key in grouped_keys(self.names)}
        return torch.cat(list(columns.values()), 1)


def folder_of(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds `posteriors/`.

    Args:
        folder: a checkout; None for that of the environment variable POSTERIORDB, else `posteriordb` in the folder that
            DGM_DATA names.

    Raises:
        DataError: there is none.
    """
    folder = folder if folder is not None else os.environ.get("POSTERIORDB")
    if folder is None and "DGM_DATA" not in os.environ:
        raise DataError(
            "no folder of posteriordb: set POSTERIORDB to a checkout of https://github.com/stan-dev/posteriordb, or "
            "DGM_DATA to the folder that posteriordb is in"
        )
    root = Path(folder) if folder is not None else Path(os.environ["DGM_DATA"]) / "posteriordb"
    for place in (root, root / "posterior_database"):
        if (place / "posteriors").is_dir():
            return place
    raise DataError(
        f"{root} is no checkout of posteriordb: expected a folder with posteriors/ in it; "
        "git clone https://github.com/stan-dev/posteriordb and set POSTERIORDB to its folder"
    )


def names(folder: str | os.PathLike[str] | None = None) -> list[str]:
    """Posteriors of a folder that have reference draws and a program here."""
    root, known, found = folder_of(folder), models(), []
    for file in sorted((root / "posteriors").glob("*.json")):
        about = _about(file)
        if about.get("model_name") in known and about.get("reference_posterior_name"):
            found.append(file.stem)
    return found


def load(name: str, folder: str | os.PathLike[str] | None = None) -> Posterior:
    """A posterior by its name.

    Raises:
        DataError: no such folder or posterior; no program of its model; no reference; a missing or damaged file.
    """
    root = folder_of(folder)
    file = root / "posteriors" / f"{name}.json"
    if not file.is_file():
        raise DataError(f"no posterior {name!r} in {root}: {did_you_mean(name, names(root))}")
    about, known = _about(file), models()
    model, reference = about.get("model_name"), about.get("reference_posterior_name")
    if model not in known:
        raise DataError(
            f"posterior {name!r} has the model {model!r}, which has no program here: {did_you_mean(str(model), known)}"
        )
    if not reference:
        raise DataError(f"posterior {name!r} has no reference draws; take one of {', '.join(names(root))}")
    data = _zipped(root, DATA, str(about.get("data_name")))
    chains = _zipped(root, DRAWS, str(reference))
    labels, draws = _draws(chains, name)
    try:
        made = known[model](data)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the data of {name!r} do not fit the model {model!r}: {type(error).__name__}: {error}"
        ) from error
    return Posterior(name, made, labels, draws)


def grouped_keys(labels: Sequence[str]) -> list[str]:
    """Variables in the order of their first entry: beta of beta[1], beta[2]."""
    return list(dict.fromkeys(label.partition("[")[0] for label in labels))


def grouped(labels: Sequence[str], matrix: Tensor) -> Values:
    """Columns `(S, D)` as variables: `(S,)` for a number, `(S, n)` for entries [1] to [n]."""
    values: Values = {}
    for key in grouped_keys(labels):
        places = [i for i, label in enumerate(labels) if label.partition("[")[0] == key]
        columns = matrix[:, places]
        values[key] = columns if "[" in labels[places[0]] else columns[:, 0]
    return values


def _order(label: str) -> tuple[str, int]:
    key, _, index = label.partition("[")
    return key, int(index[:-1]) if index else 0


def _draws(chains: Any, name: str) -> tuple[tuple[str, ...], Tensor]:
    """Labels, and `(chains, draws, D)`.

    Raises:
        DataError: no list of chains with the same parameters and as many draws of each, all finite.
    """
    try:
        labels = [str(key) for key in chains[0]]
        first = {key: i for i, key in reversed(list(enumerate(label.partition("[")[0] for label in labels)))}
        labels.sort(key=lambda label: (first[_order(label)[0]], _order(label)[1]))
        draws = torch.as_tensor(np.array([[chain[label] for label in labels] for chain in chains], dtype=float))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"the reference draws of {name!r} are damaged: expected a list of chains, each with as many draws of every "
            f"parameter ({type(error).__name__}: {error})"
        ) from error
    if draws.dim() != 3 or not bool(draws.isfinite().all()):
        raise DataError(f"the reference draws of {name!r} are damaged: shape {tuple(draws.shape)}, or not all finite")
    return tuple(labels), draws.transpose(1, 2)


def _about(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from error


def _zipped(root: Path, places: Sequence[str], name: str) -> Any:
    """The JSON inside of NAME.json.zip, or of NAME.json."""
    tried = [root / place / f"{name}.json{end}" for place in places for end in (".zip", "")]
    file = next((path for path in tried if path.is_file()), None)
    if file is None:
        raise DataError(f"no file {name}.json.zip: expected {' or '.join(str(p) for p in tried[::2])}")
    try:
        if file.suffix == ".json":
            return json.loads(file.read_text(encoding="utf-8"))
        with zipfile.ZipFile(file) as archive:
            return json.loads(archive.read(archive.namelist()[0]))
    except (OSError, EOFError, ValueError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}): take it from posteriordb anew"
        ) from error

"""Cells of a comparison on disk: each is written whole when it is finished, so that what ends the rest loses nothing.

FOLDER/comparison.json says what all cells share; `dgm.bench_store` keeps the cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from . import __version__
from .bench_cells import canonical
from .bench_store import Record, Store
from .cells import Cell, Settings, start
from .digest import digest, digests
from .errors import DataError, OptionError
from .pair import Pair
from .programs import evaluating, preserved_rng
from .resume import words
from .store import write_whole

__all__ = ["SHARED", "Record", "Store", "key_of", "open_store", "tidy", "to_cell", "to_record"]

FORMAT = 1
SHARED = "comparison.json"


def open_store(folder: Path, settings: Settings, train: tuple[Tensor, ...], held_out: tuple[Tensor, ...]) -> Store:
    """The store of a folder, empty or with cells of the same comparison.

    Raises:
        OptionError: it holds another comparison (the first option that differs is named), or cannot be written to.
        DataError: it is damaged, or of a newer dgm.
    """
    store, path = Store(folder), folder / SHARED
    shared = json.loads(
        canonical(
            {
                **{name: words(value) for name, value in asdict(settings).items() if name != "fit_options"},
                **{name: words(value) for name, value in settings.fit_options.items() if value is not None},
                "dgm": __version__,
                "training rows": digest(train),
                "held-out rows": digest(held_out),
            }
        )
    )
    for place in (store.cells, store.attempts, path):
        if place.is_symlink():
            raise OptionError(f"{place} is a link, which could lead out of the folder: give another folder")
    store.prepare()
    if path.exists():
        _check(path, shared)
    else:
        text = json.dumps({"format": FORMAT, "shared": shared}, indent=1, ensure_ascii=False)
        write_whole(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    return store


def tidy(store: Store) -> None:
    """Remove a store in which nothing was finished or died."""
    parts = (store.cells, store.attempts)
    if not any(part.is_dir() and any(part.iterdir()) for part in parts):
        (store.folder / SHARED).unlink(missing_ok=True)
        for part in parts:
            if part.is_dir():
                part.rmdir()


def _check(path: Path, shared: Mapping[str, Any]) -> None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        number, there = int(content["format"]), dict(content["shared"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}): give another folder, or remove this one"
        ) from error
    if number > FORMAT:
        raise DataError(f"{path} is of a newer dgm ({there.get('dgm')}), this is {__version__}: use that one or newer")
    for name in sorted({*shared, *there}):
        if shared.get(name) != there.get(name):
            what = f"{name} is {there.get(name)!r} there and {shared.get(name)!r} here"
            raise OptionError(
                f"{path.parent} holds a comparison that this one does not continue: "
                f"{f'the {name} are others' if name.endswith('rows') else what}. Give what it was begun with, or "
                "another folder"
            )


def key_of(
    make: Callable[[], Any],
    name: str,
    guide: Callable[..., Any],
    seed: int | str,
    first: int,
    train: tuple[Tensor, ...],
    settings: Settings,
) -> str:
    """The identity of a cell: guide and seed, and what model and guide are at the start.

    Of these: names, options, every parameter, and the loss of the first rows, in which a changed program shows.

    Args:
        first: the seed of that start.
    """
    parts: list[Any] = [name, words(guide), words(make), seed]
    try:
        model, attached = start(make, guide, first, train, settings)
        parts += [digests(model), digests(attached)]
        with preserved_rng(first), evaluating(model, attached):
            loss = Pair(model, attached).loss(None, tuple(t[:10] for t in train))
        parts.append(f"{float(loss):.4g}")
    except Exception as error:  # its cell will say so
        parts.append(type(error).__name__)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def to_record(cell: Cell) -> Record:
    """A cell as plain values and arrays."""
    arrays = {"per_datum": cell.per_datum, "khat": cell.khat}
    about: dict[str, Any] = {"columns": list(map(str, cell.history.columns)), "words": {}, "values": {}}
    for name, column in cell.history.items():
        values = column.to_numpy()
        if values.dtype.kind in "biuf":
            arrays[f"history.{name}"] = values
        else:
            about["words"][str(name)] = column.tolist()
    for name, value in cell.pictures.items():
        if isinstance(value, np.ndarray) and value.ndim:
            arrays[f"pictures.{name}"] = value
        else:
            about["values"][name] = value
    return Record(dict(cell.row), {}, about, arrays)


def to_cell(record: Record) -> Cell:
    """The inverse of `to_record`.

    Raises:
        DataError: a part is missing.
    """
    try:
        history = {
            name: record.about["words"][name] if name in record.about["words"] else record.arrays[f"history.{name}"]
            for name in record.about["columns"]
        }
        drawn = {n.removeprefix("pictures."): v for n, v in record.arrays.items() if n.startswith("pictures.")}
        return Cell(
            dict(record.row),
            pd.DataFrame(history),
            record.arrays["per_datum"],
            record.arrays["khat"],
            {**drawn, **record.about["values"]},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a finished run is damaged: {type(error).__name__}: {error}; remove its folder") from error

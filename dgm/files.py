"""What a data set is, how one is made from arrays or from a user's own file, and files known by their checksum."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .data import as_tensors, split
from .errors import DataError, OptionError, did_you_mean

Batch = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to train on and rows to test on, with what is needed to read results.

    Supervised tables: x is standardised by mean and sd of its train rows (sd 0 counts as 1), and so is y of a
    regression: ``y * y_std + y_mean`` is its original scale. Images: rows of pixels in [0, 1], labels kept apart.

    >>> x = torch.zeros(4, 2)
    >>> print(Dataset("tides", "table", train=(x,), test=(x[:1],)))
    tides: table, 4 train, 1 test, each 2
    """

    name: str
    kind: str  # "images" | "regression" | "classification" | "points" | "table"
    train: Batch
    test: Batch
    valid: Batch | None = None
    image_shape: tuple[int, int] | None = None
    y_mean: float = 0.0
    y_std: float = 1.0
    num_classes: int | None = None
    transform: Callable[[Batch, torch.Generator], Batch] | None = None  # for each training batch
    note: str = ""
    source: str = ""
    labels: dict[str, Tensor] | None = None  # of images: "train", "test" and, where there is one, "valid"

    def __str__(self) -> str:
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        rows = ", ".join(f"{len(part[0])} {name}" for name, part in parts.items() if part is not None)
        shape = "x".join(map(str, self.image_shape or self.train[0].shape[1:])) or "1"
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        return f"{self.name}: {self.kind}, {rows}, each {shape}{classes}" + (f"; {self.note}" if self.note else "")

    def supervised(self) -> Dataset:
        """The same images with their labels: a classification of (x, y)."""
        if self.labels is None:
            raise DataError(f"data set {self.name!r} has no labels")
        parts: Any = {part: (*getattr(self, part), y) for part, y in self.labels.items()}
        return replace(self, kind="classification", labels=None, **parts)


# ----------------------------------------------------------------------------------------------- from arrays

BINARIZE = {
    "batch": "pixels drawn anew for each training batch",
    "once": "pixels drawn once",
    "threshold": "pixels are grey > 1/2",
    "none": "",
}


def _redraw(batch: Batch, generator: torch.Generator) -> Batch:
    x = batch[0]
    u = torch.rand(x.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    return ((u < x).to(x.dtype), *batch[1:])  # less than half the time of torch.bernoulli


def images(
    name: str,
    parts: dict[str, np.ndarray],
    labels: dict[str, np.ndarray] | None = None,
    *,
    binarize: str = "none",
    seed: int = 0,
    note: str = "",
    **rest: Any,
) -> Dataset:
    """A Dataset of images.

    Args:
        parts: "train", "test" and perhaps "valid": (n, height, width), uint8 in 0..255 or floats in [0, 1].
        binarize, seed: see ``dgm.datasets.load``.

    >>> d = images("noise", {p: np.full((n, 2, 2), 0.5) for p, n in (("train", 6), ("test", 3))}, binarize="batch")
    >>> d.transform(d.train, torch.Generator().manual_seed(0))[0].unique()
    tensor([0., 1.])
    """
    if binarize not in BINARIZE:
        raise OptionError(f"binarize={binarize!r} is not known: {did_you_mean(binarize, BINARIZE)}")
    generator = torch.Generator().manual_seed(seed)
    ready: dict[str, Any] = {}
    for part in ("test", "valid", "train"):  # in this order "once" and "batch" have the same test part
        if part not in parts:
            continue
        (x,) = as_tensors(parts[part].reshape(len(parts[part]), -1), names=[f"{name} ({part})"])
        if parts[part].dtype == np.uint8:
            x = x.div_(255)
        if binarize != "none" and not (0 <= x.min() and x.max() <= 1):
            raise DataError(f"pixels of {name} run from {x.min():g} to {x.max():g}; binarize= needs them in [0, 1]")
        if binarize == "once" or (binarize == "batch" and part != "train"):
            x = torch.bernoulli(x, generator=generator)
        ready[part] = ((x > 0.5).to(x.dtype) if binarize == "threshold" else x,)
    return Dataset(
        name=name,
        kind="images",
        **ready,
        image_shape=cast(tuple[int, int], tuple(parts["train"].shape[1:])),
        labels=None if labels is None else {part: as_tensors(y)[0] for part, y in labels.items()},
        transform=_redraw if binarize == "batch" else None,
        note="; ".join(filter(None, (note, BINARIZE[binarize]))),
        **rest,
    )


def _standardised(values: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    part = values[train]
    mean, sd = part.mean(0), part.std(0)
    sd = np.where(np.ptp(part, axis=0) > 0, sd, 1.0)  # a constant column has sd 1e-17 and not 0
    return (values - mean) / sd, mean, sd


def table(name: str, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, **rest: Any) -> Dataset:
    """A Dataset of rows (x, y), standardised on ``train``: a classification where y holds integers 0 .. K-1.

    >>> x = np.arange(12.0).reshape(6, 2)
    >>> d = table("line", x, x[:, 0], np.arange(4), np.arange(4, 6))
    >>> d.y_mean, bool(d.train[0].mean() == 0)
    (3.0, True)
    """
    x, _, _ = _standardised(np.asarray(x, dtype=np.float64), train)
    if np.issubdtype(y.dtype, np.integer):
        rest = {"kind": "classification", "num_classes": int(y.max()) + 1, **rest}
    else:
        y, mean, sd = _standardised(np.asarray(y, dtype=np.float64), train)
        rest = {"kind": "regression", "y_mean": float(mean), "y_std": float(sd), **rest}
    return Dataset(name, train=as_tensors((x[train], y[train])), test=as_tensors((x[test], y[test])), **rest)


# ------------------------------------------------------------------------------------- files known by checksum


@dataclass(frozen=True)
class DataFile:
    """A file that is known by its checksum, at ``<data folder>/<folder>/<name>`` or ``<data folder>/<name>``."""

    folder: str
    name: str
    sha256: str
    url: str = ""

    def locate(self, data_dir: str | os.PathLike[str] | None) -> Path | None:
        """Its path in ``data_dir``, else in the folder that DGM_DATA names, with the checksum verified."""
        for root in _folders(data_dir):
            for path in (Path(root) / self.folder / self.name, Path(root) / self.name):
                if path.is_file():
                    with path.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != self.sha256:
                        raise DataError(
                            f"{path} is damaged, or another file of this name: expected sha256 {self.sha256}, "
                            f"found {found}; replace it or move it away"
                        )
                    return path
        return None

    def download(self) -> Path:
        """Its path in the user's cache; OSError or ValueError where it cannot be had intact."""
        import pooch

        if not self.url:
            raise OSError("there is no address to download it from")
        return Path(
            pooch.retrieve(
                self.url,
                known_hash=f"sha256:{self.sha256}",  # verified on each call; written to a temporary name, then moved
                fname=self.name,
                path=pooch.os_cache("dgm") / self.folder,
                downloader=pooch.HTTPDownloader(timeout=10),
            )
        )


def _folders(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    return [Path(folder) for folder in (data_dir, os.environ.get("DGM_DATA")) if folder]


def find_files(files: Sequence[DataFile], data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Paths of intact files: from ``data_dir``, from DGM_DATA, or downloaded to the user's cache.

    Raises:
        DataError: a file is damaged, or cannot be had; it says which file to put where.
    """
    if data_dir is not None and not Path(data_dir).is_dir():
        raise DataError(f"data folder {os.fspath(data_dir)!r} does not exist")
    found = [file.locate(data_dir) for file in files]
    missing = [file for file, path in zip(files, found, strict=True) if path is None]
    try:
        return [path or file.download() for file, path in zip(files, found, strict=True)]
    except (OSError, ValueError) as error:  # requests raises OSError, pooch ValueError for a wrong checksum
        wanted = "".join(f"\n  <folder>/{f.folder}/{f.name}  sha256 {f.sha256}" for f in missing)
        places = map(str, _folders(data_dir))
        reason = f"{type(error).__name__}, {str(error).splitlines()[0][:120]}"
        raise DataError(
            f"data files are missing (looked in: {', '.join(places) or 'no data folder is set'}; download: {reason}). "
            f"Put them at{wanted}\nand name the folder by --data-dir <folder>, data_dir=, or DGM_DATA=<folder>"
        ) from error


# ------------------------------------------------------------------------------------------ from a user's file


def from_file(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    kind: str | None = None,
    fraction: float = 0.2,
    seed: int = 0,
    binarize: str | None = None,
) -> Dataset:
    """A user's own file as a Dataset.

    csv: every column must be numeric but the target's. npz, and pt (a tensor, a tuple (x, y), or a dictionary): the
    arrays ``x`` and perhaps ``y``, else the first array; with ``x_test`` and ``y_test``, or ``train`` and ``test``,
    the file's own split is kept, and otherwise ``fraction`` of the rows is drawn at random for testing.
    Without a target rows are left as they are (arrays of three dimensions are images; uint8 is divided by 255).

    Args:
        target: the column or array to predict; None: ``y`` of an npz or pt file, if it has one.
        kind: "regression" or "classification"; None: a class where the target holds text, booleans, or whole numbers
            with at most 20 different values. Classes are numbered in sorted order.
        fraction: share of test rows, between 0 and 1.
        seed: of the split and of binarization.
        binarize: for images, see ``dgm.datasets.load``; None keeps the pixels.

    Raises:
        DataError: no such file, one that cannot be read, no such target, or bad values (column and row named).
        OptionError: an option out of its domain.
    """
    if kind not in (None, "regression", "classification"):
        raise OptionError(f"kind must be 'regression', 'classification' or None, got {kind!r}")
    path = Path(path)
    content = _read(path)
    x, y, n_test = _from_columns(content, target) if isinstance(content, pd.DataFrame) else _from_keys(content, target)
    about: dict[str, Any] = dict(
        source=os.fspath(path), note=f"{fraction:g} of the rows are for testing, drawn by seed {seed}"
    )
    if n_test is not None:
        about["note"] = "the file's own split"
    if y is None and isinstance(x, np.ndarray) and x.ndim == 3:
        as_tensors(x)  # bad values are named here, by the row of the file
        train, test = _rows(len(x), n_test, fraction, seed)
        parts = {"train": x[train], "test": x[test]}
        return images(path.name, parts, binarize=binarize or "none", seed=seed, **about)
    if binarize not in (None, "none"):
        raise OptionError(f"binarize={binarize!r} is for images: one array (rows, height, width) and no target")
    if y is None:
        (values,) = as_tensors(x)
        train, test = _rows(len(values), n_test, fraction, seed)
        return Dataset(path.name, "table", (values[train],), (values[test],), **about)
    codes, classes = _target(y, f"target {target or 'y'!r}", kind)
    if isinstance(x, np.ndarray):
        x = x.reshape(len(x), -1)
    checked, values = as_tensors((x, codes), dtype=torch.float64, names=("x", f"target {target or 'y'!r}"))
    if classes:
        about["note"] += "; classes " + ", ".join(classes)
    return table(path.name, checked.numpy(), values.numpy(), *_rows(len(checked), n_test, fraction, seed), **about)


def _rows(n: int, n_test: int | None, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, test): the last ``n_test`` where the file says so, or a random draw."""
    index = torch.arange(n)
    if n_test is not None:
        return index[: n - n_test].numpy(), index[n - n_test :].numpy()
    (train,), (test,) = split((index,), fraction, torch.Generator().manual_seed(seed))
    return train.numpy(), test.numpy()


def _read(path: Path) -> pd.DataFrame | dict[str, np.ndarray]:
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*") if p.suffix.lower() in (".csv", ".npz", ".pt")]
        raise DataError(f"no data file {os.fspath(path)!r}" + (f"; {did_you_mean(path.name, near)}" if near else ""))
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            return pd.read_csv(path)
        if suffix == ".npz":
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            other = next((key for key, value in arrays.items() if not isinstance(value, np.ndarray)), None)
            if other is not None:
                raise ValueError(f"{other!r} inside of it is no array")
            return arrays
        if suffix == ".pt":
            content = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(content, Tensor):
                content = {"x": content}
            elif isinstance(content, tuple | list):
                content = dict(zip(("x", "y"), content, strict=False))
            return {key: np.asarray(t.double() if t.is_floating_point() else t) for key, t in content.items()}
    except Exception as error:  # each reader has errors of its own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if suffix != ".csv" and ("pickle" in reason or "weights_only" in reason):  # no advice to switch safety off
            reason = "it is damaged, or holds Python objects, which are not loaded; save plain arrays or tensors"
        raise DataError(f"{path} cannot be read as {suffix} data: {reason}") from error
    raise DataError(f"{path} has the ending {suffix!r}; a data file is .csv, .npz or .pt")


def _from_columns(frame: pd.DataFrame, target: str | None) -> tuple[pd.DataFrame, pd.Series | None, None]:
    if target is None:
        return frame, None, None
    if target not in frame.columns:
        raise DataError(f"no column {target!r} to predict; {did_you_mean(target, map(str, frame.columns))}")
    return frame.drop(columns=target), frame[target], None


def _from_keys(arrays: dict[str, np.ndarray], target: str | None) -> tuple[np.ndarray, np.ndarray | None, int | None]:
    """x, y and the number of test rows, which stand last; None where the file has no split of its own."""
    if not arrays:
        raise DataError("the file holds no arrays")
    if target is not None and target not in arrays:
        raise DataError(f"no array {target!r} to predict; {did_you_mean(target, arrays)}")
    x_key = next((key for key in ("x", "train") if key in arrays), next(iter(arrays)))
    test_key = "test" if x_key == "train" else f"{x_key}_test"
    y_key = target or "y"
    x, y, x_test, y_test = (arrays.get(key) for key in (x_key, y_key, test_key, f"{y_key}_test"))
    if x is None or x.ndim == 0:
        raise DataError(f"array {x_key!r} is a single number; expected one row for each data point")
    if x_test is None:
        return x, y, None
    if x.shape[1:] != x_test.shape[1:]:
        raise DataError(f"{x_key!r} has rows of shape {x.shape[1:]}, {test_key!r} of {x_test.shape[1:]}")
    if y is not None and (y_test is None or (len(y), len(y_test)) != (len(x), len(x_test))):
        raise DataError(f"{y_key!r} and '{y_key}_test' must have a row for each of {x_key!r} and {test_key!r}")
    both = None if y is None or y_test is None else np.concatenate((y, y_test))
    return np.concatenate((x, x_test)), both, len(x_test)


def _target(y: pd.Series | np.ndarray, name: str, kind: str | None) -> tuple[np.ndarray, list[str]]:
    """The values of a regression, or the numbers 0 .. K-1 of a classification with the names of its classes."""
    if isinstance(y, np.ndarray):
        if y.ndim != 1 and y.size != len(y):
            raise DataError(f"{name} has shape {y.shape}; expected one value for each row")
        y = pd.Series(y.reshape(-1))
    numeric = y.dtype.kind in "iuf"
    few = y.dtype.kind in "iu" and y.nunique() <= 20
    if kind == "regression" or (kind is None and numeric and not few):
        if not numeric:
            raise DataError(f"{name} holds {y.dtype}, not numbers: no regression is possible")
        return y.to_numpy(dtype=np.float64, na_value=np.nan), []
    if y.dtype.kind == "f" and not (y.dropna() % 1 == 0).all():
        raise DataError(f"{name} holds fractions, which are no classes; use kind='regression'")
    missing = np.flatnonzero(y.isna())
    if len(missing):
        raise DataError(f"{name} has {len(missing)} missing (row {missing[0]}); drop or impute it")
    codes, classes = pd.factorize(y, sort=True)
    if not 2 <= len(classes) <= 100:
        raise DataError(f"{name} has {len(classes)} different values; a classification needs 2 to 100")
    return codes.astype(np.int64), [str(c) for c in classes]

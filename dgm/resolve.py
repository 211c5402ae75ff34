"""Names and paths, as one types them, made into objects: data sets, and makers of models that fit them."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .datasets import load, names
from .errors import DataError, ModelError, OptionError, did_you_mean
from .files import Dataset, from_file
from .programs import preserved_rng
from .registry import find, models

Maker = Callable[[], Any]
"""Makes a model anew; its start depends on torch's random stream alone, and worker processes can be sent it."""

DATA_ENDINGS = (".csv", ".npz", ".pt")


def data_of(
    source: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    split: int | str = 0,
    target: str | None = None,
    seed: int = 0,
    binarize: str | None = None,
) -> Dataset:
    """A data set by name, or from a .csv, .npz or .pt file by path.

    Args:
        source: a name of `dgm.datasets.names()`, or a path.
        data_dir, split: for names, see `dgm.load`.
        target: for files, the column or array to predict.
        seed, binarize: see `dgm.load` and `dgm.datasets.from_file`.

    Raises:
        DataError: no such name or file, or damaged data. OptionError: an option that does not go with this source.

    >>> data_of("diabetes").kind
    'regression'
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise OptionError(f"seed of the data is {seed!r}, expected a whole number from 0 to 2**63 - 1")
    is_path = (
        Path(source).suffix.lower() in DATA_ENDINGS
        or os.sep in source
        or (source not in names() and Path(source).is_file())
    )
    if not is_path:
        if target is not None:
            raise OptionError(f"target={target!r} is for files; {source!r} has its own")
        return load(source, data_dir=data_dir, split=split, seed=seed, binarize=binarize)
    if split != 0:
        raise OptionError(
            f"split={split!r} is for named data sets; a file is split by seed, or holds x_test and y_test"
        )
    return from_file(source, target=target, seed=seed, binarize=binarize)


def model_of(spec: str, data: Dataset, **options: Any) -> tuple[Maker, Dataset]:
    """A maker of the model for this data set, and the data set as the model takes it.

    A zoo model is made for the data: its number of columns, its image shape, the likelihood that its values ask for, a
    network with the right outputs. Images go to a model of (x, y) with their labels; a model of x alone gets no y.

    Args:
        spec: a name that `dgm list models` shows, or "path/to/file.py:name" of a class, maker or program of one's own.
        data: what to train on.
        options: for the constructor of a zoo model; those that it does not take are left out.

    Raises:
        OptionError: unknown name. ModelError: the file or its object cannot be used. DataError: no target to predict.

    >>> make, data = model_of("vae", load("digits"), latent=2)
    >>> make().latent, data.kind
    (2, 'images')
    """
    if is_file(spec):
        if options:
            raise OptionError(f"{next(iter(options))} is for zoo models; {spec} has its own")
        make: Maker = partial(made_from_file, spec)
        return make, matched(make(), data, spec)
    entry = find(spec, models(), "model")
    data = matched(entry.make, data, entry.name)
    return partial(_made, entry.make, _arguments(entry.make, data, options), data.train[0]), data


def is_file(spec: str) -> bool:
    """Whether a model or guide is given by its file.

    >>> is_file("tides.py:Tides"), is_file("vae")
    (True, False)
    """
    return spec.endswith(".py") or spec.rpartition(":")[0].endswith(".py")


# ---------------------------------------------------------------------------------------------- zoo models


def _arguments(make: Any, data: Dataset, options: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments by what the constructor asks for, by name."""
    x = data.train[0]
    asked = inspect.signature(make).parameters
    known: dict[str, Any] = {
        "features": x[0].numel(),
        "image_shape": data.image_shape,
        "likelihood": _likelihood(data),
        "network": (x[0].numel(), *options.get("hidden", (50,)), data.num_classes or 1),
    }
    return {name: value for name, value in {**known, **options}.items() if name in asked}


def _likelihood(data: Dataset) -> nn.Module:
    likelihoods = importlib.import_module("dgm.models.likelihoods")  # by name: the core does not know the zoo
    x = data.train[0]
    if data.kind == "classification":
        return likelihoods.Categorical()
    if data.kind == "regression":
        return likelihoods.Normal()
    if data.transform is not None or bool(((x == 0) | (x == 1)).all()):
        return likelihoods.Bernoulli()
    return likelihoods.Normal(features=None if data.image_shape else x[0].numel())


def _made(make: Callable[..., Any], arguments: Mapping[str, Any], x: Tensor) -> Any:
    """The model; a network is made here, so that its start depends on the seed as all else does."""
    arguments = dict(arguments)
    if "network" in arguments:
        arguments["network"] = importlib.import_module("dgm.models.vae").network(arguments["network"])
    model = make(**arguments)
    if hasattr(model, "initialise_output_bias"):
        model.initialise_output_bias(x)
    return model


def matched(model: Any, data: Dataset, name: str) -> Dataset:
    """The data set with as many arrays as a model (or its class) takes.

    Raises:
        DataError: the model predicts y and the data has none. ModelError: it takes more arrays than there are.
    """
    forward = getattr(model, "forward", model)
    parameters = [p for p in inspect.signature(forward).parameters.values() if p.name != "self"]
    taken = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return data
    if len(data.train) == 1 and any(p.name == "y" for p in taken):
        if data.labels is None:
            raise DataError(
                f"{name} predicts y from x, and {data.name!r} has no y: take a regression or classification "
                "(`dgm list data`), or name the column to predict of a file by --target"
            )
        return data.supervised()
    needed = [p.name for p in taken if p.default is p.empty]
    if len(needed) > len(data.train):
        raise ModelError(f"{name} takes {', '.join(needed)}, and {data.name!r} has {len(data.train)} array(s) of rows")
    if 0 < len(taken) < len(data.train):
        n, note = len(taken), "the target is left out: the model is one of x alone"
        about = "; ".join(filter(None, (data.note, note)))
        parts: Any = {
            part: rows[:n] for part in ("train", "valid", "test") if (rows := getattr(data, part)) is not None
        }
        return replace(data, kind="table", num_classes=None, y_std=1.0, note=about, **parts)
    return data


# --------------------------------------------------------------------------------------- a user's own file


def made_from_file(spec: str) -> Any:
    """The model that "path/to/file.py:name" names: a class or maker is called, a module copied, a program taken.

    The file is read anew in every process, so that workers need nothing of the file but its path.

    Raises:
        ModelError: see `object_from_file`; or a class that needs arguments, or raises when it is called.
    """
    thing = object_from_file(spec)
    if isinstance(thing, nn.Module):
        return copy.deepcopy(thing)
    name = spec.rpartition(":")[2]
    needed = [
        p.name
        for p in inspect.signature(thing).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if needed and isinstance(thing, type):
        raise ModelError(
            f"class {name} needs {', '.join(needed)}: give defaults, or write `def make(): return {name}(...)` in the "
            "file and name that"
        )
    if needed:
        return thing  # a program that takes the data
    try:
        made = thing()
    except Exception as error:  # the user's own code may fail in any way
        raise ModelError(f"{spec} cannot be called: {where_in_file(error, spec)}") from error
    return made if callable(made) else thing


def object_from_file(spec: str, what: str = "model") -> Any:
    """What "path/to/file.py:name" names; `what` is what messages call it.

    Raises:
        ModelError: no such file or name, a file that cannot be imported, or an object that is no model or guide.
    """
    path, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        path, name = spec, ""
    file = Path(path).expanduser()
    if not file.is_file():
        near = [f.name for f in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ModelError(f"no {what} file {os.fspath(file)!r}" + (f"; {did_you_mean(file.name, near)}" if near else ""))
    module = _imported(file.resolve())
    own = [
        n
        for n, v in vars(module).items()
        if callable(v) and getattr(v, "__module__", module.__name__) == module.__name__
    ]
    own = [n for n in own if not n.startswith("_")]
    if not name:
        raise ModelError(f"which object of {path}? Write {path}:NAME; {did_you_mean('', own)}")
    thing = getattr(module, name, None)
    if thing is None:
        raise ModelError(f"{path} has no {name!r}: {did_you_mean(name, own)}")
    if not callable(thing):
        kinds = "a model class, an nn.Module or a function" if what == "model" else "a class or a function"
        raise ModelError(f"{spec} is of type {type(thing).__name__}, expected {kinds}")
    return thing


def _imported(file: Path) -> ModuleType:
    """The module of a file, imported once, under a name of its own; its folder can be imported from meanwhile."""
    unique = f"dgm_file_{hashlib.sha256(os.fspath(file).encode()).hexdigest()[:12]}_{file.stem}"
    if unique in sys.modules:
        return sys.modules[unique]
    found = importlib.util.spec_from_file_location(unique, file)
    if found is None or found.loader is None:
        raise ModelError(f"{file} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[unique] = module
    sys.path.insert(0, os.fspath(file.parent))
    try:
        with preserved_rng(0):  # a file that draws when it is imported gets the same values in every process
            found.loader.exec_module(module)
    except Exception as error:  # the user's own code may fail in any way
        del sys.modules[unique]
        raise ModelError(f"{file} cannot be imported: {where_in_file(error, os.fspath(file))}") from error
    finally:
        sys.path.remove(os.fspath(file.parent))
    return module


def where_in_file(error: BaseException, spec: str | None) -> str:
    """The error in one line, with the line of the user's file, if there is one."""
    if spec is None:
        return f"{type(error).__name__}: {error}"
    file = str(Path(spec.rpartition(":")[0] if not spec.endswith(".py") else spec).expanduser().resolve())
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    return f"{type(error).__name__}: {error}" + (f" (line {line})" if line else "")


__all__ = [
    "DATA_ENDINGS",
    "Maker",
    "data_of",
    "is_file",
    "made_from_file",
    "matched",
    "model_of",
    "object_from_file",
    "where_in_file",
]

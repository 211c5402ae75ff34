"""The zoo: the folders are the registry, and packages of others add to it by entry points.

A file of `dgm.models` offers the first class of its `__all__`; a file of `dgm.guides` offers a family where that
callable takes `features` first, a way to attach where it takes `model` first. Nothing else is written anywhere.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

from .errors import OptionError, did_you_mean

Kind = Literal["model", "family", "attach"]


@dataclass(frozen=True)
class Entry:
    """One thing of the zoo: what it is, in one line, and how to get it."""

    name: str
    kind: Kind
    summary: str
    make: Callable[..., Any]
    module: ModuleType
    source: str


@dataclass(frozen=True)
class Broken:
    """A file or plug-in that could not be imported; the rest works."""

    name: str
    source: str
    error: str


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0].rstrip(".") if module.__doc__ else ""


def _entry(name: str, module: ModuleType, source: str, first: str) -> Entry | None:
    exported = getattr(module, "__all__", ())
    if not exported:
        return None
    make = getattr(module, exported[0])
    if first == "model":
        return Entry(name, "model", _summary(module), make, module, source) if hasattr(module, "example") else None
    parameters = list(inspect.signature(make).parameters) if callable(make) else []
    if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in _rest(make)):
        return None  # a base class that still needs something
    kinds: dict[str, Kind] = {"features": "family", "model": "attach"}
    kind = kinds.get(parameters[0]) if parameters else None
    return Entry(name, kind, _summary(module), make, module, source) if kind else None


def _rest(make: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(make).parameters.values())[1:] if callable(make) else []


def _read(package: str, group: str, first: str) -> tuple[dict[str, Entry], list[Broken]]:
    found: dict[str, Entry] = {}
    broken: list[Broken] = []
    candidates = [
        (info.name.rstrip("_").replace("_", "-"), f"{package}.{info.name}", "dgm")
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__)
    ]
    candidates += [(e.name, e.value, e.dist.name if e.dist else e.value) for e in entry_points(group=group)]
    for name, path, source in candidates:
        try:
            entry = _entry(name, importlib.import_module(path.split(":")[0]), source, first)
        except Exception as error:  # a plug-in may fail in any way; it must not take the zoo with it
            broken.append(Broken(name, source, f"{type(error).__name__}: {error}"))
            continue
        if entry is None:
            continue
        if name in found:
            raise OptionError(
                f"two packages offer {name!r}: {found[name].source} and {source}; uninstall one or rename it"
            )
        found[name] = entry
    return found, broken


def models() -> dict[str, Entry]:
    """The models by name.

    >>> "vae" in models()
    True
    """
    return _read("dgm.models", "dgm.models", "model")[0]


def families() -> dict[str, Entry]:
    """The guide families by name.

    >>> "diagonal-normal" in families()
    True
    """
    return {n: e for n, e in _read("dgm.guides", "dgm.guides", "features")[0].items() if e.kind == "family"}


def attachments() -> dict[str, Entry]:
    """The ways to attach a family, by name.

    >>> "amortized" in attachments()
    True
    """
    return {n: e for n, e in _read("dgm.guides", "dgm.guides", "features")[0].items() if e.kind == "attach"}


def broken() -> list[Broken]:
    """What could not be imported, and why."""
    return [item for package in ("dgm.models", "dgm.guides") for item in _read(package, package, "model")[1]]


def find(name: str, entries: dict[str, Entry], what: str) -> Entry:
    """The entry of a name, or an error that offers the nearest.

    Raises:
        OptionError: no such name.
    """
    key = name.replace("_", "-").lower()
    if key in entries:
        return entries[key]
    raise OptionError(f"unknown {what} {name!r}: {did_you_mean(key, entries)}")


__all__ = ["Broken", "Entry", "attachments", "broken", "families", "find", "models"]

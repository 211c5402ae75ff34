"""The zoo: the folders are the registry, and packages of others add to it by entry points.

A file of `dgm.models` offers the first class of its `__all__`; a file of `dgm.guides` offers a family where that
callable takes `features` first, a way to attach where it takes `model` first. Nothing else is written anywhere.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

from .errors import OptionError, did_you_mean

Kind = Literal["model", "family", "attach"]

MODELS, GUIDES = "dgm.models", "dgm.guides"
"""The folders, and the entry points of the same names."""


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
    """A file or plug-in that could not be imported, or whose name is another's; the rest works."""

    name: str
    source: str
    error: str


def _summary(module: ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0].rstrip(".") if (module.__doc__ or "").strip() else ""


def _entry(name: str, module: ModuleType, source: str, package: str, attribute: str | None = None) -> Entry | None:
    """What a module offers: the object of this name, or the first of its `__all__`; None where that is nothing."""
    exported: Sequence[str] = getattr(module, "__all__", ())
    if attribute is None and not exported:
        return None
    make = getattr(module, attribute or exported[0])
    if package == MODELS:
        return Entry(name, "model", _summary(module), make, module, source) if hasattr(module, "example") else None
    parameters = list(inspect.signature(make).parameters.values()) if callable(make) else []
    if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[1:]):
        return None  # a base class that still needs something
    kinds: dict[str, Kind] = {"features": "family", "model": "attach"}
    kind = kinds.get(parameters[0].name) if parameters else None
    return Entry(name, kind, _summary(module), make, module, source) if kind else None


def _read(package: str) -> tuple[dict[str, Entry], list[Broken]]:
    """What the folder and the plug-ins offer by name; a name that two of them claim belongs to neither."""
    own = [
        (_key(info.name.rstrip("_")), f"{package}.{info.name}", "dgm")
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__)
    ]
    points = [(_key(e.name), e.value, e.dist.name if e.dist else e.value) for e in entry_points(group=package)]
    plugins = sorted(points, key=lambda point: (point[0], point[2]))
    claimed: dict[str, list[str]] = {}
    for name, _, source in own + plugins:
        claimed.setdefault(name, []).append(source)
    found: dict[str, Entry] = {}
    broken = [
        Broken(name, " and ".join(sources), f"two packages offer {name!r}: uninstall one or rename it")
        for name, sources in claimed.items()
        if len(sources) > 1
    ]
    for name, path, source in own + plugins:
        if len(claimed[name]) > 1:
            continue
        try:
            entry = _offered(name, path, source, package)
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way; it must not take the zoo with it
            broken.append(Broken(name, source, first_line(error)))
            continue
        if entry is not None:
            found[name] = entry
    return found, broken


def _offered(name: str, path: str, source: str, package: str) -> Entry | None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        raise OptionError(f"its name is {name!r}, expected letters, digits, dot, minus and underscore")
    module, _, attribute = path.partition(":")
    entry = _entry(name, importlib.import_module(module), source, package, attribute.strip() or None)
    if entry is None and source != "dgm":
        what = "an `example()`" if package == MODELS else "a first parameter `features` or `model`, and others optional"
        raise OptionError(f"{path} offers nothing: expected {what}, of the object that the entry point names")
    return entry


def _key(name: str) -> str:
    return name.replace("_", "-").lower()


def first_line(error: BaseException) -> str:
    """Type and message of an error in one printable line.

    >>> first_line(ImportError("no sea\\nfar away"))
    'ImportError: no sea'
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = "".join(c if c.isprintable() else "?" for c in text)[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def models() -> dict[str, Entry]:
    """The models by name.

    >>> "vae" in models()
    True
    """
    return _read(MODELS)[0]


def families() -> dict[str, Entry]:
    """The guide families by name.

    >>> "diagonal-normal" in families()
    True
    """
    return {n: e for n, e in _read(GUIDES)[0].items() if e.kind == "family"}


def attachments() -> dict[str, Entry]:
    """The ways to attach a family, by name.

    >>> "amortized" in attachments()
    True
    """
    return {n: e for n, e in _read(GUIDES)[0].items() if e.kind == "attach"}


def broken() -> list[Broken]:
    """What could not be imported or is claimed twice, and why."""
    return [item for package in (MODELS, GUIDES) for item in _read(package)[1]]


def find(name: str, entries: dict[str, Entry], what: str) -> Entry:
    """The entry of a name, or an error that offers the nearest.

    Raises:
        OptionError: no such name, or one whose plug-in is broken.
    """
    key = _key(name)
    if key in entries:
        return entries[key]
    for item in broken():
        if item.name == key:
            raise OptionError(f"{what} {name!r} cannot be used ({item.source}): {item.error}")
    raise OptionError(f"unknown {what} {name!r}: {did_you_mean(key, entries)}")


__all__ = ["Broken", "Entry", "attachments", "broken", "families", "find", "first_line", "models"]

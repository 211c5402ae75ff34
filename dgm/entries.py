"""Guides as one names them, made into callables: families and ways to attach of the zoo, of a file, of Python."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from .errors import DGMError, GuideError, OptionError
from .programs import preserved_rng
from .registry import attachments, families, find
from .resolve import is_file, object_from_file, where_in_file

Guide = Callable[..., Any]
"""`(model, *batch) -> guide`."""


def guides_of(
    entries: Iterable[str | Callable[..., Any]],
    attach: str = "joint",
    options: Mapping[str, Any] | None = None,
    offers: Mapping[str, Any] | None = None,
) -> dict[str, Guide]:
    """Guides for `dgm.compare` by name.

    Args:
        entries: names of families, or of ways to attach (those are then the guide, with their default family); paths
            "file.py:name" of either; or either itself: a callable whose first parameter is `features` is a family, one
            whose first parameter is `model` makes a guide.
        attach: how families are attached.
        options: for the way to attach. offers: the same for whatever takes them, by the names of its parameters.

    Raises:
        OptionError: an unknown name, a callable that is neither, or two entries of one name. ModelError: see
            `dgm.resolve.object_from_file`.

    >>> from dgm.guides.diagonal_normal import DiagonalNormal
    >>> list(guides_of(["point", "laplace", DiagonalNormal]))
    ['point', 'laplace', 'DiagonalNormal']
    """
    way = find(attach, attachments(), "way to attach")
    found: dict[str, Guide] = {}
    for entry in entries:
        name = entry_name(entry)
        if name in found:
            raise OptionError(f"two guides are called {name!r}: give each its own name")
        found[name] = _guide(entry, way.make, way.name, dict(options or {}), dict(offers or {}))
    return found


def entry_name(entry: str | Callable[..., Any]) -> str:
    """What tables call an entry.

    >>> entry_name("point"), entry_name("tides.py:Skewed"), entry_name(partial(int, "3"))
    ('point', 'Skewed', 'int')
    """
    if isinstance(entry, str):
        return entry.rpartition(":")[2] if is_file(entry) else entry
    while isinstance(entry, partial):
        entry = entry.func
    return getattr(entry, "__name__", type(entry).__name__)


def _guide(entry: Any, way: Guide, way_name: str, options: dict[str, Any], offers: dict[str, Any]) -> Guide:
    if isinstance(entry, str) and is_file(entry):
        made = FromFile(entry, way, way_name, options, offers)
        made.resolved()  # whatever is wrong with the file is said now
        return made
    if isinstance(entry, str):
        known = families()
        zoo = find(entry, {**attachments(), **known}, "guide family")
        kind, thing = ("family" if zoo.name in known else "guide"), zoo.make
        return _attached(thing, kind, way, way_name, options, offers)  # type: ignore[arg-type]
    return _attached(*_own(entry, entry_name(entry)), way, way_name, options, offers)


def _attached(
    thing: Any,
    kind: Literal["family", "guide"],
    way: Guide,
    way_name: str,
    options: dict[str, Any],
    offers: dict[str, Any],
) -> Guide:
    if kind == "guide":
        taken = {name: value for name, value in {**options, **offers}.items() if _takes(thing, name)}
        return partial(thing, **taken) if taken else thing
    if not _takes(way, "family"):
        raise OptionError(
            f"{way_name!r} attaches no family, it is a guide by itself: name it among the guides, and leave attach at "
            "'joint' for families"
        )
    return partial(way, family=thing, **options, **{n: v for n, v in offers.items() if _takes(way, n)})


@dataclass(frozen=True)
class FromFile:
    """A guide of a file, imported anew in every process: a worker needs nothing of the file but its path."""

    spec: str
    way: Guide
    way_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    offers: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self) -> Guide:
        thing, kind = _own(object_from_file(self.spec, "guide"), entry_name(self.spec), self.spec)
        return _attached(thing, kind, self.way, self.way_name, dict(self.options), dict(self.offers))

    def __call__(self, model: Any, *batch: Any) -> Any:
        return self.resolved()(model, *batch)


def _own(thing: Any, name: str, spec: str | None = None) -> tuple[Any, Literal["family", "guide"]]:
    """A user's object and what it is; a family gets checked whenever it is used."""
    try:
        parameters = list(inspect.signature(thing).parameters)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name} is {thing!r}, expected a family or a way to attach") from error
    first = parameters[0] if parameters else None
    if first == "features":
        return checked(thing, name, spec), "family"
    if first == "model":
        return thing, "guide"
    told = f"its first parameter is {first!r}" if first else "it has no parameters"
    raise OptionError(
        f"{name} is no guide: {told}. Expected a family `{name}(features, context=0)`, or `{name}(model, *batch)` that "
        "returns a guide"
    )


def checked(family: Callable[..., nn.Module], name: str, spec: str | None = None) -> Callable[..., nn.Module]:
    """A family of a user's own that says by name what is wrong with it, at the sizes that it is used with.

    Raises, when it is called:
        GuideError: it cannot be made or run, or gives something else than a density on R^d with a pathwise gradient.

    >>> from dgm.guides.point import Point
    >>> checked(Point, "Point")(3)().event_shape
    torch.Size([3])
    """

    @functools.wraps(family, updated=())
    def make(features: int, context: int = 0, **options: Any) -> nn.Module:
        where = f"{name}(features={features}" + (f", context={context})" if context else ")")
        try:
            module = family(features, context=context, **options) if context else family(features, **options)
        except DGMError:
            raise
        except Exception as error:  # the user's own code may fail in any way
            raise GuideError(f"{where} cannot be made: {where_in_file(error, spec)}") from error
        if not isinstance(module, nn.Module):
            raise GuideError(f"{where} is a {type(module).__name__}, expected a torch module")
        _check_density(module, features, context, where, spec)
        return module

    return make


def _check_density(module: nn.Module, features: int, context: int, where: str, spec: str | None) -> None:
    like = next(module.parameters(), torch.zeros(()))
    try:
        with preserved_rng(0), torch.no_grad():
            q = module(like.new_zeros(2, context)) if context else module()
            has_rsample = bool(getattr(q, "has_rsample", False))
            shapes = tuple(q.batch_shape), tuple(q.event_shape)
    except Exception as error:  # the user's own code may fail in any way
        told = where_in_file(error, spec)
        raise GuideError(f"{where} cannot be run{' on a context' if context else ''}: {told}") from error
    if not has_rsample:
        raise GuideError(f"{where} gives a {type(q).__name__} without rsample: it has no pathwise gradient")
    expected = ((2,) if context else ()), (features,)
    if shapes != expected:
        raise GuideError(
            f"{where} gives batch shape {shapes[0]} and event shape {shapes[1]}, expected {expected[0]} and "
            f"{expected[1]}: is the distribution to be made one of vectors by dist.Independent(..., 1)?"
        )


def _takes(thing: Any, name: str) -> bool:
    return name in inspect.signature(thing).parameters


__all__ = ["FromFile", "Guide", "checked", "entry_name", "guides_of"]

"""How a run is made again, as its folder says: words and numbers of known kinds, checked before anything uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import DataError

__all__ = ["checked_recipe"]

LONGEST, LARGEST = 4096, 10**7
"""Of a name, and of a number of units: more is no recipe, and would only fill the memory."""


def _text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST and not any(c < " " or c == "\x7f" for c in value)


def _text_or_none(value: Any) -> bool:
    return value is None or _text(value)


def _seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 100 and all(_size(item) for item in value)


def _split(value: Any) -> bool:
    return _seed(value) or _text(value)


def _options(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(
        _text(k) and (isinstance(v, bool) or _size(v) or isinstance(v, float) or _sizes(v)) for k, v in value.items()
    )


TEXT, SEED = "text", "a whole number from 0 to 2**63 - 1"
SOURCE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_text, TEXT),
    "data": (_text, TEXT),
    "data_dir": (_text_or_none, "text or null"),
    "split": (_split, "a whole number or text"),
    "target": (_text_or_none, "text or null"),
    "data_seed": (_seed, SEED),
    "binarize": (_text_or_none, "text or null"),
}
RECIPE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "guide": (_text, TEXT),
    "attach": (_text, TEXT),
    "seed": (_seed, SEED),
    "encoder": (_sizes, "a list of widths"),
    "options": (_options, "names with numbers or lists of widths"),
    "rows": (_text, TEXT),
}


def checked_recipe(spec: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The recipe itself.

    Raises:
        DataError: a part is missing, unknown, or not what it must be; the message names it.

    >>> checked_recipe({"source": {}}, Path("run.json"))
    Traceback (most recent call last):
    dgm.errors.DataError: run.json is damaged: source.model is missing
    """
    source = spec.get("source")
    if not isinstance(source, dict):
        raise DataError(f"{where} is damaged: source is {_shown(source)}, expected model and data")
    for known, values, prefix in ((SOURCE, source, "source."), (RECIPE, spec, "")):
        for name, (good, expected) in known.items():
            if name not in values:
                raise DataError(f"{where} is damaged: {prefix}{name} is missing")
            if not good(values[name]):
                raise DataError(f"{where} is damaged: {prefix}{name} is {_shown(values[name])}, expected {expected}")
    if unknown := sorted(set(source) - set(SOURCE)):
        raise DataError(f"{where} is damaged, or of a newer dgm: source.{_shown(unknown[0])} is unknown")
    return dict(spec)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."

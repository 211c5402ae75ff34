"""Symptoms of the field's known mistakes: one file for each, found by being in this folder.

A symptom has `look(case) -> Iterator[Finding]`; its first docstring line says what it sees. `case` is a
`dgm.case.Case`: what is missing there (no training, because the checks refused the pair) raises `NotSeen`, and the
symptom is then listed as not checked.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

from ..findings import Finding

__all__ = ["Look", "symptoms"]

Look = Callable[[Any], Iterator[Finding]]


def symptoms() -> dict[str, Look]:
    """Every symptom of this folder by name.

    >>> "likelihood scale" in symptoms()
    True
    """
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return {name.replace("_", " "): importlib.import_module(f".{name}", __name__).look for name in names}

"""Suites by name: a file of `benchmarks/` with a `SUITE`, an entry point of another package, or a file of one's own."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path

from .bench_cells import Suite
from .errors import ModelError, OptionError, did_you_mean
from .resolve import _imported, is_file

__all__ = ["find_suite", "suites"]

PACKAGE = "dgm.benchmarks"  # by name: the core does not know the suites


def suites() -> dict[str, tuple[str, str]]:
    """Suites that there are: name -> (module, first line of its file). Nothing is imported.

    >>> "exact" in suites()
    True
    """
    found: dict[str, tuple[str, str]] = {}
    for folder in importlib.import_module(PACKAGE).__path__:
        for info in pkgutil.iter_modules([folder]):
            source = (Path(folder) / f"{info.name}.py").read_text(encoding="utf-8")
            if "SUITE" in source and (first := _declared(ast.parse(source))) is not None:
                found[info.name.replace("_", "-")] = (f"{PACKAGE}.{info.name}", first)
    for point in entry_points(group="dgm.suites"):
        if point.name in found:
            raise OptionError(f"two packages offer the suite {point.name!r}: uninstall one or rename it")
        found[point.name] = (point.value, f"of {point.dist.name if point.dist else point.value}")
    return dict(sorted(found.items()))


def _declared(tree: ast.Module) -> str | None:
    """The first line of a file that declares a suite."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "SUITE" for t in targets):
            return (ast.get_docstring(tree) or "").partition("\n")[0]
    return None


def find_suite(name: str) -> Suite:
    """A suite by its name, or by the path of a file with a `SUITE`.

    Raises:
        OptionError: no such name. ModelError: a file that cannot be imported, or has no suite.
    """
    if is_file(name):
        file = Path(name).expanduser()
        if not file.is_file():
            raise OptionError(f"no file {name!r} with a suite")
        module = _imported(file.resolve())
    else:
        known = suites()
        key = name.replace("_", "-").lower()
        if key not in known:
            raise OptionError(f"no suite {name!r}: {did_you_mean(key, known)}")
        try:
            module = importlib.import_module(known[key][0].partition(":")[0])
        except Exception as error:  # code of others may fail in any way
            raise ModelError(f"suite {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    suite = getattr(module, "SUITE", None)
    if not isinstance(suite, Suite):
        raise ModelError(f"{name} has no SUITE: expected `SUITE = Suite(...)` of dgm.bench_cells")
    return suite

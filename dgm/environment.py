"""What dgm runs on: versions, threads, compiler, GPU, optional packages, folders; what is wrong, and the cure.

Nothing of it is imported into this process: a broken torch or torchvision is a line, not a traceback.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from . import __version__
from .machine import Fact, compiler, machine, places
from .probes import compiles, import_errors, plugin_errors, torch_facts

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Environment", "Fact", "environment"]

COMPANIONS = ("arviz", "jax", "laplace-torch", "lightning", "pytorch-lightning", "torchmetrics", "torchvision")
"""Often installed beside dgm, which needs none of them, and often broken by an update of torch."""
STOLEN = {
    ("lightning", "2.6.2"),
    ("lightning", "2.6.3"),
    ("pytorch-lightning", "2.6.2"),
    ("pytorch-lightning", "2.6.3"),
}
"""Releases that steal credentials (GHSA-w37p-236h-pfx3): they are never imported here."""
MODULES = {"pyro-ppl": "pyro", "scikit-learn": "sklearn", "laplace-torch": "laplace"}


@dataclass(frozen=True)
class Environment:
    """Facts about an installation and its machine; `str` is what `dgm doctor` prints."""

    facts: tuple[Fact, ...]

    @property
    def problems(self) -> tuple[Fact, ...]:
        """The facts with something wrong."""
        return tuple(fact for fact in self.facts if fact.problem)

    def frame(self) -> pd.DataFrame:
        """One row for each fact: part, name, value, problem, cure."""
        import pandas as pd

        return pd.DataFrame([asdict(fact) for fact in self.facts], columns=["part", "name", "value", "problem", "cure"])

    def __str__(self) -> str:
        lines: list[str] = []
        width, part = max((len(fact.name) for fact in self.facts), default=0), ""
        for fact in self.facts:
            if fact.part != part:
                part = fact.part
                lines += ["", part] if lines else [part]
            mark = "!" if fact.problem else " "
            lines.append(f"{mark} {fact.name.ljust(width)}  {fact.value}".rstrip())
        lines += ["", f"found {len(self.problems) or 'nothing'} to mend" + ("" if not self.problems else ":")]
        for i, fact in enumerate(self.problems, 1):
            lines += [f"{i}. {fact.name}: {fact.problem}", f"   cure: {fact.cure}"]
        return "\n".join(lines)


def environment(*, thorough: bool = False) -> Environment:
    """What dgm runs on, and what is wrong with it.

    Packages, plug-ins and the compiler are tried in processes of their own, with time limits.

    Args:
        thorough: also compile a small function with torch's compiler, which takes up to some minutes.

    >>> print(Environment((Fact("versions", "python", "3.11.9"),)))
    versions
      python  3.11.9
    <BLANKLINE>
    found nothing to mend
    """
    needed = _requirements()
    beside = [name for name in _beside(needed) if (name, _version(name)) not in STOLEN]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        torch_ = pool.submit(torch_facts)
        imports = pool.submit(import_errors, [_module(name) for name in needed], 120.0)
        others = {name: pool.submit(import_errors, [_module(name)]) for name in beside}
        plugins = pool.submit(plugin_errors)
        compiled = pool.submit(compiles) if thorough else None
        facts = [
            *_versions(needed, imports.result()),
            *_optional({name: job.result()[_module(name)] for name, job in others.items()}, _beside(needed)),
            *_plugins(plugins.result(), torch_.result().get("error")),
            *machine(torch_.result()),
            *compiler(compiled.result() if compiled else None),
            *places(),
        ]
    return Environment(tuple(facts))


# ------------------------------------------------------------------------------------------------- packages


def _requirements() -> dict[str, str]:
    """What dgm needs: package and versions, as its own metadata say."""
    try:
        lines = requires("dgm") or []
    except PackageNotFoundError:
        lines = []
    found = {}
    for line in lines:
        what, _, marker = line.partition(";")
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(.*)", what)
        if match and "extra" not in marker:
            found[match.group(1)] = match.group(2).strip(" ()")
    return found


def _module(name: str) -> str:
    return {**MODULES, "pytest-xdist": "xdist"}.get(name, name.replace("-", "_"))


def _beside(needed: dict[str, str]) -> list[str]:
    """Optional packages that are installed: of dgm's extras, and companions."""
    extras = [re.match(r"[A-Za-z0-9._-]+", line) for line in _extra_lines()]
    names = sorted({match.group() for match in extras if match} | set(COMPANIONS))
    return [name for name in names if name not in needed and _present(name)]


def _extra_lines() -> list[str]:
    try:
        return [line for line in requires("dgm") or [] if "extra" in line and "bench" in line]
    except PackageNotFoundError:
        return []


def _present(name: str) -> bool:
    try:
        return importlib.util.find_spec(_module(name)) is not None or bool(_version(name))
    except (ImportError, ValueError):
        return True


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # metadata may be damaged in any way
        return ""


def _satisfied(found: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    try:
        return not found or SpecifierSet(wanted).contains(found, prereleases=True)
    except ValueError:
        return True


def _versions(needed: dict[str, str], errors: dict[str, str]) -> Iterator[Fact]:
    yield Fact("versions", "python", f"{platform.python_version()}  {sys.executable}")
    yield Fact("versions", "dgm", __version__)
    if not needed:
        problem = "the metadata of dgm are missing, so that its packages are not known"
        yield Fact("versions", "metadata", "none", problem, "pip install dgm, or pip install -e . in its checkout")
    for name, wanted in needed.items():
        found, error = _version(name), errors.get(_module(name), "")
        problem = f"cannot be imported: {error}" if error else ""
        if not problem and not _satisfied(found, wanted):
            problem = f"is {found}, and dgm needs {wanted}"
        yield Fact("versions", name, found or "unknown", problem, f"pip install '{name}{wanted}'" if problem else "")


def _optional(errors: dict[str, str], names: list[str]) -> Iterator[Fact]:
    for name in names:
        found = _version(name)
        if (name, found) in STOLEN:
            cure = f"pip uninstall {name}, and change every credential that this machine could read"
            yield Fact("optional packages", name, found, "this release steals credentials: GHSA-w37p-236h-pfx3", cure)
            continue
        error = errors[name]
        cure = f"pip install --upgrade {name}, or uninstall it: the rest of dgm works without it"
        if error and name in ("torchvision", "torchmetrics"):
            cure = "install the torchvision of the build that torch is of (CPU or CUDA), or uninstall it"
        problem = f"is broken: {error}" if error else ""
        yield Fact("optional packages", name, found or "unknown", problem, cure if error else "")
    if not names:
        yield Fact("optional packages", "none", "")


def _plugins(errors: list[tuple[str, str, str]], torch_error: str | None = None) -> Iterator[Fact]:
    if torch_error:  # then none of them works, and torch's own line says why
        yield Fact("plug-ins", "models, guides", f"not known: {torch_error}")
        return
    for name, source, error in errors:
        yield Fact("plug-ins", name, source, f"{error} ({source})", f"update or uninstall {source}; the rest works")
    if not errors:
        yield Fact("plug-ins", "models, guides", "all can be used")

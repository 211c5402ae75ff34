"""What the documentation shows is run: every doctest, and every Python block of the README in its order."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def modules() -> list[str]:
    names = ["dgm"]
    for package in ("dgm", "dgm.models", "dgm.guides"):
        path = importlib.import_module(package).__path__
        names += [f"{package}.{info.name}" for info in pkgutil.iter_modules(path)]
    return sorted({name for name in names if not name.endswith("__main__")})


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    # an example may call a guide as a plain program, and Pyro then keeps its parameters
    with pyro.get_param_store().scope(), torch.random.fork_rng(), contextlib.redirect_stdout(out):
        torch.manual_seed(0)
        result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0, out.getvalue()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if README.exists() else []


@pytest.mark.skipif(not blocks(), reason="no Python in README.md")
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace: dict[str, Any] = {"__name__": "readme"}
    with pyro.get_param_store().scope(), torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()):
        for number, block in enumerate(blocks(), 1):
            exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)

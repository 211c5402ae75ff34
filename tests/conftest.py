"""Shared by every test: one thread, and no test may leave global state changed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from matplotlib.figure import Figure
from torch.distributions import Distribution

import dgm.guides.flow  # noqa: F401  (imports zuko, which switches argument validation off, and switches it on again)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """All that is imported to collect the tests lives to the end: looking through it again was a tenth of a run."""
    gc.disable()
    result = yield
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
    return result


def _global_state() -> dict[str, object]:
    return {
        "Pyro's parameter store": sorted(pyro.get_param_store().keys()),
        "Pyro's settings": dict(pyro.settings.get()),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's argument validation": Distribution._validate_args,
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(autouse=True)
def unpolluted() -> Iterator[None]:
    """Fail the test that leaves parameters, settings or flags behind, and clean up for the next one."""
    before = _global_state()
    torch.manual_seed(0)  # a start that is drawn without a seed is the same in any order of the tests
    yield
    after = _global_state()
    pyro.clear_param_store()
    for name, value in before["Pyro's settings"].items():  # type: ignore[attr-defined]
        if pyro.settings.get(name) != value:
            pyro.settings.set(**{name: value})
    torch.set_default_dtype(before["torch's default dtype"])  # type: ignore[arg-type]
    Distribution.set_default_validate_args(bool(before["torch's argument validation"]))
    torch.set_grad_enabled(bool(before["torch's gradient mode"]))
    torch.use_deterministic_algorithms(bool(before["torch's deterministic mode"]))
    for what, was in before.items():
        assert after[what] == was, f"the test changed {what}: {was} became {after[what]}"


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not rendered: for tests of what is said and written beside them."""

    def blank(self: Figure, target: Any, *, format: str, **kwargs: Any) -> None:
        if format == "svg":
            target.write('<svg width="1pt"></svg>')
        else:
            Path(target).write_bytes(b"")

    monkeypatch.setattr(Figure, "savefig", blank)

"""The table of which guide goes with what says what running them shows, and the README shows that table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pyro
import pytest
import torch
from pyro.nn import PyroModule
from test_cli import run
from torch import Tensor, nn

from dgm import compatibility as module
from dgm.compatibility import COLUMNS, compatibility, cost_of, to_markdown
from dgm.errors import GuideError, OptionError
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.point import Point
from dgm.registry import Entry, attachments, families

README = Path(__file__).parent.parent / "README.md"
SOME = ["diagonal-normal", "point", "amortized", "discrete", "free", "global", "joint"]


@pytest.fixture(scope="module")
def table() -> Iterator[pd.DataFrame]:
    state = torch.get_rng_state()
    made = compatibility(SOME).set_index("guide")
    assert torch.equal(state, torch.get_rng_state())  # at once: each test starts from a seed of its own
    yield made


def test_what_is_known_of_some(table: pd.DataFrame) -> None:
    assert sorted(table.index) == sorted(SOME) and list(table.columns) == list(COLUMNS[1:])
    expected = {
        "diagonal-normal": ["family", "yes", "yes", "–", "yes", "yes", "yes", "20"],
        "point": ["family", "yes", "yes", "–", "yes", "yes", "–", "10"],
        "amortized": ["attach", "–", "yes", "–", "yes", "yes", "yes", "2,580"],  # two heads of 10 (128 + 1)
        "discrete": ["attach", "–", "–", "yes", "–", "–", "yes", "1,290"],
        "free": ["attach", "–", "yes", "–", "yes", "yes", "yes", "20 a row"],
        "global": ["attach", "yes", "–", "–", "yes", "yes", "yes", "20"],
        "joint": ["attach", "yes", "yes", "yes", "global, local", "global, local", "yes", "20"],
    }
    for name, cells in expected.items():
        assert table.loc[name].tolist()[:-1] == cells, name


def entry(make: Any, kind: Any) -> Entry:
    return Entry("made", kind, "", make, ModuleType("made"), "test")


def row(monkeypatch: pytest.MonkeyPatch, make: Any, kind: str) -> dict[str, str]:
    known = families() if kind == "family" else attachments()
    monkeypatch.setattr(module, "families" if kind == "family" else "attachments", lambda: known | {"made": one})
    one = entry(make, kind)
    return dict(compatibility(["made"]).iloc[0])


class Branching(DiagonalNormal):
    """Decides by a value: no graph. A draw costs a look."""

    def forward(self, context: Tensor | None = None) -> Any:
        if float(self.loc.bias.detach().sum()) > 1e9:
            raise RuntimeError
        return super().forward(context)


class Alone(DiagonalNormal):
    """Traces, and has no batching rule."""

    def forward(self, context: Tensor | None = None) -> Any:
        torch.zeros(self.features).copy_(self.loc.bias)  # vmap refuses to write a stack into one vector
        return super().forward(context)


class OneFeature(Point):
    def __init__(self, features: int, context: int = 0) -> None:
        if context:
            raise GuideError("not with a context")
        super().__init__(features, context)


def test_cells_are_found_by_running(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(monkeypatch, Branching, "family")
    assert (found["traces"], found["replicas"], found["density"], found["a draw costs"]) == ("–", "–", "yes", "a look")
    found = row(monkeypatch, Alone, "family")
    assert (found["traces"], found["replicas"]) == ("yes", "–")
    found = row(monkeypatch, OneFeature, "family")
    assert (found["global"], found["local"], found["density"]) == ("yes", "–", "–")


class Raises(PyroModule):
    def __init__(self, model: Callable[..., Any], *batch: Any):
        raise NotImplementedError("of a plug-in")


class Finished(PyroModule):
    """Has a density once it is finished, and nothing to train."""

    def __init__(self, model: Callable[..., Any], *batch: Any):
        super().__init__()
        self.done = False
        self.names = [n for n in ("w",) if isinstance(model, nn.Module) is False]

    @property
    def has_density(self) -> bool:
        return self.done

    def finish(self, model: Any, *data: Any, seed: int = 0) -> None:
        self.done = True

    def forward(self, *batch: Any) -> None:
        pyro.sample("w", pyro.distributions.Normal(torch.zeros(10), 1.0).to_event(1))


def test_ways_of_others_are_coped_with(monkeypatch: pytest.MonkeyPatch) -> None:
    found = row(monkeypatch, Raises, "attach")
    assert {found[column] for column in ("global", "local", "discrete", "traces", "parameters")} == {"–"}
    found = row(monkeypatch, Finished, "attach")
    assert (found["traces"], found["replicas"], found["density"], found["parameters"]) == ("–", "–", "yes", "0")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It has d parameters; a draw costs d^2 (dense).", "d^2 (dense)"),
        ("Each draw takes one component. A sample costs\n    two passes: so it is.", "two passes"),
        ("Cost of a draw: one look-up.", "one look-up"),
        ("Nothing is said.", "one pass"),
    ],
)
def test_the_cost_is_what_the_docstring_says(text: str, said: str) -> None:
    def make(model: Any) -> None: ...

    make.__doc__ = text
    assert cost_of(make) == said
    make.draw_costs = "by its own word"  # type: ignore[attr-defined]
    assert cost_of(make) == "by its own word"


def test_markdown_and_unknown_names(table: pd.DataFrame) -> None:
    lines = to_markdown(table.reset_index()).splitlines()
    assert len(lines) == 2 + len(SOME) and {line.count("|") for line in lines} == {len(COLUMNS) + 1}
    with pytest.raises(OptionError, match="no guide 'pint'"):
        compatibility(["pint"])


def test_the_command_prints_it(monkeypatch: pytest.MonkeyPatch, table: pd.DataFrame) -> None:
    monkeypatch.setattr(module, "compatibility", lambda: table.reset_index())
    assert run("list", "compatibility").strip() == to_markdown(table.reset_index())


@pytest.mark.slow
def test_readme_shows_the_table() -> None:
    shown = re.search(r"<!-- compatibility -->\n(.*?)\n<!-- /compatibility -->", README.read_text(), re.DOTALL)
    assert shown, "README.md has no table between <!-- compatibility --> and <!-- /compatibility -->"
    assert shown.group(1).strip() == to_markdown(compatibility()), "paste what `dgm list compatibility` prints"

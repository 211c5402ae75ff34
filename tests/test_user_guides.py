"""Guides of one's own: from a file by the command line, or given to `attached` in Python; and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from test_cli import refused, run
from torch import Tensor, nn

import dgm
from dgm.entries import FromFile, guides_of
from dgm.errors import GuideError, ModelError, OptionError
from dgm.guides import attached
from dgm.guides.amortized import Amortized
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import linear, mlp
from dgm.guides.flow import zuko
from dgm.guides.full_normal import FullNormal
from dgm.models import linear_vae
from dgm.testing import check_family, check_pair

SKEWED = '''
import pyro.distributions as dist
from torch import nn

from dgm.guides.heads import Head


class Skewed(nn.Module):
    """q(z | c) = prod_i AsymmetricLaplace(z_i; loc_i, scale_i, asymmetry_i): sharp, with two different tails."""

    def __init__(self, features, context=0):
        super().__init__()
        self.head = Head(3 * features, context)         # numbers, or linear in the encoder's output

    def forward(self, context=None):
        loc, log_scale, log_asymmetry = self.head(context).chunk(3, -1)
        return dist.AsymmetricLaplace(loc, log_scale.exp(), log_asymmetry.exp()).to_event(1)
'''

MORE = """
import torch
from functools import partial
from dgm.guides.joint import Joint
from dgm.guides.full_normal import FullNormal

narrow = partial(Skewed)

def by_hand(model, *batch, encoder=None):
    return Joint(model, *batch, family=FullNormal, encoder=encoder)

class Flat(Skewed):
    def forward(self, context=None):
        return super().forward(context).base_dist

class Typo(Skewed):
    def forward(self, context=None):
        return self.haed(context)

def guide(x):
    pass

class Counts(Skewed):
    def forward(self, context=None):
        return dist.Poisson(self.head(context)[..., :1].exp()).to_event(1)

class NoContext(nn.Module):
    def __init__(self, features):
        super().__init__()

def number(features, context=0):
    return 3

value = 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user: a family in a file, and a table."""
    monkeypatch.chdir(tmp_path)
    Path("skewed.py").write_text(SKEWED + MORE)
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(40, 3)), columns=["a", "b", "c"])
    frame.to_csv("tides.csv", index=False)
    return tmp_path


WORDS = ("--model", "linear-vae", "--data", "tides.csv")
SHORT = ("--seeds", 1, "--epochs", 1, "--samples", 100)


def test_the_example_is_a_family_of_the_contracts_and_traces() -> None:
    assert len(SKEWED.strip().splitlines()) < 20
    space: dict[str, Any] = {}
    exec(SKEWED, space)
    check_family(space["Skewed"])
    model, batch = linear_vae.example()
    guide = Amortized(model, *batch, family=space["Skewed"], encoder=mlp(8))
    svi = dgm.SVI(model, guide, partial(torch.optim.Adam, lr=1e-2), compile="trace")
    svi.step(*batch)
    assert svi.kind == "trace" and svi.fallback is None
    check_pair(model, guide, *batch, log_evidence=model.log_evidence(*batch).detach())


def test_compare_takes_families_and_guides_of_a_file(here: Path) -> None:
    guides = "diagonal-normal,skewed.py:Skewed,skewed.py:by_hand,amortized"
    output = run("compare", *WORDS, "--guide", guides, *SHORT, "--jobs", 1, "--out", "out")
    rows = pd.read_parquet("out/rows.parquet").set_index("guide")
    assert list(rows.index) == ["diagonal-normal", "Skewed", "by_hand", "amortized"]
    assert (rows["status"] == "ok").all() and all(name in output for name in rows.index)
    assert rows["bound"]["amortized"] == pytest.approx(rows["bound"]["diagonal-normal"]), "its default family"
    assert rows["bound"].nunique() == 3


@pytest.mark.slow
def test_workers_import_the_file_anew(here: Path) -> None:
    frames = []
    for jobs in (1, 2):
        words = ("--guides", "skewed.py:Skewed,skewed.py:by_hand", *SHORT, "--jobs", jobs, "--out", f"out{jobs}")
        run("compare", *WORDS, *words)
        frames.append(pd.read_parquet(f"out{jobs}/rows.parquet").set_index("guide")["bound"])
    np.testing.assert_allclose(frames[0], frames[1], rtol=1e-5)


def test_inspect_counts_their_parameters(here: Path) -> None:
    output = run("inspect", *WORDS, "--guide", "skewed.py:Skewed,diagonal-normal")
    counts = {w[1]: int(w[2].replace(",", "")) for line in output.splitlines() if (w := line.split())[:1] == ["guide"]}
    assert counts["Skewed"] - counts["diagonal-normal"] == 2 * (64 + 1), "one more head for two latents"


def test_a_trained_pair_is_taken_up_again_where_the_file_is_named(here: Path) -> None:
    output = run("train", *WORDS, "--guide", "skewed.py:Skewed", "--epochs", 1, "--out", "run")
    assert "LinearVAE on tides.csv with Skewed" in output
    told = refused("evaluate", "run", "--samples", 50)
    assert "this run's guide is in a file: give it by --guide skewed.py:Skewed if you trust it" in told
    assert "with Skewed, 8 held-out rows" in run("evaluate", "run", "--samples", 50, "--guide", "skewed.py:Skewed")
    run("sample", "run", "--guide", "skewed.py:Skewed", "--n", 4)
    assert len(pd.read_csv("run/samples.csv")) == 4
    os.remove("skewed.py")
    assert "no guide file" in refused("evaluate", "run", "--guide", "skewed.py:Skewed")


@pytest.mark.parametrize(
    ("guide", "told"),
    [
        ("skewed.py:Skewd", "has no 'Skewd': did you mean 'Skewed'?"),
        ("skewd.py:Skewed", "no guide file 'skewd.py'; did you mean 'skewed.py'?"),
        ("skewed.py", "which object of skewed.py?"),
        ("skewed.py:value", "is of type int, expected a class or a function"),
        ("skewed.py:guide", "guide is no guide: its first parameter is 'x'"),
        ("amortised", "unknown guide family 'amortised': did you mean 'amortized'"),
        ("point,point", "two guides are called 'point'"),
        ("skewed.py:Flat", "event shape (), expected (2,) and (2,): is the distribution to be made one of vectors"),
        ("skewed.py:Typo", "Typo(features=2, context=64) cannot be run on a context: AttributeError"),
        ("skewed.py:Counts", "without rsample: it has no pathwise gradient"),
        ("skewed.py:NoContext", "NoContext(features=2, context=64) cannot be made: TypeError"),
        ("skewed.py:number", "is a int, expected a torch module"),
    ],
)
def test_bad_guides_are_refused_by_name(here: Path, guide: str, told: str) -> None:
    assert told in refused("inspect", *WORDS, "--guide", guide)


def test_an_error_in_a_file_names_its_line(here: Path) -> None:
    line = 1 + (SKEWED + MORE).splitlines().index("        return self.haed(context)")
    assert f"(line {line})" in refused("inspect", *WORDS, "--guide", "skewed.py:Typo")


def test_ways_to_attach_that_take_no_family_are_guides_by_themselves(here: Path) -> None:
    with pytest.raises(OptionError, match="'discrete' attaches no family"):
        attached(["point"], attach="discrete")
    assert "'discrete' attaches no family" in refused("inspect", *WORDS, "--attach", "discrete")


def own(model: Any, *batch: Any) -> Amortized:
    return Amortized(model, *batch, encoder=linear())


class Wide(nn.Module):
    """A standard normal with a scale."""

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.ones(features))

    def forward(self, context: Tensor | None = None) -> Any:
        scale = self.log_scale.exp()
        scale = scale if context is None else scale.expand(*context.shape[:-1], -1)
        return dist.Normal(0.0, scale).to_event(1)


def test_python_takes_names_families_partials_and_guides() -> None:
    flow = partial(zuko.flows.NICE, hidden_features=(8,))
    guides = attached(["diagonal-normal", "joint", FullNormal, Wide, flow, own, "free"], encoder=mlp(5))
    assert list(guides) == ["diagonal-normal", "joint", "FullNormal", "Wide", "NICE", "own", "free"]
    model, batch = linear_vae.example()
    made = {name: make(model, *batch) for name, make in guides.items()}
    assert made["joint"].local_data.encoder.out_features == 5, "options reach guides that take them"
    assert type(made["own"]) is Amortized and type(made["Wide"].local_data.family) is Wide
    for name, guide in made.items():
        svi = dgm.SVI(model, guide, partial(torch.optim.Adam, lr=1e-2), compile=False)
        assert isinstance(svi.step(*batch), float), name


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lambda x: None, "<lambda> is no guide: its first parameter is 'x'"),
        (lambda: None, "<lambda> is no guide: it has no parameters"),
        (3, "int is 3, expected a family"),
    ],
)
def test_other_objects_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        attached([entry])


def test_options_that_a_way_does_not_take_are_not_dropped() -> None:
    model, batch = linear_vae.example()
    with pytest.raises(TypeError, match="hidden"):
        attached(["point"], attach="amortized", hidden=3)["point"](model, *batch)


def test_a_file_is_read_when_a_guide_of_it_is_made(here: Path) -> None:
    (guide,) = guides_of(["skewed.py:Skewed"], "amortized", offers={"encoder": mlp(3)}).values()
    assert isinstance(guide, FromFile)
    model, batch = linear_vae.example()
    assert type(guide(model, *batch).family).__name__ == "Skewed"
    with pytest.raises(ModelError, match="no guide file"):
        guides_of(["other.py:Skewed"])


def broken(features: int, context: int = 0) -> nn.Module:
    raise GuideError("needs an even number of features")


def test_errors_of_dgm_pass_through() -> None:
    model, batch = linear_vae.example()
    make: Callable[..., Any] = attached([broken])["broken"]
    with pytest.raises(GuideError, match="needs an even"):
        make(model, *batch)
    assert type(attached([DiagonalNormal])["DiagonalNormal"](model, *batch).local_data.family) is DiagonalNormal

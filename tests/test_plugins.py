"""Models and guides of other packages: what they may offer, and that a bad one takes nothing with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dgm import cli, registry
from dgm.entries import guides_of
from dgm.errors import OptionError

FAMILY = '''"""Flat tails."""
from dgm.guides.student_t import StudentT as Flat
__all__ = ["Flat"]
'''
MODEL = '''"""The sea."""
import torch
from dgm.models.vae import VAE as Sea
from dgm.models.vae import example
__all__ = ["Sea"]
'''


class Site:
    """A folder on the path, with distributions as pip leaves them."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(self, package: str, module: str, code: str, **entry_points: str) -> None:
        (self.folder / f"{module}.py").write_text(code)
        info = self.folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"[dgm.{group}]\n{line}" for group, line in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def listed() -> str:
    result = CliRunner().invoke(cli.app, ["list", "all"])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_plug_in_is_listed_and_used(site: Site) -> None:
    site.install("dgm-flat", "flat", FAMILY, guides="Flat_Tails = flat:Flat")
    site.install("dgm-sea", "sea", MODEL, models="sea = sea")
    assert "Flat tails (dgm-flat)" in listed() and "The sea (dgm-sea)" in listed()
    assert registry.broken() == []
    (make,) = guides_of(["flat-tails"]).values()
    model, batch = registry.models()["sea"].module.example()
    assert isinstance(make(model, *batch), torch.nn.Module)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("raise RuntimeError('one\\ntwo')", "RuntimeError: one (dgm-bad)"),
        ("x = = 1", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("class Bad: pass", "AttributeError"),
        ("Flat = 3", "offers nothing: expected a first parameter `features` or `model`"),
        ("def Flat(features, must): pass", "offers nothing"),
        ("raise ValueError('\\x1b[2Jgone')", "ValueError: ?[2Jgone"),
    ],
)
def test_a_broken_plug_in_is_named_and_the_rest_works(code: str, told: str, site: Site) -> None:
    site.install("dgm-bad", "bad_plug_in", code, guides="bad-tails = bad_plug_in:Flat")
    site.install("dgm-flat", "flat", FAMILY, guides="flat-tails = flat")
    (item,) = registry.broken()
    assert (item.name, item.source) == ("bad-tails", "dgm-bad") and "\n" not in item.error
    output = listed()
    line = next(line for line in output.splitlines() if line.split()[:1] == ["bad-tails"])
    assert "cannot be used" in line and told in line and line.endswith("(dgm-bad)")
    assert "flat-tails" in output and "full-normal" in output and list(guides_of(["flat-tails", "full-normal"]))
    with pytest.raises(OptionError, match=r"guide family 'bad-tails' cannot be used \(dgm-bad\): "):
        guides_of(["bad-tails"])


def test_two_plug_ins_of_one_name_are_refused_and_both_are_named(site: Site) -> None:
    site.install("dgm-flat", "flat", FAMILY, guides="flat-tails = flat")
    site.install("dgm-flatter", "flatter", FAMILY, guides="Flat_Tails = flatter")
    told = r"'flat-tails' cannot be used \(dgm-flat and dgm-flatter\): two packages offer 'flat-tails': uninstall one"
    with pytest.raises(OptionError, match=told):
        guides_of(["flat-tails"])
    assert "flat-tails" not in registry.families() and list(guides_of(["point"]))
    assert "two packages offer 'flat-tails'" in listed()


def test_a_plug_in_takes_no_name_of_ours(site: Site) -> None:
    site.install("dgm-evil", "evil", FAMILY, guides="full_normal = evil")
    site.install("dgm-sea", "sea", MODEL, models="VAE = sea")
    for name in ("full-normal", "full_normal"):
        with pytest.raises(OptionError, match=r"\(dgm and dgm-evil\): two packages offer 'full-normal'"):
            guides_of([name])
    with pytest.raises(OptionError, match=r"\(dgm and dgm-sea\): two packages offer 'vae'"):
        registry.find("vae", registry.models(), "model")
    assert "evil" not in sys.modules  # it is not even imported
    assert list(guides_of(["diagonal-normal"])) and "bnn" in registry.models()


@pytest.mark.parametrize("name", ["../up", "a b", "<b>", "x" * 65])
def test_a_name_that_is_no_name(name: str, site: Site) -> None:
    site.install("dgm-odd", "odd", FAMILY, guides=f"{name} = odd")
    (item,) = registry.broken()
    assert "expected letters, digits" in item.error and "odd" not in sys.modules

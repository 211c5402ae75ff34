"""The command line, run in this process; what it prints, writes, refuses, and the codes it leaves with."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from typer.testing import CliRunner

import dgm
from dgm import cli, commands, datasets, fit, resolve, store_run
from dgm.commands import Source, task
from dgm.errors import DataError, ModelError, OptionError
from dgm.guides import DEFAULT, attached
from dgm.models.likelihoods import Normal
from dgm.models.vae import VAE

cells = importlib.import_module("dgm.cells")

OWN = """
import pyro, torch
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import nn

class Tides(PyroModule):
    def __init__(self, features=3):
        super().__init__()
        self.decoder = nn.Linear(3, features)

    def forward(self, h):
        s = pyro.sample("s", dist.LogNormal(-1.0, 0.5))
        with pyro.plate("data", len(h)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            a = pyro.sample("a", dist.Gamma(2.0, 2.0))
            mean = self.decoder(torch.cat([z, a[..., None]], -1))
            pyro.sample("h", dist.Normal(mean, s).to_event(1), obs=h)

class Needs(Tides):
    def __init__(self, features):
        super().__init__(features)

def make():
    return Needs(3)

ready = make()

def program(h):
    m = pyro.param("m", torch.zeros(3))
    with pyro.plate("data", len(h)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("h", dist.Normal(m + z[:, None], 1.0).to_event(1), obs=h)

def branching(h):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    width = s if float(s.detach()) < 100.0 else 100.0
    with pyro.plate("data", len(h)):
        pyro.sample("h", dist.Normal(torch.zeros(3), width).to_event(1), obs=h)

number = 3

def broken():
    raise RuntimeError("no sea")
"""


def run(*args: object, code: int = 0) -> str:
    """The output of a command, which must leave with this code and leave nothing in Pyro's store."""
    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    assert not isinstance(result.exception, Exception), result.exception
    assert len(list(pyro.get_param_store().keys())) == 0
    return result.output


def refused(*args: object) -> str:
    output = run(*args, code=2)
    assert output.startswith("error: ") and "Traceback" not in output
    return output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a user: a model in a file, a table, and a damaged table."""
    monkeypatch.chdir(tmp_path)
    Path("tides.py").write_text(OWN)
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 3)), columns=["a", "b", "c"])
    frame.to_csv("tides.csv", index=False)
    frame.loc[7, "b"] = np.nan
    frame.to_csv("damaged.csv", index=False)
    return tmp_path


# ------------------------------------------------------------------------------------------------ words


def test_help_waits_for_nothing() -> None:
    code = """
import sys
from typer.testing import CliRunner
from dgm import cli
commands = "compare train evaluate sample doctor list inspect".split()
for words in (["--help"], ["--version"], *([command, "--help"] for command in commands)):
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, (words, result.output)
    print(result.output)
print("HEAVY", [m for m in ("torch", "pyro", "pandas", "numpy", "matplotlib", "dgm.commands") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    for words in ("Which guide for my model?", "[default: vae]", "[default: 5000", dgm.__version__):
        assert words in done.stdout


def test_help_names_the_families_that_are_compared() -> None:
    assert tuple(cli.FAMILIES.split(",")) == DEFAULT


def test_functions_win_over_the_modules_of_their_names() -> None:
    for name in ("fit", "evaluate", "compare"):  # dgm.commands has imported the modules
        assert getattr(dgm, name) is getattr(importlib.import_module(f"dgm.{name}"), name)


def test_list_says_everything_in_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    output = run("list")
    for name in ("vae", "bnn", *DEFAULT, "joint", "free", *datasets.names()):
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in output.splitlines()), name
    assert "digits" not in run("list", "models") and "vae" not in run("list", "data")
    assert "expected models" in refused("list", "model")
    monkeypatch.setattr(
        commands.registry, "broken", lambda: [commands.registry.Broken("sea", "dgm-sea", "ImportError: x")]
    )
    assert "cannot be used: ImportError: x (dgm-sea)" in run("list", "models")


def test_inspect_names_latents_observed_plates_and_parameters() -> None:
    output = run("inspect", "--guides", "diagonal-normal")
    for words in (
        "z  (8,)  real  local",
        "x  (1437, 64)  Bernoulli",
        "data  1437",
        "model VAE",
        "guide diagonal-normal",
    ):
        assert words in output
    output = run("inspect", "--model", "bnn", "--data", "breast-cancer", "--guides", "point")
    assert "network.2.weight  (2, 50)   real  global" in output and "y  (455,)  Categorical" in output


# ------------------------------------------------------------------------------------------------ results


def test_the_smallest_comparison_writes_everything(here: Path) -> None:
    output = run("compare", "--smoke", "--out", "out")
    assert output.splitlines()[0].startswith("VAE on digits: 1437 train, 360 test rows; 2 guides x 1 seed = 2 runs")
    assert "difference to best" in output and "rows: out/rows.parquet" in output and "page: out/report.html" in output
    rows = pd.read_parquet("out/rows.parquet")
    assert list(rows["guide"]) == ["diagonal-normal", "full-normal"] and (rows["status"] == "ok").all()
    assert "<html" in Path("out/report.html").read_text() and {"rows.csv", "k-hat.png"} <= set(os.listdir("out"))
    assert "holds results already" in refused("compare", "--smoke", "--out", "out")


@pytest.mark.usefixtures("blank_pictures")
def test_a_model_of_ones_own_with_every_kind_of_latent(here: Path) -> None:
    families = "diagonal-normal,full-normal,coupling-spline-flow,point"
    words = ("--model", "tides.py:Tides", "--data", "tides.csv", "--guides", families, "--attach", "joint")
    output = run("compare", *words, "--seeds", 1, "--epochs", 1, "--samples", 100, "--jobs", 1)
    assert output.startswith("Tides on tides.csv: 48 train, 12 test rows; 4 guides")
    (folder,) = Path("dgm-runs").iterdir()
    assert folder.name.startswith("Tides-tides.csv-")
    assert (pd.read_csv(folder / "rows.csv")["status"] == "ok").all()


@pytest.mark.slow
def test_workers_need_nothing_of_a_file_but_its_path(here: Path) -> None:
    words = ("--model", "tides.py:Tides", "--data", "tides.csv", "--guides", "diagonal-normal,full-normal")
    frames = []
    for jobs in (1, 2):
        run("compare", *words, "--seeds", 2, "--epochs", 2, "--samples", 100, "--jobs", jobs, "--out", f"out{jobs}")
        frames.append(pd.read_parquet(f"out{jobs}/rows.parquet").set_index(["guide", "seed"])["bound"])
    np.testing.assert_allclose(frames[0], frames[1], rtol=1e-5)


def test_makers_can_be_sent_to_a_process_that_never_saw_the_file(here: Path) -> None:
    make, _ = resolve.model_of(f"{here}/tides.py:Tides", resolve.data_of("tides.csv"))
    sent = bytes(ForkingPickler.dumps(make))
    (name,) = [n for n, m in sys.modules.items() if getattr(m, "__file__", None) == f"{here.resolve()}/tides.py"]
    del sys.modules[name]
    before = torch.get_rng_state()
    again = ForkingPickler.loads(sent)
    assert type(again()).__name__ == "Tides"
    starts = []
    for forget in (True, False):  # the file draws when it is imported: that may not move the start of a model
        if forget:
            del sys.modules[name]
        with torch.random.fork_rng():
            torch.manual_seed(1)
            starts.append(again().decoder.weight)
    assert torch.equal(*starts)
    torch.set_rng_state(before)


@pytest.mark.usefixtures("blank_pictures")
def test_a_failed_guide_is_told_and_the_rest_is_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cells.fit, []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # the full normal
            raise RuntimeError("lightning")
        return real(*args, **options)

    monkeypatch.setattr(cells, "fit", failing)
    words = (
        "--model",
        "bnn",
        "--data",
        "gap",
        "--guides",
        "diagonal-normal,full-normal",
        "--epochs",
        1,
        "--samples",
        100,
    )
    output = run("compare", *words, "--seeds", 1, "--jobs", 1, "--out", "out", code=1)
    assert "lightning" in output and len(pd.read_csv("out/rows.csv")) == 2


@pytest.mark.usefixtures("blank_pictures")
def test_an_interrupted_comparison_writes_what_was_finished(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = cells.fit, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(cells, "fit", interrupted)
    words = ("compare", "--model", "bnn", "--data", "gap", "--epochs", 1, "--samples", 100, "--jobs", 1)
    output = run(*words, "--guides", "diagonal-normal,point", "--seeds", 2, "--out", "out", code=130)
    assert "interrupted: 2 of 4 runs" in output  # all seeds of a guide are trained at once
    assert list(pd.read_csv("out/rows.csv")["guide"]) == ["diagonal-normal"] * 2
    monkeypatch.setattr(cells, "fit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert "nothing was finished" in run(*words, "--out", "none", code=130)
    assert not Path("none").exists()


# ------------------------------------------------------------------------------------------- a trained pair


@pytest.mark.usefixtures("blank_pictures")
def test_thorough_is_asked_of_the_evaluation(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("train", "--model", "linear-vae", "--epochs", 1, "--out", "run")
    asked: list[dict[str, Any]] = []

    def seen(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return dgm.evaluate(*args, **{**options, "thorough": False})

    monkeypatch.setattr("dgm.commands_run.evaluate", seen)
    run("evaluate", "run", "--samples", 100, "--thorough")
    run("evaluate", "run", "--samples", 100)
    assert [options["thorough"] for options in asked] == [True, False]
    assert all(len(options["train"][0]) == 1437 for options in asked)


def test_train_evaluate_sample(here: Path) -> None:
    output = run("train", "--epochs", 1, "--guide", "diagonal-normal", "--out", "run")
    assert (
        output.startswith("VAE on digits with diagonal-normal: 1 epoch") and "elbo" in output and "run: run" in output
    )
    said = run("evaluate", "run", "--samples", 100)
    assert "bound on log p(x), K = 100, 360 rows" in said and "log p(x) is at least" in said and "k-hat of 360" in said
    page = (Path("run") / "evaluation.html").read_text()
    assert "The importance weights" in page and "The worst rows" in page  # verdicts, and images of the data set
    assert "page: other.html" in run("evaluate", "run", "--samples", 100, "--out", "other.html")
    run("sample", "run", "--n", 5)
    assert Path("run/samples.png").read_bytes().startswith(b"\x89PNG")
    run("sample", "run", "--n", 5, "--out", "new/x.csv", "--pixels")
    assert set(np.unique(pd.read_csv("new/x.csv"))) == {0, 1} and pd.read_csv("new/x.csv").shape == (5, 64)
    content = json.loads(Path("run/run.json").read_text())
    content["format"] = 99
    Path("run/run.json").write_text(json.dumps(content))
    assert "use that version or newer" in refused("evaluate", "run")


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_without_steps_is_written_and_taken_up(here: Path) -> None:
    Path("short.py").write_text(
        "from functools import partial\nfrom dgm.guides.nuts import NUTS\n"
        "sampled = partial(NUTS, draws=8, warmup=4, depth=2, chains=1)\n"
    )
    own = ("--guide", "short.py:sampled")
    output = run("train", "--model", "bayesian-linear-regression", "--data", "gap", *own, "--out", "run")
    assert "steps: 0" in output and "note: NUTS: 1 chain of 8 draws" in output
    assert "note: NUTS: 1 chain of 8 draws" in run("evaluate", "run", *own, "--samples", 100)
    run("sample", "run", *own, "--n", 2)
    assert len(pd.read_csv("run/samples.csv")) == 200


@pytest.mark.usefixtures("blank_pictures")
def test_a_training_cut_short_is_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("train", "--model", "bnn", "--data", "gap", "--guide", "laplace", "--epochs", 2)
    for name, error, code, told in (
        ("stopped", KeyboardInterrupt, 130, "interrupted: what was trained is written"),
        ("refused", ZeroDivisionError, 1, "Laplace.finish failed after training"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("dgm.guides.laplace.precision", lambda *_, error=error: (_ for _ in ()).throw(error))
            assert told in run(*words, "--out", name, code=code)
        assert "note: Laplace: not finished, it is still a point" in run("evaluate", name, "--samples", 100)
    run(*words, "--out", "whole")
    assert "note: Laplace (full)" in run("evaluate", "whole", "--samples", 100)
    assert "directions have negative curvature" in run(
        "compare", *words[1:], "--seeds", 1, "--jobs", 1, "--samples", 100
    )


def test_predictions_stand_on_the_scale_of_the_target(here: Path) -> None:
    run("train", "--model", "bnn", "--data", "diabetes", "--guide", "point", "--epochs", 60, "--out", "run")
    run("sample", "run", "--n", 3)
    frame = pd.read_csv("run/samples.csv")
    assert list(frame) == ["y", "mean", "sd", "draw_1", "draw_2", "draw_3"] and len(frame) == 89
    assert frame["y"].between(24.9, 346.1).all()
    assert (frame["y"] - frame["mean"]).abs().mean() < 0.9 * (frame["y"] - frame["y"].mean()).abs().mean()


@pytest.mark.usefixtures("blank_pictures")
def test_a_file_named_by_a_run_is_not_run(here: Path) -> None:
    run("train", "--model", "tides.py:program", "--data", "tides.csv", "--epochs", 1, "--out", "run")
    assert "--model tides.py:program if you trust it" in refused("evaluate", "run")
    own = ("--model", "tides.py:program")
    assert "12 rows" in run("evaluate", "run", *own, "--samples", 100)
    run("sample", "run", *own, "--n", 4)
    assert list(pd.read_csv("run/samples.csv")) == ["h_0", "h_1", "h_2"] and len(pd.read_csv("run/samples.csv")) == 4
    assert "holds no images" in refused("sample", "run", *own, "--out", "x.png")
    assert "not of this" in refused("evaluate", "run", "--model", "tides.py:Tides")
    frame = pd.read_csv("tides.csv")
    (frame + 1).to_csv("tides.csv", index=False)
    assert "not those" in refused("evaluate", "run", *own)


@pytest.mark.parametrize("family", DEFAULT)
@pytest.mark.parametrize("model, data", [("vae", "gap"), ("bnn", "gap")])
def test_a_pair_comes_back_bit_for_bit(family: str, model: str, data: str, tmp_path: Path) -> None:
    job = task(Source(model, data), saved={"encoder": [8], "options": {"latent": 2, "hidden": (8,)}})
    make = job.guides([family], "joint")[family]
    result = fit(*job.pair(make, 1), job.data.train, steps=3, batch_size=None)
    before = dgm.evaluate(result.model, result.guide, job.data.test, num_samples=100).per_datum
    store_run.save_run(tmp_path / "run", {"any": "json"}, result)
    assert sorted(os.listdir(tmp_path / "run")) == ["history.csv", "run.json", "weights.safetensors"]
    saved = store_run.load_run(tmp_path / "run")
    assert saved.spec == {"any": "json"} and len(saved.history) == len(result.history)
    fresh = job.pair(make, 2)  # another start: nothing of it may be left
    after = dgm.evaluate(*saved.restore(*fresh, *job.data.train), job.data.test, num_samples=100).per_datum
    pd.testing.assert_frame_equal(before, after, check_exact=True)


def test_a_damaged_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no run\.json"):
        store_run.load_run(tmp_path)
    result = fit(*_pair("diagonal-normal"), torch.zeros(20, 2), steps=1, batch_size=None)
    store_run.save_run(tmp_path / "run", {}, result)
    for name, content in (
        ("run.json", b"{"),
        ("weights.safetensors", b"cos\nsystem\n(S'touch x'\ntR."),
        ("history.csv", b""),
    ):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        (tmp_path / name / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            store_run.load_run(tmp_path / name)
    with pytest.raises(ModelError, match="was the model or the guide changed"):
        store_run.load_run(tmp_path / "run").restore(*_pair("full-normal"), torch.zeros(20, 2))
    with pytest.raises(OptionError, match="cannot write"):
        store_run.save_run(tmp_path / "run" / "run.json" / "sub", {}, result)


def _pair(family: str) -> tuple[Any, Any]:
    model = VAE(2, latent=2, hidden=(4,), likelihood=Normal())
    return model, attached([family])[family](model, torch.zeros(20, 2))


# ------------------------------------------------------------------------------------------- how steps run


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("word, engine", [("eager", "eager"), ("trace", "trace")])
def test_a_run_says_and_keeps_how_its_steps_ran(word: str, engine: str, here: Path) -> None:
    words = ("--model", "bnn", "--data", "gap", "--guide", "point", "--epochs", 4, "--compile", word, "--out", "run")
    assert f"steps: 4    ran: {engine}\n" in run("train", *words)
    saved = store_run.load_run("run")
    assert (saved.spec["compile"], saved.about["engine"]) == (word, engine)
    assert "200 rows" in run("evaluate", "run", "--samples", 100)


@pytest.mark.usefixtures("blank_pictures")
def test_a_comparison_trains_and_keeps_how_it_was_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, told = cells.fit, []

    def recorded(*args: Any, **options: Any) -> Any:
        told.append(options["compile"])
        return real(*args, **options)

    monkeypatch.setattr(cells, "fit", recorded)
    words = ("--model", "bnn", "--data", "gap", "--guides", "diagonal-normal,point", "--epochs", 1, "--samples", 100)
    output = run("compare", *words, "--seeds", 1, "--jobs", 1, "--compile", "eager", "--out", "out")
    assert told == [False, False] and "[1/2] diagonal-normal" in output and "[2/2] point" in output
    page = Path("out/report.html").read_text()
    assert "<dt>compile</dt><dd>eager</dd>" in page


def test_what_the_library_logs_is_shown_while_a_command_runs(here: Path) -> None:
    log, root = logging.getLogger("dgm"), logging.getLogger()
    before = log.level, list(log.handlers), root.level, list(root.handlers)
    words = ("--model", "tides.py:branching", "--data", "tides.csv", "--guide", "diagonal-normal", "--attach", "global")
    output = run("train", *words, "--epochs", 4, "--compile", "trace", "--out", "run")
    (line,) = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert "stays eager" in line and "ran: eager (" in output
    assert (log.level, log.handlers, root.level, root.handlers) == before


def test_a_record_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("dgm")
    with commands.log_lines():
        log.debug("nobody asked")
        log.info("step %d: compiling", 210)
        log.warning("two\n  lines")
    log.info("after")
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[:2] == ["step 210: compiling", "warning: two lines"]
    assert "after" not in err and "nobody" not in err


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "words, told",
    [
        (("--model", "bn"), "unknown model 'bn': did you mean 'bnn'?"),
        (("--data", "digit"), "did you mean 'digits'?"),
        (("--guides", "full-norml"), "did you mean 'full-normal'"),
        (("--guides", ","), "no guide family is named"),
        (("--attach", "joit"), "did you mean 'joint'?"),
        (("--lr", "-1", "--search-lr"), "lr is -1.0"),
        (("--lr", "nan"), "lr is nan"),
        (("--batch-size", "5000"), "batch_size=5000 is larger than the data (1437 rows)"),
        (("--split", "gap"), "split of 'digits' must be"),
        (("--binarize", "onse"), "did you mean 'once'"),
        (("--target", "y"), "is for files"),
        (("--compile", "fast"), "compile is 'fast', expected auto, trace, inductor or eager\n"),
        (("--data", "tide.csv"), "did you mean 'tides.csv'"),
        (("--data", "damaged.csv"), "column 'b' (1) of x has 1 NaN (row 7)"),
        (("--data", "tides.csv", "--split", "2"), "is for named data"),
        (("--data", "tides.csv", "--target", "d"), "no column 'd' to predict"),
        (("--model", "bnn", "--data", "tides.csv"), "'tides.csv' has no y"),
        (("--model", "tide.py:Tides"), "did you mean 'tides.py'?"),
        (("--model", "tides.py:Tide"), "did you mean 'Tides'?"),
        (("--model", "tides.py"), "which object of tides.py?"),
        (("--model", "tides.py:Needs"), "class Needs needs features"),
        (("--model", "tides.py:number"), "is of type int"),
        (("--model", "tides.py:broken"), "RuntimeError: no sea (line "),
        (("--model", "wrong.py:x"), "SyntaxError"),
        (("--out", "tides.csv/out"), "cannot write to tides.csv/out"),
        (("--out", "tides.csv"), "cannot write to tides.csv"),
    ],
)
def test_bad_input_is_an_error_before_training(words: tuple[str, ...], told: str, here: Path) -> None:
    Path("wrong.py").write_text("x = = 1\n")
    before = sorted(os.listdir())
    assert told in refused("compare", *words)
    assert sorted(set(os.listdir()) - {"__pycache__"}) == before


def test_a_wrong_way_to_run_is_refused_before_the_data_are_looked_for(here: Path) -> None:
    told = refused("train", "--compile", "False", "--data", "tide.csv")
    assert told == "error: compile is 'False', expected auto, trace, inductor or eager\n"


def test_grey_pixels_are_refused_before_training_by_a_model_of_bits(here: Path) -> None:
    Path("bits.py").write_text("from dgm.models import vae\nmake = lambda: vae.VAE(64, latent=2)\n")
    assert "binarize='batch'" in refused("compare", "--model", "bits.py:make", "--binarize", "none")


@pytest.mark.parametrize(
    "words", [("--epochs", "0"), ("--jobs", "0"), ("--samples", "99"), ("--seeds", "x"), ("--lrr", "1")]
)
def test_bad_usage_is_code_2(words: tuple[str, ...]) -> None:
    assert "Error" in run("compare", *words, code=2)


# --------------------------------------------------------------------------------------------- model and data


def test_models_are_made_for_their_data() -> None:
    make, data = resolve.model_of("vae", datasets.load("digits", binarize="none"), latent=3, hidden=(5,))
    assert type(make().likelihood).__name__ == "Normal" and make().image_shape == (8, 8)
    make, _ = resolve.model_of("vae", datasets.load("digits"))
    assert type(make().likelihood).__name__ == "Bernoulli"
    make, data = resolve.model_of("bnn", datasets.load("digits"), hidden=(7,))
    assert data.kind == "classification" and make()(data.test[0])["logits"].shape == (360, 10)
    _, data = resolve.model_of("vae", datasets.load("diabetes"))
    assert len(data.train) == len(data.test) == 1 and "left out" in data.note
    with pytest.raises(OptionError, match="is for zoo models"):
        resolve.model_of("tides.py:Tides", data, latent=2)


def test_a_network_starts_anew_with_each_seed() -> None:
    make, _ = resolve.model_of("bnn", datasets.load("gap"))
    starts = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            starts.append(make().init_values()["network.0.weight"])
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("name", ["Tides", "make", "ready", "program"])
def test_what_a_file_may_offer(name: str, here: Path) -> None:
    make, data = resolve.model_of(f"tides.py:{name}", resolve.data_of("tides.csv"))
    assert "z" in dgm.latents(make(), *data.train)
    assert (make() is make()) == (name == "program")


def test_a_reader_that_leaves_stops_nothing() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        os.close(read)
        lasting = cli._Lasting(stream)
        for _ in range(3):
            lasting.write("a line\n")
            lasting.flush()
        assert lasting.fileno() == stream.fileno()


# ------------------------------------------------------------------------------------------ folders and machine

TINY = ("--model", "bnn", "--data", "gap", "--epochs", 1)
COMPARED = (*TINY, "--guides", "point", "--seeds", 1, "--samples", 100, "--jobs", 1, "--compile", "eager")


@pytest.mark.usefixtures("blank_pictures")
def test_a_comparison_goes_on_in_its_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = (*COMPARED[:-6], "--samples", 100, "--jobs", 1, "--compile", "eager", "--guides", "point,diagonal-normal")
    real = cells.fit

    def interrupted(model: Any, guide: Any, *data: Any, **options: Any) -> Any:
        if "diagonal" in repr(guide).lower():
            raise KeyboardInterrupt
        return real(model, guide, *data, **options)

    monkeypatch.setattr(cells, "fit", interrupted)
    assert "--resume --out out" in run("compare", *both, "--out", "out", code=130)
    monkeypatch.setattr(cells, "fit", real)
    assert "holds results already" in refused("compare", *both, "--out", "out")
    assert "does not continue: epochs is 1 there and 2 here" in run(
        "compare", *both, "--epochs", 2, "--out", "out", "--resume", code=2
    )
    output = run("compare", *both, "--out", "out", "--resume")
    assert "[2/2] diagonal-normal" in output and "[1/" not in output  # the other one is not made again
    assert list(pd.read_csv("out/rows.csv")["guide"]) == ["point", "diagonal-normal"]
    Path("out/rows.parquet").unlink()  # as a killed process leaves it
    assert "was cut short: go on with it by --resume" in refused("compare", *both, "--out", "out")
    assert "give it by --out" in refused("compare", *both, "--resume")
    assert "nothing to go on with" in refused("compare", *both, "--resume", "--out", "new")
    assert not Path("new").exists()


def test_two_runs_in_one_folder_are_refused(here: Path) -> None:
    held = (
        "import sys, time; from dgm.lock import locked\nwith locked('out'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            for words in (("compare", *COMPARED), ("train", *TINY, "--guide", "point")):
                assert f"in use by process {other.pid}" in refused(*words, "--out", "out")
        finally:
            other.kill()


@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_disk_that_fills_is_told_in_one_line(command: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = COMPARED if command == "compare" else (*TINY, "--guide", "point")
    output = run(command, *words, "--out", "out", code=2)
    assert "No space left on device" in output.splitlines()[-1] and "Traceback" not in output
    assert not list(Path("out").glob("**/.*.part")) if Path("out").exists() else True


def test_a_folder_that_is_read_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    Path("out").mkdir()
    monkeypatch.setattr(importlib.import_module("dgm.store").tempfile, "TemporaryFile", closed)
    assert "cannot write to out: Permission denied; give another folder" in refused(
        "compare", *COMPARED, "--out", "out"
    )


@pytest.mark.parametrize("seed", ["-1", "true", "1.5", "1e3", "99999999999999999999"])
@pytest.mark.parametrize("option", ["--seed", "--data-seed"])
def test_a_seed_that_is_none_is_bad_usage(option: str, seed: str, here: Path) -> None:
    words = ("train", "--model", "vae", "--data", "tides.csv", "--epochs", 1, "--guide", "point", "--out", "out")
    output = run(*words, option, seed, code=2)
    assert "Traceback" not in output and not Path("out").exists()


def test_names_from_files_command_no_terminal() -> None:
    class Stream:
        text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

    stream = Stream()
    assert cli._Lasting(stream).write("a\x1b[2J\x07\x9b1m ±\tb\r\n") == 15
    assert stream.text == "a?[2J??1m ±\tb\r\n"

"""Files from elsewhere run no code and write nothing outside of their folder; no name in them can do harm."""

from __future__ import annotations

import ast
import configparser
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import dgm
from dgm import cli, store_run
from dgm.errors import DataError, DGMError, OptionError
from dgm.evaluation_page import render
from dgm.files import from_file
from dgm.guides.amortized import Amortized
from dgm.models.linear_vae import LinearVAE
from dgm.page import write_text
from dgm.recipe import checked_recipe
from dgm.registry import models
from dgm.store import write_whole
from dgm.verdicts import Verdict

ROOT = Path(__file__).parents[1]
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)> & \"q\" $x$ _1"


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path) -> bytes:
    import pickle

    return pickle.dumps(Payload(marker))


def run(*words: object) -> str:
    """What a command says that must refuse: code 2, one line, no traceback."""
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert not isinstance(result.exception, Exception), result.exception
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    out = tmp_path_factory.mktemp("run") / "run"
    words = ["train", "--model", "bnn", "--data", "gap", "--guide", "point", "--epochs", "1", "--out", str(out)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    copy = tmp_path / "run"
    copy.mkdir()
    for file in trained.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


# ------------------------------------------------------------------------------------------------ no code is run


def test_the_payload_is_one(tmp_path: Path) -> None:
    import pickle

    pickle.loads(pickled(tmp_path / "ran"))
    assert (tmp_path / "ran").exists()  # else the tests below would prove nothing


def test_a_pickle_in_place_of_weights_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    torch.save({"w": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    for content in (pickled(tmp_path / "ran"), (tmp_path / "evil.pt").read_bytes()):
        (folder / "weights.safetensors").write_bytes(content)
        assert "damaged" in run("evaluate", folder)
        recipe = json.loads((folder / "run.json").read_text())
        recipe.pop("weights", None)  # a run of the first version has no checksum that would speak before
        (folder / "run.json").write_text(json.dumps(recipe))
        assert "damaged" in run("evaluate", folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("ending", [".pt", ".npz", ".csv"])
def test_data_files_run_nothing(ending: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "ran", tmp_path / f"data{ending}"
    contents = [pickled(marker)]
    torch.save({"x": Payload(marker)}, tmp_path / "t")
    np.savez(tmp_path / "n.npz", x=np.array([Payload(marker), 1], dtype=object))
    with tarfile.open(tmp_path / "tar", "w") as archive:  # the oldest format of torch
        member = tarfile.TarInfo("../storages")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    contents += [(tmp_path / name).read_bytes() for name in ("t", "n.npz", "tar")]
    with zipfile.ZipFile(tmp_path / "z", "w") as archive_:
        archive_.writestr("../../up.npy", pickled(marker))
        archive_.writestr("x.npy", pickled(marker))
    contents.append((tmp_path / "z").read_bytes())
    before = sorted(os.listdir(tmp_path.parent))
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(DGMError) as caught:
            from_file(file)
        assert "allow_pickle" not in str(caught.value) and "weights_only" not in str(caught.value)  # no bad advice
    assert not marker.exists() and sorted(os.listdir(tmp_path.parent)) == before


def test_a_parquet_file_with_a_python_type_runs_nothing(tmp_path: Path) -> None:
    field = pa.field(
        "x",
        pa.int64(),
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": pickled(tmp_path / "ran"),
        },
    )
    pq.write_table(pa.table([pa.array([1, 2])], schema=pa.schema([field])), tmp_path / "rows.parquet")
    pd.read_parquet(tmp_path / "rows.parquet")
    assert not (tmp_path / "ran").exists()


def test_formulas_in_cells_are_text(tmp_path: Path) -> None:
    file = tmp_path / "cells.csv"
    file.write_text("a,=1+1,b\n1,2,=cmd|'/c calc'!A0\n2,3,@SUM(1)\n3,4,-x\n4,5,+y\n5,6,=z\n6,7,=z\n")
    with pytest.raises(DataError):
        from_file(file)
    data = from_file(file, target="b", kind="classification")
    assert data.num_classes == 5 and all(isinstance(t, torch.Tensor) for t in data.train)


@pytest.mark.parametrize(
    "name", ["../../evil.py:Model", "os.system", "os:system", "evil.py", "dgm.cli:app", "a\0b.py:M"]
)
@pytest.mark.parametrize("role", ["model", "guide"])
def test_a_run_names_no_code(name: str, role: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(folder)
    for place in (folder / "evil.py", tmp_path.parent / "evil.py", folder / "a"):
        place.write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass Model: pass\n")
    recipe = json.loads((folder / "run.json").read_text())
    (recipe["spec"]["source"] if role == "model" else recipe["spec"])[role] = name
    (folder / "run.json").write_text(json.dumps(recipe))
    for command in ("evaluate", "sample"):
        run(command, folder)
    assert not (tmp_path / "ran").exists()
    (tmp_path.parent / "evil.py").unlink()


NONSENSE: list[Any] = [
    None,
    -1,
    True,
    1e300,
    "",
    "x",
    "a\nb",
    "\0",
    [],
    {},
    ["x"],
    [0],
    [10**9],
    {"a": "b"},
    "y" * 9999,
]


def test_a_recipe_of_nonsense_is_named_part_by_part(trained: Path) -> None:
    spec = json.loads((trained / "run.json").read_text())["spec"]
    assert checked_recipe(spec, Path("run.json")) == spec
    refused = 0
    for name in ("guide", "attach", "seed", "encoder", "options", "rows"):
        for value in NONSENSE:
            if (name in ("guide", "attach", "rows") and value == "x") or (name in ("encoder", "options") and not value):
                continue
            if name == "options" and value == {"a": "b"}:
                continue
            refused += _refused({**spec, name: value}, name)
    for name in ("model", "data", "data_seed"):
        for value in NONSENSE:
            if name != "data_seed" and value == "x":
                continue
            refused += _refused({**spec, "source": {**spec["source"], name: value}}, f"source.{name}")
    refused += _refused({**spec, "source": {**spec["source"], "os": 1}}, "source.'os'")
    refused += _refused({k: v for k, v in spec.items() if k != "rows"}, "rows is missing")
    assert refused > 100


def _refused(spec: Any, told: str) -> int:
    try:
        checked_recipe(spec, Path("run.json"))
    except DataError as error:
        assert told in str(error) and len(str(error)) < 300, (told, str(error))
        return 1
    expected = spec.get("encoder") == [] or spec.get("options") == {}
    assert expected, (told, spec)
    return 0


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", "[" * 100_000, '{"format": 1}', '{"format": 99, "spec": {}, "about": {}}']
)
def test_a_foreign_recipe_is_refused(text: str, folder: Path) -> None:
    (folder / "run.json").write_text(text)
    with pytest.raises(DataError, match=r"damaged|written by dgm"):
        store_run.load_run(folder)


# ------------------------------------------------------------------------------- nothing outside of the folder


@pytest.mark.parametrize("write", ["page", "file"])
def test_links_are_replaced_and_not_followed(write: str, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    inside = tmp_path / "run"
    inside.mkdir()
    for name in ("f", f".f.{os.getpid()}.tmp", f".f.{os.getpid()}.part"):
        (inside / name).symlink_to(precious)
    if write == "page":
        write_text("new", inside / "f")
    else:
        write_whole(inside / "f", lambda part: part.write_text("new"))
    assert precious.read_text() == "kept"
    assert (inside / "f").read_text() == "new" and not (inside / "f").is_symlink()


def test_results_of_a_run_stay_in_its_folder(folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    for name in ("samples.csv", "samples.png", "evaluation.html"):
        (folder / name).symlink_to(precious)
    for words in (["sample"], ["evaluate", "--samples", "100"]):
        result = CliRunner().invoke(cli.app, [words[0], str(folder), *words[1:]])
        assert result.exit_code == 0, result.output
    assert precious.read_text() == "kept"


LONG = "x" * 5000
NAMES = ["../../up", "a\0b", "a\nb", LONG, f"{LONG}.csv", f"{LONG}.py:M", "\udcff.csv", "", " ", "..", "/",
         "/etc/passwd", "\0.csv", "os.system", "../evil.py:Model", ":", ".py:", "<b>"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_are_none_are_refused_in_one_line(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    good = {"--model": "bnn", "--data": "gap", "--guide": "point", "--attach": "joint", "--out": "out"}
    for option in ("--model", "--data", "--guide", "--attach"):
        run("train", "--epochs", 1, *(word for pair in {**good, option: name}.items() for word in pair))
    for command in ("evaluate", "sample", "list"):
        run(command, name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("out", ["a\0b", LONG, "/proc/nothing/here"])
def test_a_folder_that_cannot_be_made(out: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run("train", "--model", "bnn", "--data", "gap", "--guide", "point", "--epochs", 1, "--out", out)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_names_of_odd_bytes_lose_no_result(tmp_path: Path) -> None:
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(30, 3)), columns=["a", "\x1b[2Jb", EVIL])
    name = os.fsdecode(b"\xff\x1b[31m.csv")
    table.to_csv(tmp_path / name, index=False)
    words = ["compare", "--model", "bnn", "--data", name, "--target", "a", "--guides", "point", "--seeds", "1"]
    words += [
        "--epochs",
        "1",
        "--samples",
        "100",
        "--jobs",
        "1",
        "--out",
        os.fsdecode(b"out\xfe"),
        "--compile",
        "eager",
    ]
    done = subprocess.run([sys.executable, "-m", "dgm.cli", *words], cwd=tmp_path, capture_output=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    files = {os.fsdecode(f) for f in os.listdir(tmp_path / os.fsdecode(b"out\xfe"))}
    assert {"rows.parquet", "rows.csv", "meta.json", "report.html", "table.txt"} <= files


# ------------------------------------------------------------------------------------------------------- pages


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))


def harmless(page: str) -> None:
    tags = Tags(page).tags
    assert not {tag for tag, _ in tags} & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "Content-Security-Policy" in page and "&lt;script&gt;" in page


def test_the_page_of_an_evaluation_escapes_every_string() -> None:
    model, x = LinearVAE.simulate(30, 4, 2, generator=torch.Generator().manual_seed(0))
    result = dgm.evaluate(model, Amortized(model, x), x, num_samples=100)
    result.notes = [EVIL]
    result.meta = {name: EVIL for name in ("title", "data", "run", "model", "guide", "command", EVIL)}
    result.summary = {**result.summary, EVIL: 1.0}
    type(result).verdicts, before = property(lambda self: [Verdict(EVIL, "bad", EVIL, EVIL)]), type(result).verdicts
    try:
        harmless(render(result))
    finally:
        type(result).verdicts = before
    with pytest.raises(AssertionError):
        harmless(f"<html>{EVIL}</html>")  # the check sees what it is there for


def test_the_page_of_a_comparison_escapes_names_and_errors(tmp_path: Path) -> None:
    def bad(model: Any, *batch: Any) -> Any:
        raise RuntimeError(EVIL)

    data = pd.DataFrame({EVIL: np.arange(20.0)})
    result = dgm.compare(
        models()["linear-vae"].make(1, 1),
        {EVIL: lambda model, x: Amortized(model, x), f"bad {EVIL}": bad},
        data, epochs=1, seeds=1, num_samples=100, title=EVIL, compile=False,
    )  # fmt: skip
    harmless(result.report(tmp_path / "report.html").read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------- what the code may call

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "yaml", "telnetlib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.fork", "os.forkpty", "torch.save",
    "joblib.dump", "joblib.load", "pd.read_pickle", "pandas.read_pickle", "torch.hub.load",
    "multiprocessing.Pool", "mp.Pool", "torch.package.PackageImporter", "runpy.run_path", "runpy.run_module",
}  # fmt: skip
FORBIDDEN_METHODS = {"to_pickle", "extractall", "unsafe_load", "full_load"}


def faults(code: str) -> list[str]:
    """Calls and imports that could run what a file holds, or fork a process with threads."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            last = name.rpartition(".")[2]
            safe = options.get("weights_only") == "True"
            found += [name] if name in FORBIDDEN_CALLS or last in FORBIDDEN_METHODS else []
            found += [name] if name.endswith("torch.load") and not safe else []
            found += (
                [name]
                if options.get("allow_pickle", "False") != "False" or options.get("shell", "False") != "False"
                else []
            )
            found += [name] if options.get("weights_only", "True") != "True" else []
            found += [name] if last == "get_context" and "'fork'" in ast.unparse(node) else []
            store = "get_param_store()." in name and last in ("load", "save")
            found += [name] if store else []
    return found


def shipped() -> list[Path]:
    return sorted(file for part in ("dgm", "models", "guides", "benchmarks") for file in (ROOT / part).rglob("*.py"))


def test_the_shipped_code_can_run_nothing_that_a_file_holds() -> None:
    files = shipped()
    assert len(files) > 100
    found = {file.name: bad for file in files if (bad := faults(file.read_text(encoding="utf-8")))}
    assert not found


@pytest.mark.parametrize(
    "mutant",
    [
        "import pickle", "from pickle import loads", "import dill as p", "import yaml", "torch.load(f)",
        "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)", "np.load(f, allow_pickle=True)",
        "eval(text)", "exec(text)", "os.system(x)", "subprocess.run(x, shell=True)", "joblib.load(f)",
        "pd.read_pickle(f)", "frame.to_pickle(f)", "archive.extractall(d)", "torch.save(x, f)", "os.fork()",
        "pyro.get_param_store().load(f)",
        "multiprocessing.get_context('fork')", "__import__(name)", "def f():\n    def g():\n        return eval('1')",
    ],
)  # fmt: skip
def test_the_lint_sees_each_of_them(mutant: str) -> None:
    assert faults(mutant)


def test_the_lint_is_quiet_on_what_is_safe() -> None:
    safe = ("torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "model.eval()", "re.compile('x')")
    assert faults("\n".join(safe)) == []


def test_requirements_shut_out_releases_with_known_holes() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = [line for line in config["options"]["install_requires"].splitlines() if line.strip() and line[0] != "#"]
    by_name = {re.split(r"[<>=!~\[; ]", line.strip())[0]: line.strip() for line in needed}
    assert by_name["torch"] == "torch>=2.10"  # CVE-2025-32434 and CVE-2026-24747 broke weights_only before
    assert int(by_name["pyarrow"].partition(">=")[2].split(".")[0]) >= 15  # CVE-2023-47248
    assert len(by_name) <= 22 and not any("@" in line or "git+" in line for line in needed)
    assert not set(by_name) & {"lightning", "pytorch-lightning", "ray", "dill", "cloudpickle"}


def test_a_comparison_folder_from_elsewhere_is_refused_where_it_leads_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cells").symlink_to(tmp_path / "elsewhere")
    x = torch.arange(20.0)[:, None]
    with pytest.raises(OptionError, match="is a link"):
        dgm.compare(models()["linear-vae"].make(1, 1), {"a": Amortized}, x, epochs=1, seeds=1, folder=tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []

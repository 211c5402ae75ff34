"""What `dgm doctor` says of an installation: each fault is made here, and named with its cure."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from dgm import cli, environment, machine, probes
from dgm.environment import Environment, Fact

FACTS: dict[str, Any] = {"threads": 2, "cuda": None, "gpus": [], "memory": 2.0**34}
NMS = "RuntimeError: operator torchvision::nms does not exist"


def put(folder: Path, module: str, code: str, version: str = "1.0") -> None:
    """A package as pip leaves it."""
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this process and those it starts import from."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, site: Path) -> None:
    """Nothing is tried but what the test put there: the others take seconds."""
    real = probes.import_errors

    def only_ours(modules: Sequence[str], limit: float = 60.0) -> dict[str, str]:
        ours = [name for name in modules if (site / f"{name}.py").exists()]
        return dict.fromkeys(modules, "") | (real(ours, limit) if ours else {})

    monkeypatch.setattr(environment, "import_errors", only_ours)
    monkeypatch.setattr(environment, "torch_facts", lambda: FACTS | {"threads": 1})
    monkeypatch.setattr(environment, "plugin_errors", list)


def named(found: Environment | Sequence[Fact], name: str) -> Fact:
    facts = found.facts if isinstance(found, Environment) else found
    return next(fact for fact in facts if fact.name == name)


# -------------------------------------------------------------------------------------------------- probes


def test_an_import_may_fail_crash_hang_end_or_print(site: Path) -> None:
    put(site, "good_one", "print('noise {}')")
    put(site, "torchvision", f"raise RuntimeError({NMS.partition(': ')[2]!r} + chr(10) + 'second line')")
    put(site, "crashing", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    put(site, "leaving", "import os; os._exit(0)")
    put(site, "quitting", "import sys; sys.exit(3)")
    put(site, "hanging", "import time; time.sleep(60)")
    modules = ["good_one", "torchvision", "crashing", "leaving", "quitting", "hanging", "json"]
    found = probes.import_errors(modules, limit=1.5)
    assert list(found) == modules
    assert found["good_one"] == found["json"] == ""
    assert found["torchvision"] == NMS
    assert found["crashing"] == "crashes the process (signal 11)"
    assert found["leaving"] == "ends the process" and found["quitting"] == "SystemExit: 3"
    assert found["hanging"] == "took longer than 1.5 s"


def test_a_broken_torch_is_a_line(site: Path) -> None:
    put(site, "torch", "raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    assert probes.torch_facts()["error"].startswith("ImportError: libtorch_cpu.so")
    assert "libtorch_cpu.so" in probes.compiles()
    facts = list(environment._plugins([("vae", "dgm", "ImportError")] * 9, "ImportError: libtorch_cpu.so"))
    assert len(facts) == 1 and not facts[0].problem


def test_the_rest_of_the_command_line_says_who_knows(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(site, "torch", "raise ImportError('libtorch_cpu.so: cannot open')")
    run = probes.subprocess.run([sys.executable, "-m", "dgm.cli", "list"], capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: the installation is broken (libtorch_cpu.so") and "`dgm doctor`" in run.stderr


@pytest.mark.slow
def test_the_doctor_runs_where_torch_does_not(site: Path) -> None:
    put(site, "torch", "raise ImportError('libtorch_cpu.so: cannot open')")
    put(site, "pandas", "raise ImportError('no pandas')")
    run = probes.subprocess.run([sys.executable, "-m", "dgm.cli", "doctor"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == "", run.stderr
    assert "! torch " in run.stdout and "1. torch: cannot be imported: ImportError: libtorch_cpu.so" in run.stdout
    assert "pandas: cannot be imported: ImportError: no pandas" in run.stdout


# ------------------------------------------------------------------------------------------------- packages


def test_a_broken_torchvision_is_named_and_the_rest_works(site: Path, quick: None) -> None:
    put(site, "torchvision", f"raise RuntimeError({NMS.partition(': ')[2]!r})", "0.20.1")
    put(site, "torchmetrics", "import torchvision")
    put(site, "arviz", "x = 1")
    found = environment.environment()
    for name in ("torchvision", "torchmetrics"):
        assert named(found, name).problem == f"is broken: {NMS}" and "CPU or CUDA" in named(found, name).cure
    assert named(found, "torchvision").value == "0.20.1"
    assert named(found, "arviz").problem == "" == named(found, "torch").problem
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1 and "! torchvision " in result.output and "cure: install the torch" in result.output
    frame = found.frame()
    assert list(frame.columns) == ["part", "name", "value", "problem", "cure"] and len(frame) == len(found.facts)
    assert isinstance(frame, pd.DataFrame) and (frame["problem"] != "").sum() == len(found.problems)
    assert all(fact.cure for fact in found.problems)


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_release_that_steals_is_named_and_never_imported(version: str, site: Path, quick: None) -> None:
    put(site, "lightning", f"open({str(site / 'stolen')!r}, 'w')", version)
    fact = named(environment.environment(), "lightning")
    assert "steals credentials" in fact.problem and "pip uninstall lightning" in fact.cure
    assert not (site / "stolen").exists()


def test_a_sound_release_of_the_same_package_is_tried(site: Path, quick: None) -> None:
    put(site, "lightning", f"open({str(site / 'imported')!r}, 'w').close()", "2.6.1")
    assert named(environment.environment(), "lightning").problem == "" and (site / "imported").exists()


def test_a_package_of_a_wrong_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "version", lambda name: {"torch": "2.9.1"}.get(name, "5.0"))
    facts = list(environment._versions({"torch": ">=2.10", "numpy": ">=2"}, {}))
    assert named(facts, "torch").problem == "is 2.9.1, and dgm needs >=2.10"
    assert named(facts, "torch").cure == "pip install 'torch>=2.10'" and named(facts, "numpy").problem == ""
    assert "torch" in environment._requirements() and "numpyro" not in environment._requirements()
    assert named(list(environment._versions({}, {})), "metadata").problem


def test_broken_plug_ins_are_problems() -> None:
    (fact,) = environment._plugins([("sea", "dgm-sea", "ImportError: no sea")])
    assert fact.problem == "ImportError: no sea (dgm-sea)" and "dgm-sea" in fact.cure
    assert not any(fact.problem for fact in environment._plugins([]))


# -------------------------------------------------------------------------------------------------- machine


def test_threads_beyond_the_cores_and_nonsense_in_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cores", lambda: (8, 1.5))
    monkeypatch.setenv("OMP_NUM_THREADS", "none")
    facts = list(machine.machine(FACTS | {"threads": 8}))
    assert named(facts, "torch's threads").problem == "8 threads on 2 cores wait for each other"
    assert named(facts, "OMP_NUM_THREADS").cure == "export OMP_NUM_THREADS=2"
    assert "limited to 1.5" in named(facts, "processor").value
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert not any(fact.problem for fact in machine.machine(FACTS) if "hread" in fact.name.lower())


def test_an_unused_gpu_and_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/bin/nvidia-smi" if name == "nvidia-smi" else None)
    facts = list(machine.machine(FACTS | {"memory": 2.0**29}))
    assert "a CPU build" in named(facts, "GPU").problem
    assert named(facts, "free memory").problem == "less than 1 GB is free"
    facts = list(machine.machine(FACTS | {"gpus": ["H100"], "cuda": "13.0"}))
    assert named(facts, "GPU") == Fact("machine", "GPU", "H100")
    assert "newer than the driver" in named(list(machine.machine(FACTS | {"cuda": "13.0"})), "GPU").problem
    assert [fact.name for fact in machine.machine({"error": "ImportError"})] == ["processor", "OMP_NUM_THREADS"]


def test_a_compiler_that_is_missing_or_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler (no-such-compiler)" in named(list(machine.compiler(None)), "C++").problem
    monkeypatch.delenv("CXX")
    assert named(list(machine.compiler("CppCompileError: x")), "torch's compiler").value == "broken"
    assert named(list(machine.compiler("")), "torch's compiler").value == "works"
    assert "not tried" in named(list(machine.compiler(None)), "torch's compiler").value
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: "/nowhere")
    assert "Python.h is missing" in named(list(machine.compiler(None)), "Python's headers").problem


def test_folders_that_are_missing_full_or_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGM_DATA", str(tmp_path / "nowhere"))
    assert named(list(machine.places()), "data (DGM_DATA)").problem == "there is no such folder"
    monkeypatch.setenv("DGM_DATA", str(tmp_path))
    assert named(list(machine.places()), "data (DGM_DATA)").problem == ""
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    assert "0.0 GB are free" in named(list(machine.places()), "here").problem

    def closed(**_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", closed)
    assert named(list(machine.places()), "cache").problem == "cannot be written to: Read-only file system"


# --------------------------------------------------------------------------------------- of a model and data


def test_the_doctor_of_a_pair_is_asked_with_what_the_words_say(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Diagnosis:
        def __init__(self, findings: list[str]):
            self.findings = findings

        def __str__(self) -> str:
            return "the diagnosis"

    def examine(model: Any, *data: Any, **options: Any) -> Diagnosis:
        asked.update(options, model=model, data=data)
        return Diagnosis(["collapse"] if options["seed"] else [])

    fake = types.ModuleType("dgm.doctor")
    fake.doctor = examine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dgm.doctor", fake)
    words = ["doctor", "bnn", "--data", "gap", "--guide", "point", "--lr", "0.01"]
    result = CliRunner().invoke(cli.app, [*words, "--epochs", "3", "--batch-size", "10"])
    assert result.exit_code == 0 and "the diagnosis" in result.output, result.output
    rows = len(asked["data"][0])
    assert (asked["lr"], asked["batch_size"], asked["steps"]) == (0.01, 10, 3 * -(-rows // 10))
    assert len(asked["data"]) == 2 and "transform" in asked
    assert CliRunner().invoke(cli.app, [*words, "--seed", "1"]).exit_code == 1 and asked["steps"] == 300
    for bad, told in (
        ([*words, "--steps", "5", "--epochs", "2"], "expected one of them"),
        (["doctor", "bn", "--data", "gap"], "did you mean 'bnn'?"),
        (["doctor", "--data", "gap"], "which model?"),
        (["doctor", "bnn", "--data", "gap", "--guide", "pint"], "did you mean 'point'"),
    ):
        result = CliRunner().invoke(cli.app, bad)
        assert result.exit_code == 2 and told in result.output


@pytest.mark.slow
def test_this_installation_is_sound() -> None:
    found = environment.environment(thorough=True)
    assert named(found, "torch's compiler").value == "works"
    assert not [fact for fact in found.problems if fact.part in ("versions", "plug-ins", "compiler")]
    assert os.environ.get("DGM_DATA", "not set") in named(found, "data (DGM_DATA)").value

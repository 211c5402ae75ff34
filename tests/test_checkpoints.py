"""Checkpoints: a training that is stopped anywhere goes on to the same bits, and what is damaged is never believed."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import dgm
from dgm import resume
from dgm.checkpoint import Checkpoints
from dgm.errors import DataError, ModelError, OptionError, TrainingError
from dgm.feeding import Memory
from dgm.fit import Interrupted, Terminated
from dgm.guides.amortized import Amortized
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.laplace import Laplace
from dgm.models.bnn import BNN
from dgm.models.vae import VAE
from dgm.plain import flatten, unflatten
from dgm.programs import isolated, preserved_rng

FIRST_VERSION = Path(__file__).parent / "data" / "checkpoint-1"
EPOCHS, BATCH = 4, 20


def rows(count: int = 90) -> Tensor:
    return torch.rand(count, 6, generator=torch.Generator().manual_seed(0)).round()


class Killer:
    """A `transform` that draws noise of its own, and sends a signal while batch number `at` (from 1) is made."""

    def __init__(self, at: int = 0, number: int = signal.SIGINT):
        self._at, self._number, self._count = at, number, 0

    def __call__(self, batch: Any, generator: torch.Generator) -> Any:
        self._count += generator.initial_seed() > 1000  # not where the checks before training look at the data
        if self._at and self._count == self._at:
            os.kill(os.getpid(), self._number)
            self._at = 0
        return (torch.bernoulli(0.1 + 0.8 * batch[0], generator=generator), *batch[1:])


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Those of a process in a terminal: a job in the background starts without one for Ctrl-C."""
    before = {n: signal.signal(n, h) for n, h in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, 0))}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def vae_pair() -> tuple[Any, Any]:
    with preserved_rng(1):
        model = VAE(6, latent=2, hidden=(8,))
        return model, Amortized(model, rows())


def lazy_pair() -> tuple[Any, Any]:
    """A function with `pyro.param` and a guide that makes its parameters at its first call."""

    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        m = pyro.sample("m", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, scale).to_event(1), obs=x)

    return model, AutoNormal(model)


def train(pair: Callable[[], tuple[Any, Any]], folder: Any, stop: int = 0, **options: Any) -> Any:
    """A fit, or None where it was stopped while batch `stop` was made."""
    told: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "seed": 3, "transform": Killer(stop)}
    told |= options
    try:
        return dgm.fit(*pair(), rows(), checkpoint=folder, **told)
    except Interrupted:
        return None


def state_of(fit: Any) -> dict[str, Tensor]:
    modules = [p if isinstance(p, nn.Module) else None for p in (fit.model, fit.guide)]
    return {f"{i}.{n}": v for i, m in enumerate(modules) if m is not None for n, v in m.state_dict().items()}


def assert_same(one: Any, two: Any) -> None:
    """Bit for bit: parameters, buffers and history."""
    a, b = state_of(one), state_of(two)
    assert list(a) == list(b)
    assert a
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    drop = {"columns": ["seconds"]}
    assert one.history.drop(**drop).equals(two.history.drop(**drop))
    assert (one.steps, one.evaluations, one.stopped) == (two.steps, two.evaluations, two.stopped)


CASES: dict[str, Any] = {
    "eager": (vae_pair, {"compile": False}),
    "trace": (vae_pair, {"compile": "trace"}),
    "auto": (vae_pair, {"compile": "auto"}),
    "lazy guide of a function": (lazy_pair, {"compile": False}),
    "lazy guide, trace": (lazy_pair, {"compile": "trace"}),
    "early stopping": (vae_pair, {"epochs": 9, "validation": 0.3, "patience": 2, "lr": 0.05, "compile": False}),
    "warm-up and schedule": (vae_pair, {"kl_warmup": 3, "schedule": partial(StepLR, step_size=2, gamma=0.5)}),
    "schedule of steps": (
        vae_pair,
        {"epochs": None, "steps": 18, "schedule": partial(CosineAnnealingLR, T_max=18), "clip": 0.5},
    ),
    "momentum": (vae_pair, {"optim": partial(torch.optim.SGD, lr=1e-3, momentum=0.9)}),
    "rmsprop": (vae_pair, {"optim": partial(torch.optim.RMSprop, lr=1e-3), "compile": False}),
    "amsgrad": (vae_pair, {"optim": partial(torch.optim.AdamW, lr=1e-2, amsgrad=True), "compile": False}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "lazy guide, trace" else n for n in CASES]
)
def test_resume_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    pair, options = CASES[name]
    whole = train(pair, tmp_path / "a", **options)
    stops = (3, 4, 1, 6) if whole.engine == "eager" else (3, 4)  # in the middle of an epoch, after a resume, at once
    for stop in stops:
        assert train(pair, tmp_path / "b", stop, **options) is None
    assert_same(train(pair, tmp_path / "b", **options), whole)


@pytest.mark.slow
def test_resume_gives_the_same_bits_compiled(tmp_path: Path) -> None:
    for name, pair in (("vae", vae_pair), ("lazy", lazy_pair)):
        whole = train(pair, tmp_path / f"{name}-a", compile="inductor")
        for stop in (3, 4, 6):
            assert train(pair, tmp_path / f"{name}-b", stop, compile="inductor") is None
        again = train(pair, tmp_path / f"{name}-b", compile="inductor")
        assert again.engine == whole.engine == "inductor"
        assert_same(again, whole)


@pytest.mark.parametrize("broken", ["random streams", "data order", "moments", "schedule", "position"])
def test_a_resume_that_forgets_something_is_found_out(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above fails for each part of the state that is left out."""
    options = {"schedule": partial(StepLR, step_size=1, gamma=0.5), "lr": 0.05}
    whole = train(vae_pair, tmp_path / "a", **options)
    assert train(vae_pair, tmp_path / "b", 8, **options) is None
    saved = Checkpoints(tmp_path / "b")
    found = saved.latest()
    assert found is not None
    state = found.state
    if broken == "random streams":
        monkeypatch.setattr(resume, "set_random_streams", lambda state: None)
    elif broken == "data order":
        monkeypatch.setattr(Memory, "go_to", lambda self, position: None)
    elif broken == "moments":
        for moments in state["optimiser"]["state"].values():
            moments["exp_avg"].zero_()
        saved.save(found.step, state)
    elif broken == "schedule":
        state["schedule"]["last_epoch"] = 0
        state["schedule"]["_last_lr"] = [0.05]
        for group in state["optimiser"]["param_groups"]:
            group["lr"] = 0.05
        saved.save(found.step, state)
    else:
        state["at"]["done"] -= 1
        saved.save(found.step, state)
    again = train(vae_pair, tmp_path / "b", **options)
    with pytest.raises(AssertionError):
        assert_same(again, whole)


def network_pairs(start: int = 0) -> tuple[Any, Any]:
    with preserved_rng(start):
        network = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
    return partial(BNN, network), partial(Global, family=DiagonalNormal)


def train_replicas(folder: Any, stop: int = 0, start: int = 0, **options: Any) -> Any:
    x = rows()
    y = x.sum(1).sin()
    columns = {"seed": [3, 4, 5], "lr": [1e-2, 1e-3, 3e-2], "prior": [1.0, 0.5, 2.0]}
    told: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "transform": Killer(stop), "replicas": columns}
    try:
        return dgm.fit(*network_pairs(start), x, y, checkpoint=folder, **(told | options))
    except Interrupted:
        return None


@pytest.mark.parametrize(
    "options",
    [
        {"compile": "trace", "clip": 5.0, "kl_warmup": 2},
        pytest.param({"compile": "trace", "validation": 0.3, "patience": 2, "epochs": 8}, marks=pytest.mark.slow),
        pytest.param({"compile": "trace", "optim": partial(torch.optim.RMSprop, lr=1e-2)}, marks=pytest.mark.slow),
        pytest.param({"compile": "trace", "schedule": partial(StepLR, step_size=1, gamma=0.5)}, marks=pytest.mark.slow),
        {"compile": False},
    ],
    ids=["trace", "early stopping", "foreign optimiser", "schedule", "one by one"],
)
def test_replicas_resume_to_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    whole = train_replicas(tmp_path / "a", **options)
    later = 1 if options["compile"] else 0  # who has begun goes on with its own network, wherever a process starts one
    for stop, start in ((10, 0), (16, later)):
        assert train_replicas(tmp_path / "b", stop, start=start, **options) is None
    for one, two in zip(train_replicas(tmp_path / "b", start=later, **options), whole, strict=True):
        assert_same(one, two)


@pytest.mark.slow
def test_compiled_replicas_resume_to_the_same_bits(tmp_path: Path) -> None:
    whole = train_replicas(tmp_path / "a", compile="inductor")
    assert train_replicas(tmp_path / "b", 16, compile="inductor") is None
    for one, two in zip(train_replicas(tmp_path / "b", compile="inductor"), whole, strict=True):
        assert one.engine.startswith("inductor")
        assert_same(one, two)


@pytest.mark.slow
def test_a_diverged_replica_stays_diverged(tmp_path: Path) -> None:
    options = {"compile": "trace", "lr": 1.0, "optim": partial(torch.optim.SGD, lr=1e30)}
    whole = train_replicas(tmp_path / "a", **options)
    assert all(one.error is not None for one in whole)
    again = train_replicas(tmp_path / "a", **options)
    assert [one.error for one in again] == [one.error for one in whole]


@pytest.mark.parametrize("loader_options", [{}, {"generator": 7}, {"sampler": 7}], ids=["torch", "own", "sampler"])
def test_a_data_loader_resumes_to_the_same_bits(loader_options: dict[str, Any], tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        data = TensorDataset(rows())
        if "sampler" in loader_options:
            order = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(7))
            return DataLoader(data, batch_size=BATCH, sampler=order)
        own = torch.Generator().manual_seed(7) if "generator" in loader_options else None
        return DataLoader(data, batch_size=BATCH, shuffle=True, generator=own)

    def run(folder: Path, stop: int = 0) -> Any:
        kept = Checkpoints(folder, steps=1)
        model, guide = vae_pair()
        if stop:
            due, count = kept.due, [0]

            def counted(step: int) -> bool:
                count[0] += 1
                if count[0] == stop:
                    os.kill(os.getpid(), signal.SIGINT)
                return due(step)

            kept.due = counted  # type: ignore[method-assign]
        try:
            return dgm.fit(model, guide, loader(), epochs=EPOCHS, seed=3, compile=False, checkpoint=kept)
        except Interrupted:
            return None

    whole = run(tmp_path / "a")
    for stop in (3, 4, 6):
        assert run(tmp_path / "b", stop) is None
    assert_same(run(tmp_path / "b"), whole)


def test_a_mapped_file_resumes_to_the_same_bits(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", rows().numpy())

    def run(folder: Path, stop: int = 0) -> Any:
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
        try:
            return dgm.fit(
                *vae_pair(), x, epochs=EPOCHS, batch_size=BATCH, seed=3, transform=Killer(stop), checkpoint=folder
            )
        except Interrupted:
            return None

    whole = run(tmp_path / "a")
    for stop in (3, 5):
        assert run(tmp_path / "b", stop) is None
    assert_same(run(tmp_path / "b"), whole)


# --- killed ---------------------------------------------------------------------------------------------------------


def _child(folder: Path, stop_at: float) -> bool:
    """A training in a process of its own that is killed after so many seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            train(vae_pair, Checkpoints(folder, steps=1), epochs=40, compile=False)
            os._exit(0)
        except BaseException:
            os._exit(7)
    time.sleep(stop_at)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the training failed by itself: {status}"
    return status == 0


@pytest.mark.parametrize("kills", [8, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks")
def test_killed_at_random_it_always_goes_on(kills: int, tmp_path: Path) -> None:
    """Also in the middle of a save: each step is saved, which takes most of the time."""
    whole = train(vae_pair, tmp_path / "a", epochs=40, compile=False)
    draw, folder, last, died = random.Random(0), tmp_path / "b", 0, 0
    for _ in range(kills):
        ended = _child(folder, draw.uniform(0.01, 0.2))
        died += not ended
        found = Checkpoints(folder).latest()
        step = 0 if found is None else found.step
        assert step >= last  # nothing that was saved is lost, nothing is unreadable
        last = step
        if last == whole.steps:  # it came to its end: begin anew, so that every kill hits a training
            shutil.rmtree(folder)
            last = 0
    assert died > kills / 2
    assert_same(train(vae_pair, Checkpoints(folder, steps=1), epochs=40, compile=False), whole)
    assert not list(folder.glob(".step-*"))  # half-written files of the killed are gone
    assert len(list(folder.glob("step-*.json"))) == 2


def test_sigterm_finishes_the_step_saves_and_ends_with_143(tmp_path: Path) -> None:
    whole = train(vae_pair, tmp_path / "a")
    with pytest.raises(Terminated) as ended:
        dgm.fit(
            *vae_pair(),
            rows(),
            epochs=EPOCHS,
            batch_size=BATCH,
            seed=3,
            transform=Killer(7, signal.SIGTERM),
            checkpoint=tmp_path / "b",
        )
    assert ended.value.code == 143
    assert ended.value.fit.steps == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert_same(train(vae_pair, tmp_path / "b"), whole)


def test_ctrl_c_without_checkpoints_ends_after_a_whole_step() -> None:
    model, guide = vae_pair()
    with pytest.raises(Interrupted) as ended:
        dgm.fit(model, guide, rows(), epochs=EPOCHS, batch_size=BATCH, seed=3, transform=Killer(7))
    assert ended.value.fit.steps == 7
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_resumes_to_the_same_file(number: int, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dgm.cli", "train", "--epochs", "60", "--compile", "eager"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    a, b = tmp_path / "a", tmp_path / "b"
    subprocess.run([*command, "--out", str(a)], check=True, env=environment, capture_output=True)
    child = subprocess.Popen(
        [*command, "--out", str(b)],
        env=environment,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for _ in range(600):
        if (b / "checkpoints").is_dir():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    child.send_signal(number)
    _, errors = child.communicate()
    assert child.returncode == code, errors
    assert b"--resume" in errors
    refused = subprocess.run([*command, "--out", str(b)], env=environment, capture_output=True)
    assert refused.returncode == 2
    assert b"--resume" in refused.stderr
    subprocess.run([*command, "--out", str(b), "--resume"], check=True, env=environment, capture_output=True)
    assert (a / "weights.safetensors").read_bytes() == (b / "weights.safetensors").read_bytes()
    assert not (b / "checkpoints").exists()


# --- damaged --------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-run",)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped byte": (_flip, "damaged"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-20]), "cut short"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "missing": (lambda p: p.unlink(), "missing|cannot be read"),
    "foreign": (lambda p: p.write_bytes(b'{"hello": "world"}'), "no checkpoint of dgm|cut short or replaced"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(Evil())), "damaged|cut short or replaced"),
}


@pytest.mark.parametrize("part", ["json", "safetensors"])
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_the_older_state_taken(
    what: str, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = train(vae_pair, "a")
    assert train(vae_pair, Checkpoints("b", steps=2), 7) is None
    newest, older = Checkpoints("b").steps_kept()[::-1]
    damage, words = DAMAGE[what]
    damage(Path("b") / f"step-{newest:09d}.{part}")
    if not (what == "missing" and part == "json"):  # then there is nothing that could be missed
        with pytest.raises(DataError, match=words):
            Checkpoints("b").read(newest)
        with caplog.at_level(logging.WARNING, "dgm"):
            found = Checkpoints("b").latest()
        assert f"going back to step {older}" in caplog.text
        assert str(newest) in caplog.text
    else:
        found = Checkpoints("b").latest()
    assert found is not None
    assert found.step == older
    assert_same(train(vae_pair, "b"), whole)
    assert not Path("was-run").exists()


def test_a_pickle_with_a_forged_checksum_is_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Checkpoints("a")
    with kept.open():
        path = kept.save(1, {"a": torch.zeros(3)})
    assert path is not None
    payload = pickle.dumps(Evil())
    data = path.with_suffix(".safetensors")
    data.write_bytes(payload)
    content = json.loads(path.read_text())
    import hashlib

    from dgm.checkpoint import _digest

    content["tensors"] |= {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    content["sha256"] = _digest(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="no safetensors file"):
        kept.read(1)
    assert not Path("was-run").exists()


def test_where_all_are_damaged_it_says_so_and_does_not_begin_anew(tmp_path: Path) -> None:
    assert train(vae_pair, Checkpoints(tmp_path, steps=2), 7) is None
    for path in tmp_path.glob("step-*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.*empty"):
        train(vae_pair, tmp_path)


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    path = kept.save(1, {})
    assert path is not None
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(DataError, match="newer"):
        kept.read(1)


def test_the_first_version_stays_readable(tmp_path: Path) -> None:
    shutil.copytree(FIRST_VERSION, tmp_path / "kept")
    found = Checkpoints(tmp_path / "kept").latest()
    assert found is not None
    assert found.step == 7
    whole = train(vae_pair, tmp_path / "a", compile=False)
    again = train(vae_pair, tmp_path / "kept", compile=False)
    for (name, a), b in zip(state_of(again).items(), state_of(whole).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name  # another machine rounds otherwise


def test_a_full_disk_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(vae_pair, tmp_path / "a")
    real, full = os.fsync, [False]

    def fsync(handle: int) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    kept = Checkpoints(tmp_path / "b", steps=1)
    save = kept.save

    def filling(step: int, state: Any) -> Path | None:
        full[0] = 5 <= step < 9
        return save(step, state)

    kept.save = filling  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "dgm"):
        assert train(vae_pair, kept, 7) is None
    assert [r.getMessage() for r in caplog.records].count(caplog.messages[0]) == 1
    assert "No space left on device" in caplog.messages[0]
    found = Checkpoints(tmp_path / "b").latest()
    assert found is not None
    assert found.step == 4
    full[0] = False
    assert_same(train(vae_pair, tmp_path / "b"), whole)


# --- what a folder may be used for ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lr": 0.5}, "lr is 0.5 here and 0.001 there"),
        ({"seed": 4}, "seed is 4 here and 3 there"),
        ({"batch_size": 30}, "batch_size"),
        ({"optim": partial(torch.optim.SGD, lr=0.1)}, "optim"),
        ({"validation": 0.5}, "validation|rows"),
        ({"steps": 4, "epochs": None}, "ask for more"),
    ],
)
def test_another_training_is_refused_by_name(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert train(vae_pair, tmp_path, 7) is None
    with pytest.raises(OptionError, match=words):
        train(vae_pair, tmp_path, **changed)


def test_other_rows_are_refused(tmp_path: Path) -> None:
    assert train(vae_pair, tmp_path, 7) is None
    with pytest.raises(OptionError, match="rows are others"):
        dgm.fit(
            *vae_pair(), 1 - rows(), epochs=EPOCHS, batch_size=BATCH, seed=3, transform=Killer(), checkpoint=tmp_path
        )


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    assert train(vae_pair, tmp_path, 7) is None

    def wider() -> tuple[Any, Any]:
        model = VAE(6, latent=2, hidden=(9,))
        return model, Amortized(model, rows())

    with pytest.raises(ModelError, match=r"decoder.*\(8, 2\) there and \(9, 2\) here"):
        train(wider, tmp_path)


def test_an_ended_training_is_not_made_again_and_goes_on_for_longer(tmp_path: Path) -> None:
    first = train(vae_pair, tmp_path)
    start = time.perf_counter()
    again = train(vae_pair, tmp_path)
    assert time.perf_counter() - start < 5
    assert_same(again, first)
    longer = train(vae_pair, tmp_path, epochs=EPOCHS + 2)
    assert longer.steps == first.steps * (EPOCHS + 2) // EPOCHS
    assert_same(longer, train(vae_pair, tmp_path / "whole", epochs=EPOCHS + 2))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    import threading

    from dgm.lock import locked

    told: list[str] = []

    def other() -> None:
        try:
            train(vae_pair, tmp_path)
        except OptionError as error:
            told.append(str(error))

    with locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert told and "in use" in told[0]


@pytest.mark.parametrize("options", [{"keep": 1}, {"steps": 0}, {"seconds": float("nan")}, {"keep": True}])
def test_numbers_of_checkpoints_are_checked(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        Checkpoints(tmp_path, **options)


@pytest.mark.parametrize("where", [3, True, ["a"]])
def test_a_checkpoint_is_a_folder(where: Any) -> None:
    with pytest.raises(OptionError, match="expected a folder"):
        train(vae_pair, where)


def test_an_object_in_the_state_is_refused_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"schedule\.step is function"):
        Checkpoints(tmp_path).save(1, {"schedule": {"step": lambda: None}})
    assert not list(tmp_path.glob("step-*"))


def test_plain_values_come_back_as_they_were() -> None:
    value = {
        "none": None,
        "numbers": [1, 2.5, float("inf"), -float("inf")],
        "tuple": (1, (2, "a")),
        "numbered": {0: torch.arange(3), 5: {"deep": torch.zeros(2, dtype=torch.uint8)}},
        "array": np.arange(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    plain, tensors = flatten(value)
    again = unflatten(json.loads(json.dumps(plain, allow_nan=False)), tensors)
    assert again["tuple"] == value["tuple"] and again["numbers"] == value["numbers"] and again["none"] is None
    assert list(again["numbered"]) == [0, 5]
    assert torch.equal(again["numbered"][5]["deep"], value["numbered"][5]["deep"])
    assert isinstance(again["array"], np.ndarray)
    assert (again["array"] == np.arange(4)).all()
    for name in ("empty", "scalar", "half"):
        assert again[name].dtype == value[name].dtype and torch.equal(again[name], value[name])
    assert np.isnan(unflatten(*flatten(float("nan"))))


def test_a_value_that_is_not_finite_leaves_the_last_good_state(tmp_path: Path) -> None:
    class Breaking(Killer):
        def __call__(self, batch: Any, generator: torch.Generator) -> Any:
            self._count += 1
            return tuple(t * (float("nan") if self._count == self._at else 1.0) for t in batch)

    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0, validate_args=False).to_event(1), obs=x)

    with pytest.raises(TrainingError):
        train(lambda: (model, AutoNormal(model)), tmp_path, transform=Breaking(5), compile=False)
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    assert found.step == 4 - 1  # the checks before training made one batch
    assert all(torch.isfinite(v).all() for v in found.state["weights"].values())


# --- a trained pair in another process ------------------------------------------------------------------------------


def test_restore_gives_the_trained_pair_back(tmp_path: Path) -> None:
    fitted = train(vae_pair, tmp_path)
    again = dgm.restore(tmp_path, lambda: VAE(6, latent=2, hidden=(8,)), Amortized)
    for (name, a), b in zip(state_of(again).items(), state_of(fitted).values(), strict=True):
        assert torch.equal(a, b), name
    assert again.steps == fitted.steps and again.stopped == fitted.stopped
    one, two = (dgm.evaluate(f.model, f.guide, rows(), num_samples=100).summary["bound"] for f in (again, fitted))
    assert one == two


@pytest.mark.parametrize("cut", [False, True])
def test_restore_reaches_modules_that_a_function_closes_over(cut: bool, tmp_path: Path) -> None:
    def make() -> tuple[Any, nn.Module]:
        decoder = nn.Linear(2, 6)

        def model(x: Tensor) -> None:
            pyro.module("decoder", decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

        return model, decoder

    model, trained = make()
    train(lambda: (model, Amortized(model, rows())), tmp_path, 7 if cut else 0)
    other, fresh = make()
    assert not torch.equal(fresh.weight, trained.weight)
    dgm.restore(tmp_path, lambda: other, Amortized)
    assert torch.equal(fresh.weight, trained.weight) and torch.equal(fresh.bias, trained.bias)


def test_restore_of_a_training_that_was_cut_short(tmp_path: Path) -> None:
    assert train(vae_pair, tmp_path, 7) is None
    again = dgm.restore(tmp_path, VAE(6, latent=2, hidden=(8,)), Amortized)
    assert again.steps == 7 - 1 + 1 or again.steps == 6
    assert "cut short" in again.stopped


def test_restore_of_replicas_and_of_a_finished_posterior(tmp_path: Path) -> None:
    fits = train_replicas(tmp_path / "replicas", compile="trace")
    make, attach = network_pairs()
    again = dgm.restore(tmp_path / "replicas" / "replica-0001", make(prior=0.5), attach)
    for (name, a), b in zip(state_of(again).items(), state_of(fits[1]).values(), strict=True):
        assert torch.equal(a, b), name
    x = rows()
    y = x.sum(1).sin()
    with preserved_rng(0):
        bnn = make()
        laplace = Laplace(bnn, x, y)
    fitted = dgm.fit(bnn, laplace, x, y, epochs=2, checkpoint=tmp_path / "laplace")
    other = dgm.restore(tmp_path / "laplace", make, Laplace)
    for (name, a), b in zip(state_of(other).items(), state_of(fitted).values(), strict=True):
        assert torch.equal(a, b), name
    start = time.perf_counter()
    with preserved_rng(0):
        bnn = make()
        refitted = dgm.fit(bnn, Laplace(bnn, x, y), x, y, epochs=2, checkpoint=tmp_path / "laplace")
    assert time.perf_counter() - start < 20
    assert_same(refitted, fitted)


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        (partial(VAE, 6, latent=3, hidden=(8,)), Amortized, r"is \(8, 2\) there and \(8, 3\) here"),
        (partial(VAE, 6, latent=2, hidden=(8,)), partial(Amortized, family=FullNormal), "guide.*there and"),
    ],
)
def test_restore_refuses_another_pair_by_name(model: Any, guide: Any, words: str, tmp_path: Path) -> None:
    train(vae_pair, tmp_path)
    with pytest.raises(ModelError, match=words):
        dgm.restore(tmp_path, model, guide)


def test_restore_says_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to restore"):
        dgm.restore(tmp_path / "nowhere", VAE(6), Amortized)
    assert train_replicas(tmp_path, 10, compile="trace") is None
    with pytest.raises(DataError, match="unfinished groups of replicas"):
        dgm.restore(tmp_path, VAE(6), Amortized)


def test_damaged_weights_of_a_run_are_named(tmp_path: Path) -> None:
    train(vae_pair, tmp_path)
    _flip(tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match="SHA-256"):
        dgm.restore(tmp_path, VAE(6, latent=2, hidden=(8,)), Amortized)


@pytest.mark.slow
def test_restore_in_a_fresh_process_predicts_the_same_bits(tmp_path: Path) -> None:
    fitted = train(vae_pair, tmp_path)
    with preserved_rng(5), torch.no_grad(), isolated():
        mine = fitted.guide(rows())
    code = f"""
import torch, dgm
from dgm.guides.amortized import Amortized
from dgm.models.vae import VAE
fit = dgm.restore({str(tmp_path)!r}, lambda: VAE(6, latent=2, hidden=(8,)), Amortized)
x = torch.rand(90, 6, generator=torch.Generator().manual_seed(0)).round()
torch.set_num_threads(1)
torch.manual_seed(5)
with torch.no_grad():
    found = fit.guide(x)
torch.save({{k: v for k, v in found.items()}}, {str(tmp_path / "draws.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    theirs = torch.load(tmp_path / "draws.pt", weights_only=True)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name])

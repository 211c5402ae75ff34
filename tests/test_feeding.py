"""Batches: the same rows in the same order from memory and from files, in bounded memory, and threads that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dgm import fit
from dgm.data import as_tensors, batches
from dgm.errors import DataError, OptionError
from dgm.feeding import Loaded, Mapped, Memory, _sources, ahead
from dgm.fit import Interrupted
from dgm.guides.encoders import mlp
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.mapped import MappedArray
from dgm.models import bayesian_linear_regression, vae
from dgm.programs import preserved_rng

ROWS = 53


def stored(folder: Path, array: np.ndarray, name: str = "x") -> Any:
    np.save(folder / f"{name}.npy", array)
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def numbers(dtype: Any = np.float32, columns: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, columns)).astype(dtype)


def feeding_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "dgm-feeding"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not feeding_threads()


def epochs(source: Any, count: int = 3) -> list[Tensor]:
    return [t for _ in range(count) for batch, rows in source.epoch() for t in (*batch, rows)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(a, b, strict=True))


def noisy(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
    return (batch[0] + torch.rand(batch[0].shape, generator=generator, dtype=batch[0].dtype), *batch[1:])


# --- in memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [None, 8, ROWS])
def test_order_is_what_epoch_goes_through(batch_size: int | None) -> None:
    x = torch.from_numpy(numbers())
    a, b = (Memory((x,), batch_size, 3, None) for _ in range(2))
    for _ in range(3):
        assert equal(a.order(), [rows for _, rows in b.epoch()])
    assert len(a.order()) == a.steps
    a.order()
    next(iter(b.epoch()))  # one epoch begun is one epoch drawn
    assert not equal(a.order(), b.order()) or batch_size != 8


def test_order_is_that_of_a_generator_of_its_own() -> None:
    """The stream that runs of earlier versions were trained with."""
    x = torch.arange(20.0)
    seed = int(np.random.SeedSequence([7, 1]).generate_state(1)[0])
    assert equal(Memory((x,), 6, 7, None).order(), list(batches(20, 6, torch.Generator().manual_seed(seed))))


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("transform", [None, noisy])
def test_own_rows_are_a_source_of_those_rows(batch_size: int | None, transform: Any) -> None:
    x, y = torch.from_numpy(numbers()), torch.arange(ROWS)
    own = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:17]
    shared, alone = (
        Memory((x, y), batch_size, 5, transform, own=own),
        Memory((x[own], y[own]), batch_size, 5, transform),
    )
    assert (shared.rows, shared.steps, shared.batch_size) == (alone.rows, alone.steps, alone.batch_size)
    assert equal(list(shared.first()), list(alone.first())) and equal(epochs(shared), epochs(alone))


@pytest.mark.parametrize("own", [torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([-1]), torch.tensor([ROWS])])
def test_own_rows_that_are_none(own: Tensor) -> None:
    with pytest.raises(OptionError, match=r"own is .* row numbers from 0 to 52"):
        Memory((torch.from_numpy(numbers()),), None, 0, None, own=own)


# --- from files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16])
@pytest.mark.parametrize("kind", [np.float32, np.float64, ">f4", np.float16, np.uint8, np.int64, np.bool_])
def test_a_mapped_array_reads_what_as_tensors_gives(tmp_path: Path, kind: Any, dtype: torch.dtype | None) -> None:
    for array in (
        (numbers() * 9).astype(kind),
        (numbers(columns=1)[:, 0] * 9).astype(kind),
        numbers().astype(kind)[:, None],
    ):
        (expected,) = as_tensors(array, dtype=dtype)
        mapped = MappedArray(stored(tmp_path, array), "x", dtype=dtype)
        index = torch.randperm(ROWS)[:20]
        assert equal([mapped[index], mapped[5:9], mapped[:]], [expected[index], expected[5:9], expected])


def test_views_and_what_was_written_to_a_copy_on_write_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgm.mapped.RELEASE", 0)
    x = stored(tmp_path, numbers())
    for view in (x[7:], x[::2], x[:, 1:]):
        mapped = MappedArray(view, "x")
        assert torch.equal(mapped[torch.tensor([3, 1, 3])], torch.from_numpy(np.array(view))[[3, 1, 3]])
        mapped.release()
        assert torch.equal(mapped[:4], torch.from_numpy(np.array(view[:4])))
    changed = np.load(tmp_path / "x.npy", mmap_mode="c")
    changed[0] = 5.0
    mapped = MappedArray(changed, "x")
    assert mapped[:1].eq(5).all()
    mapped.release()
    assert mapped[:1].eq(5).all() and not np.load(tmp_path / "x.npy")[0].any() == 5.0


@pytest.mark.parametrize("batch_size", [8, ROWS])
@pytest.mark.parametrize("transform", [None, noisy])
@pytest.mark.parametrize("validation", [None, 0.1])
def test_batches_from_files_are_those_from_memory(
    tmp_path: Path, batch_size: int, transform: Any, validation: Any
) -> None:
    batch_size = batch_size if validation is None else 7
    x, y, z = numbers(), np.arange(ROWS), numbers(np.float64, 2)
    options = (validation, batch_size, 3, transform, None, None)
    memory, held = _sources((x, y, z), *options)
    for data in (
        (stored(tmp_path, x), stored(tmp_path, y, "y"), stored(tmp_path, z, "z")),
        (stored(tmp_path, x), y, z),
    ):
        mapped, mapped_held = _sources(data, *options)
        assert type(memory) is Memory and type(mapped) is Mapped
        assert equal(list(memory.first()), list(mapped.first()))
        assert equal(epochs(_sources((x, y, z), *options)[0]), epochs(mapped))
        assert (held is None) == (mapped_held is None) and equal(list(held or ()), list(mapped_held or ()))


@pytest.mark.parametrize(
    "options", [{}, {"validation": 0.2, "patience": 50}, {"transform": noisy}, {"batch_size": None}]
)
def test_a_fit_from_a_file_is_the_fit_from_memory(tmp_path: Path, options: dict[str, Any]) -> None:
    model, (x, y) = bayesian_linear_regression.example()
    files = stored(tmp_path, x.numpy()), stored(tmp_path, y.numpy().astype(np.float64), "y")
    results = []
    for data in ((x, y), files, (files[0], y)):
        with preserved_rng(0):
            guide = Global(model, x, y, family=FullNormal)
        result = fit(model, guide, *data, **{"epochs": 4, "batch_size": 6, "lr": 0.01, "compile": False, **options})
        results.append((result.history.drop(columns="seconds"), [p.detach().clone() for p in guide.parameters()]))
    for history, parameters in results[1:]:
        assert history.equals(results[0][0]) and equal(parameters, results[0][1])


@pytest.mark.parametrize("validation", [None, 0.1])
def test_no_more_than_a_chunk_is_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation: float | None
) -> None:
    read, counts = MappedArray.read, []

    def counted(self: MappedArray, rows: np.ndarray) -> Tensor:
        counts.append(len(rows))
        return read(self, rows)

    monkeypatch.setattr(MappedArray, "read", counted)
    regression_on(stored(tmp_path, np.ones((5000, 2))), np.zeros(5000), validation=validation, epochs=None, steps=2)
    assert max(counts) == 1000 and sum(counts) < 7000  # the check before training, in chunks; 500 held out; batches


def test_a_vae_on_bytes_in_double_precision(tmp_path: Path) -> None:
    runs = []
    for mapped in (False, True):
        model, (x,) = vae.example()
        with preserved_rng(0):
            guide = Joint(model, x, encoder=mlp(8))
        data = stored(tmp_path, x.numpy().astype(np.uint8)) if mapped else x.numpy().astype(np.uint8)
        fit(
            model,
            guide,
            data,
            steps=9,
            batch_size=8,
            dtype=torch.float64,
            validation=stored(tmp_path, x[:3].numpy(), "v"),
        )
        runs.append([p.detach().clone() for p in (*model.parameters(), *guide.parameters())])
    assert equal(*runs) and runs[0][0].dtype == torch.float64


# --- damaged ---------------------------------------------------------------------------------------------------------


def regression_on(*data: Any, **options: Any) -> Any:
    model, (x, y) = bayesian_linear_regression.example()
    with preserved_rng(0):
        guide = Global(model, x, y, family=FullNormal)
    return fit(model, guide, *data, **{"epochs": 2, "batch_size": 10, "compile": False, **options})


@pytest.mark.parametrize("validation", [None, 0.1])
def test_bad_values_are_named_by_their_row_in_the_file_before_the_first_step(tmp_path: Path, validation: Any) -> None:
    x = np.random.default_rng(0).normal(size=(3000, 2))
    x[[1500, 2999], 1] = np.nan, np.inf
    options = {"validation": validation, "transform": None}
    with pytest.raises(DataError, match=r"column 1 of x has 1 (NaN \(row 1500\)|inf \(row 2999\))"):
        regression_on(stored(tmp_path, x), np.zeros(3000), **options)
    x[[1500, 2999], 1] = 1e300, 0
    with pytest.raises(DataError, match=r"x has 1 value too large for torch.float32 \(row 1500\)"):
        regression_on(stored(tmp_path, x), np.zeros(3000), **options)
    y = np.zeros(3000)
    y[-1] = np.nan
    with pytest.raises(DataError, match=r"y has 1 NaN \(row 2999\)"):
        regression_on(stored(tmp_path, np.zeros((3000, 2))), stored(tmp_path, y, "y"), **options)


def test_a_value_that_breaks_while_training_is_named_by_its_row(tmp_path: Path) -> None:
    """The thread's error is the caller's, with the frames of the thread, and the thread ends."""
    writer = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(ROWS, 2))
    source = Mapped([MappedArray(np.load(tmp_path / "x.npy", mmap_mode="r"), "x")], 5, 0, None, own=torch.arange(9, 49))
    assert sum(len(rows) for _, rows in source.epoch()) == 40
    writer[[11, 30]] = np.nan
    writer[8] = np.nan  # not its own
    seen = 0
    with pytest.raises(DataError, match=r"column 0 of x has \d NaN \(rows? (11|30|11, 30)\)") as caught:
        for _batch, rows in source.epoch():
            seen += len(rows)
    assert seen < 40 and any(entry.name == "read" for entry in caught.traceback)


def test_errors_keep_their_cause_and_their_turn() -> None:
    def make(item: int) -> int:
        if item == 3:
            try:
                raise OSError("disk")
            except OSError as error:
                raise DataError("unreadable") from error
        return item * item

    got = []
    with pytest.raises(DataError, match="unreadable") as caught:
        for value in ahead(make, range(6)):
            got.append(value)
    assert got == [0, 1, 4] and isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda at: (stored(at, np.zeros((30, 2))), np.zeros(29)), "x has 30 rows, y has 29"),
        (
            lambda at: (stored(at, np.array([["a"]] * 30)), np.zeros(30)),
            "x is a memory-mapped array of <U1, not of num",
        ),
        (lambda at: (stored(at, np.zeros((30, 2), complex)), np.zeros(30)), "not of numbers"),
        (lambda at: (stored(at, np.zeros((30, 2))), np.full(30, np.nan)), "y has 30 NaN"),
        (lambda at: (stored(at, np.zeros((30, 3))), np.zeros(30)), r"expected x of shape \(N, 2\)"),
        (lambda at: (stored(at, np.zeros((9, 2))), np.zeros(9)), "batch_size=10 is larger than the data"),
    ],
)
def test_what_a_file_may_hold(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        regression_on(*data(tmp_path))
    assert type(caught.value).__module__ == "dgm.errors"


def test_support_is_checked_in_every_row(tmp_path: Path) -> None:
    def model(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=z.expand(len(x))), obs=x)

    x = np.zeros(2500, np.float32)
    x[2400] = 3.0
    with pytest.raises(DataError, match="outside the support"):
        fit(model, Global(model, torch.zeros(5)), stored(tmp_path, x), batch_size=50, epochs=1)


def test_a_file_that_was_cut_is_an_error_and_no_crash(tmp_path: Path) -> None:
    x = stored(tmp_path, np.zeros((5000, 4)))
    os.truncate(tmp_path / "x.npy", 2000)
    with pytest.raises(DataError, match=r"x: the file .*x.npy is shorter than when it was opened \(2000 bytes"):
        regression_on(x, np.zeros(5000))
    with pytest.raises(DataError, match="shorter than when it was opened"):
        next(Mapped([MappedArray(x, "x")], 10, 0, None).epoch())


def test_a_step_over_all_rows_of_a_file_larger_than_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # sparse: it takes no room
    x = np.memmap(path, np.float32, mode="r").reshape(-1, 2)
    with pytest.raises(OptionError, match=r"without batch_size a step holds all rows, .* GiB"):
        regression_on(x, np.zeros(len(x) // 2), batch_size=None)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_reading_is_at_most_two_ahead_and_ends_when_abandoned() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return item

    items = ahead(make, range(100))
    next(items)
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2] and len(feeding_threads()) == 1
    items.close()
    assert not feeding_threads() and len(made) <= 4


def test_steps_that_end_within_an_epoch_end_the_thread(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = stored(tmp_path, rng.normal(size=(400, 2)))
    assert regression_on(x, np.zeros(400), epochs=None, steps=3).steps == 3
    assert not feeding_threads()

    def fail(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        if feeding_threads():
            raise ZeroDivisionError
        return batch

    with pytest.raises(ZeroDivisionError):
        regression_on(x, np.zeros(400), transform=fail)
    assert not feeding_threads()


def test_ctrl_c_while_a_file_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, read = threading.Event(), MappedArray.read
    main = threading.main_thread()

    def hang(self: MappedArray, rows: np.ndarray) -> Tensor:
        if threading.current_thread() is not main:
            threading.Timer(0.1, signal.pthread_kill, (main.ident, signal.SIGINT)).start()
            release.wait(20)
        return read(self, rows)

    monkeypatch.setattr(MappedArray, "read", hang)
    monkeypatch.setattr("dgm.feeding.PATIENCE", 0.2)
    monkeypatch.setattr("dgm.signals.PATIENCE", 0.2)
    start = time.monotonic()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without one
    try:
        with pytest.raises(Interrupted):
            regression_on(stored(tmp_path, np.zeros((40, 2))), np.zeros(40))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10
    release.set()
    for thread in feeding_threads():
        thread.join(5)


# --- loaders ---------------------------------------------------------------------------------------------------------


def test_a_loader_keeps_its_order_its_types_and_its_errors() -> None:
    x, y = torch.from_numpy(numbers(np.float64)), torch.arange(ROWS)
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    with preserved_rng(0):
        expected = [t for a, b in loader for t in (a.float(), b)]
    with preserved_rng(0):
        found = [t for batch, rows in Loaded(loader, None, None).epoch() for t in batch]
    assert equal(found, expected) and not feeding_threads()
    x[20, 1] = np.nan
    with pytest.raises(DataError, match=r"column 1 of x has 1 NaN \(row 4\)"):
        list(Loaded(DataLoader(TensorDataset(x, y), batch_size=8), None, None).epoch())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu(tmp_path: Path) -> None:
    x, y = numbers(), np.arange(ROWS)
    data = (stored(tmp_path, x), y)
    on_cpu, _ = _sources(data, 0.1, 8, 3, None, None, None)
    on_gpu, held_out = _sources(data, 0.1, 8, 3, None, "cuda", None)
    batches_on_gpu = epochs(on_gpu)
    assert held_out is not None and all(t.is_cuda for t in (*batches_on_gpu, *held_out))
    assert equal([t.cpu() for t in batches_on_gpu], epochs(on_cpu))


# --- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
import numpy as np, pyro, pyro.distributions as dist, torch
from dgm import fit
from dgm.guides.global_ import Global

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def model(x):
    m = pyro.sample("m", dist.Normal(torch.zeros(500), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0).to_event(1), obs=x)

x = np.load(sys.argv[1], mmap_mode="r")
guide = Global(model, torch.zeros(5, 500))
fit(model, guide, np.zeros((2000, 500)), batch_size=20, epochs=1)  # what torch and the model need by themselves
before = peak()
result = fit(model, guide, x, batch_size=20, steps=int(sys.argv[2]))
print(result.steps, peak() - before)
"""


@pytest.mark.slow  # about 8 s: most of it the import in a process of its own
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_stays_far_below_the_file(tmp_path: Path) -> None:
    """A file of 381 MiB is checked whole and read for 300 steps; if pages are not given back, 330 MiB are held."""
    writer = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(200_000, 500))
    writer[::50] = 1.0
    writer.flush()
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "x.npy"), "300"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    steps, grown = out.split()
    assert int(steps) == 300 and float(grown) < 130, f"{grown} MiB of a file of 381 MiB"


@pytest.mark.skipif(not hasattr(__import__("mmap"), "MADV_DONTNEED"), reason="pages cannot be given back here")
def test_pages_are_given_back(tmp_path: Path) -> None:
    writer = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(100_000, 400))
    writer[::20] = 1.0
    del writer
    pages = Path("/proc/self/statm")
    if not pages.exists():
        pytest.skip("needs /proc")

    def resident() -> float:
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    mapped = MappedArray(np.load(tmp_path / "x.npy", mmap_mode="r"), "x")
    mapped[:1000]
    before, most = resident(), 0.0
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(0)).split(20)
    for index in (*(slice(a, a + 1000) for a in range(0, 100_000, 1000)), *order[:300]):
        mapped[index]
        most = max(most, resident() - before)
    assert most < 100, f"{most} MiB of a file of 153 MiB"
    mapped.release()
    assert resident() - before < 20

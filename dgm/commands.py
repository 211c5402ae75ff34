"""What the commands of `dgm` do: each a few lines of the library, between words and files.

Imported by `dgm.cli` when a command runs, so that `dgm --help` waits for nothing.
"""

from __future__ import annotations

import importlib
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import nn
from tqdm import tqdm

from . import registry
from .cell_store import SHARED
from .checks import check_observed
from .compare import compare
from .data import check_batch_size
from .datasets import names
from .entries import guides_of
from .errors import OptionError
from .files import Dataset
from .lock import locked
from .optim import adam
from .pace import Compile
from .programs import owner, preserved_rng, program_name
from .resolve import Maker, data_of, is_file, model_of
from .sites import latents
from .starting import start_pair
from .store import writable

OK, SOME_FAILED, INTERRUPTED = 0, 1, 130


# ------------------------------------------------------------------------------------------------- presets


@dataclass(frozen=True)
class Preset:
    """What is trained unless options say otherwise.

    epochs, batch_size, lr: of training. encoder: widths of the encoder's layers. options: of the model's constructor;
    `hidden` are the widths of its networks.
    """

    epochs: int = 100
    batch_size: int = 100
    lr: float = 1e-3
    encoder: tuple[int, ...] = (128,)
    options: Mapping[str, Any] = field(default_factory=dict)


ANY = "*"
PRESETS: dict[tuple[str, str], Preset] = {
    ("vae", "digits"): Preset(epochs=100, lr=3e-3, encoder=(128,), options={"latent": 8, "hidden": (128,)}),
    ("vae", ANY): Preset(epochs=50, encoder=(400,), options={"latent": 20, "hidden": (400,)}),
    ("deep-latent-gaussian", "digits"): Preset(lr=3e-3, options={"latents": (8, 4), "hidden": (128,)}),
    ("deep-latent-gaussian", ANY): Preset(epochs=50, encoder=(200,), options={"latents": (20, 20), "hidden": (200,)}),
    ("linear-vae", ANY): Preset(encoder=(64,), options={"latent": 2}),
    ("bnn", ANY): Preset(epochs=300, lr=3e-3, options={"hidden": (50,)}),
    ("bayesian-linear-regression", ANY): Preset(epochs=200, lr=1e-2, options={"intercept": True}),
    (ANY, ANY): Preset(),
}
"""By (model, data); `ANY` is every other one."""

SMOKE: dict[str, Any] = {
    "seeds": 1,
    "epochs": 2,
    "samples": 200,
    "jobs": 1,
    "guides": ("diagonal-normal", "full-normal"),
}
"""The smallest size of `dgm compare`."""


def preset(model: str, data: str) -> Preset:
    """The preset of a pair, or the nearest one.

    >>> preset("vae", "digits").options["latent"]
    8
    """
    return next(PRESETS[key] for key in ((model, data), (model, ANY), (ANY, ANY)) if key in PRESETS)


# --------------------------------------------------------------------------------------------- model and data


@dataclass(frozen=True)
class Source:
    """Which model on which data, as options say it."""

    model: str = "vae"
    data: str = "digits"
    data_dir: str | None = None
    split: int | str = 0
    target: str | None = None
    data_seed: int = 0
    binarize: str | None = None


@dataclass(frozen=True)
class Task:
    """A model and data that fit each other, and how to train: what every command starts from."""

    source: Source
    make: Maker
    data: Dataset
    epochs: int
    batch_size: int
    lr: float
    encoder: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of a results folder: safe in any file system."""
        model = self.source.model.rpartition(":")[2] if is_file(self.source.model) else self.source.model
        return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") for part in (model, self.data.name))

    def guides(self, families: Iterable[str] | None, attach: str) -> dict[str, Callable[..., Any]]:
        """Guides by name, families attached, with this task's encoder where there is one."""
        guides = importlib.import_module("dgm.guides")  # by name: the core does not know the zoo
        mlp = importlib.import_module("dgm.guides.encoders").mlp
        chosen = tuple(guides.DEFAULT if families is None else families)
        if not chosen:
            raise OptionError(f"no guide family is named: give some of {', '.join(guides.DEFAULT)}")
        return guides_of(chosen, attach, offers={"encoder": mlp(*self.encoder)})

    def whole(self, seed: int) -> tuple[torch.Tensor, ...]:
        """All training rows, as the model sees them."""
        data = self.data
        return data.train if data.transform is None else data.transform(data.train, torch.Generator().manual_seed(seed))

    def pair(self, guide: Callable[..., Any], seed: int) -> tuple[Any, Any]:
        """Model and guide at the start that `compare` gives them for this seed."""
        return start_pair(self.make, guide, seed, self.whole(seed))


def task(
    source: Source,
    *,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    saved: Mapping[str, Any] | None = None,
) -> Task:
    """Model and data of these names, checked against each other, with a preset for what is not told.

    Args:
        saved: encoder and model options of an earlier run, in place of the preset's.

    Raises:
        DGMError: unknown names, bad data, data outside the support of the model's likelihood, options out of domain.
    """
    data = data_of(
        source.data,
        data_dir=source.data_dir,
        split=source.split,
        target=source.target,
        seed=source.data_seed,
        binarize=source.binarize,
    )
    chosen = preset(source.model.replace("_", "-").lower(), data.name)
    options = dict(saved["options"] if saved else chosen.options)
    make, data = model_of(source.model, data, **({} if is_file(source.model) else options))
    rows = len(data.train[0])
    size = check_batch_size(rows, batch_size) if batch_size is not None else min(chosen.batch_size, rows)
    found = Task(
        source,
        make,
        data,
        epochs or chosen.epochs,
        size,
        chosen.lr if lr is None else lr,
        tuple(saved["encoder"] if saved else chosen.encoder),
        options,
    )
    adam(found.lr)  # refuses a bad step size now
    with preserved_rng(0):
        check_observed(make(), found.whole(0), ("data",))
    return found


@contextmanager
def results_folder(
    out: Path | None, name: str, mark: str, begun: str | None = None, resume: bool = False
) -> Iterator[Path]:
    """A folder that can be written to, made before anything is trained and held until the end; removed if left empty.

    Args:
        mark: a file that finished results have. begun: one that unfinished results have.
        resume: go on with what is there.

    Raises:
        OptionError: it cannot be written to, is in use, holds results already, or nothing that could be gone on with.
    """
    if resume and out is None:
        raise OptionError("--resume goes on with the results in a folder: give it by --out")
    folder = out if out is not None else Path("dgm-runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    while out is None and folder.exists():  # two runs in one second
        folder = folder.with_name(folder.name + "-2")
    existed = folder.exists()
    writable(folder)
    try:
        with locked(folder):
            unfinished = begun is not None and (folder / begun).exists()
            if resume and not unfinished:
                raise OptionError(f"{folder} holds nothing to go on with (no {begun}): leave --resume out")
            if not resume and unfinished and not (folder / mark).exists():
                raise OptionError(f"{folder} was cut short: go on with it by --resume, or give another folder by --out")
            if not resume and (folder / mark).exists():
                raise OptionError(
                    f"{folder} holds results already ({mark}): give another folder by --out, or remove it"
                )
            yield folder
    finally:
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


class _Lines(logging.Handler):
    """Each record as one line on the standard error of this moment, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = " ".join(record.getMessage().split())
            with tqdm.external_write_mode(file=sys.stderr):
                print("warning: " * (record.levelno >= logging.WARNING) + line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextmanager
def log_lines() -> Iterator[None]:
    """What the library logs, shown while a command runs; loggers are left as they were."""
    log, handler = logging.getLogger("dgm"), _Lines(logging.INFO)
    before = log.level
    log.addHandler(handler)
    log.setLevel(min(log.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


HOW: dict[str, Compile] = {"auto": "auto", "trace": "trace", "inductor": "inductor", "eager": False}
"""What `--compile` says, in the library's terms."""


def compile_of(word: str) -> Compile:
    """How a step is to run.

    Raises:
        OptionError: no such way.
    """
    if word not in HOW:
        raise OptionError(f"compile is {word!r}, expected {', '.join(list(HOW)[:-1])} or {list(HOW)[-1]}")
    return HOW[word]


# ------------------------------------------------------------------------------------------------- commands


def run_compare(
    source: Source,
    *,
    guides: tuple[str, ...] | None,
    attach: str,
    seeds: int | None,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    search_lr: bool,
    samples: int | None,
    jobs: int | None,
    out: Path | None,
    smoke: bool,
    compile: str = "auto",
    resume: bool = False,
) -> int:
    """Train and evaluate several guides, print the ranked table, write rows, plots and page; returns the exit code."""
    small, how = SMOKE if smoke else {}, compile_of(compile)
    job = task(source, epochs=epochs or small.get("epochs"), batch_size=batch_size, lr=lr)
    chosen = job.guides(small.get("guides") if guides is None else guides, attach)
    seeds, samples = seeds or small.get("seeds", 3), samples or small.get("samples", 1000)
    runs = len(chosen) * seeds
    jobs = min(jobs or small.get("jobs") or joblib.cpu_count(), runs)
    with results_folder(out, job.name, "rows.parquet", SHARED, resume) as folder:
        data = job.data
        print(
            f"{program_name(_program(job))} on {data.name}: {len(data.train[0])} train, {len(data.test[0])} test rows; "
            f"{plural(len(chosen), 'guide')} x {plural(seeds, 'seed')} = {plural(runs, 'run')} "
            f"of {plural(job.epochs, 'epoch')}, K = {samples}, {plural(jobs, 'process', 'processes')}",
            flush=True,
        )
        result = compare(
            job.make,
            chosen,
            data,
            seeds=seeds,
            epochs=job.epochs,
            batch_size=job.batch_size,
            lr=job.lr,
            search_lr=search_lr,
            num_samples=samples,
            jobs=jobs,
            progress=True,
            folder=folder,
            compile=how,
        )
        result.meta["compile"] = compile
        print(f"\n{result}\n")
        page = saved(lambda: result.save(folder), folder)
    print(f"rows: {folder / 'rows.parquet'}    page: {page}")
    if result.meta.get("interrupted"):
        print(f"interrupted: {len(result.rows)} of {runs} runs were finished, and are written", file=sys.stderr)
        print(f"to go on: the same command with --resume --out {shlex.quote(str(folder))}", file=sys.stderr)
        return INTERRUPTED
    return OK if (result.rows["status"] == "ok").all() else SOME_FAILED


def run_list(what: str) -> int:
    """One line for each model, guide and data set; or the table of which guide goes with what."""
    if what == "compatibility":
        table = importlib.import_module(".compatibility", __package__)
        print(table.to_markdown(table.compatibility()))
        return OK
    sections: dict[str, dict[str, dict[str, str]]] = {
        "models": {"models": _summaries(registry.models())},
        "guides": {
            "guide families": _summaries(registry.families()),
            "ways to attach": _summaries(registry.attachments()),
        },
        "data": {"data sets": names()},
    }
    if what not in ("all", *sections):
        raise OptionError(f"list {what!r}: expected models, guides, data or compatibility")
    if what != "data":
        broken = {item.name: f"cannot be used: {item.error} ({item.source})" for item in registry.broken()}
        sections.setdefault("broken", {"broken": broken} if broken else {})
    parts = []
    for key, tables in sections.items():
        for title, lines in tables.items() if what in ("all", key) or key == "broken" else ():
            width = max(map(len, lines), default=0)
            parts.append("\n".join([f"{title}:", *(f"  {name.ljust(width)}  {text}" for name, text in lines.items())]))
    print("\n\n".join(parts))
    return OK


def run_inspect(source: Source, *, guides: tuple[str, ...] | None, attach: str) -> int:
    """What a model is made of: latents, observed sites, plates, and how many parameters it and its guides have."""
    job = task(source)
    chosen = job.guides(guides, attach)
    batch = job.whole(0)
    with preserved_rng(0):
        model = job.make()
    found = latents(model, *batch)
    lines = {f"model {program_name(model)}": _parameters(model)}
    for name, make in chosen.items():
        lines[f"guide {name}"] = _parameters(job.pair(make, 0)[1])
    print(f"{program_name(model)} on {job.data}\n\nlatents\n{_indented(repr(found))}\n\nobserved")
    for name, node in found.observed.items():
        fn = node["fn"]
        base = fn
        while hasattr(base, "base_dist"):
            base = base.base_dist
        print(f"  {name}  {tuple(node['value'].shape)}  {type(base).__name__}")
    print(
        "\nplates\n" + _indented("\n".join(f"{name}  {frame.size}" for name, frame in found.plates.items()) or "none")
    )
    print("\nparameters")
    width = max(map(len, lines))
    print("\n".join(f"  {name.ljust(width)}  {number:>10,}" for name, number in lines.items()))
    return OK


# ---------------------------------------------------------------------------------------------------- details


def _program(job: Task) -> Any:
    with preserved_rng(0):
        return job.make()


def plural(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def _parameters(program: Any) -> int:
    home = owner(program)
    return sum(p.numel() for p in home.parameters() if p.requires_grad) if isinstance(home, nn.Module) else 0


def _summaries(entries: Mapping[str, registry.Entry]) -> dict[str, str]:
    own = {name: e.summary + ("" if e.source == "dgm" else f" ({e.source})") for name, e in entries.items()}
    return dict(sorted(own.items()))


def saved(write: Callable[[], Path], folder: Path) -> Path:
    try:
        return write()
    except OSError as error:  # a full disk, say
        raise OptionError(f"cannot write to {folder}: {error.strerror or error}") from error

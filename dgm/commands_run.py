"""`dgm train`, `evaluate` and `sample`: one pair, trained, kept in a folder, and taken up again."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .commands import INTERRUPTED, OK, SOME_FAILED, Source, Task, compile_of, plural, results_folder, saved, task
from .digest import digest
from .draws import write_draws
from .entries import entry_name
from .errors import DataError, DGMError, OptionError
from .evaluate import evaluate
from .fit import Fit, Interrupted, Terminated, checked_seed, fit
from .lock import locked
from .pace import Compile
from .posthoc import notes_of
from .programs import program_name
from .recipe import checked_recipe
from .resolve import DATA_ENDINGS, is_file
from .store_run import RECIPE, Run, load_run, save_run

STATES = "checkpoints"
"""Folder inside of a run with the states of its training; gone when it is finished."""
AGAIN = "the same command with --resume goes on"


def run_train(
    source: Source,
    *,
    guide: str,
    attach: str,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int,
    out: Path | None,
    compile: str = "auto",
    resume: bool = False,
) -> int:
    """Train one pair and write it to a folder, or go on where a run was cut short."""
    how = compile_of(compile)
    job = task(source, epochs=epochs, batch_size=batch_size, lr=lr)
    name = entry_name(guide)
    make = job.guides([guide], attach)[name]
    checked_seed(seed)
    with _run_folder(out, f"{job.name}-{name}", resume) as folder:
        model, attached = job.pair(make, seed)
        print(f"{program_name(model)} on {job.data.name} with {name}: {plural(job.epochs, 'epoch')}", flush=True)
        result, code = _fitted(job, model, attached, seed, how, folder)
        saved(lambda: save_run(folder, _spec(job, guide, attach, seed) | {"compile": compile}, result), folder)
        if code == OK:
            shutil.rmtree(folder / STATES)
    last = result.history.iloc[-1:]
    if len(last):
        print(last.dropna(axis=1).to_string(index=False, float_format="{:.6g}".format))
    print(f"steps: {result.steps}    ran: {result.engine}")
    for note in notes_of(result.guide):
        print(f"note: {note}")
    print(f"run: {folder}    stopped: {result.stopped}")
    return code


@contextmanager
def _run_folder(out: Path | None, name: str, resume: bool) -> Iterator[Path]:
    """The folder of a run: a new one, or one that holds a run that was cut short.

    Raises:
        OptionError: nothing there to go on with, or something that must not be overwritten.
    """
    unfinished = out is not None and (out / STATES).is_dir()
    if not resume:
        if unfinished:
            raise OptionError(
                f"{out} holds a run that was cut short: go on with it by --resume, or give another folder"
            )
        with results_folder(out, name, RECIPE) as folder, locked(folder):
            yield folder
        return
    if out is None:
        raise OptionError("--resume goes on with the run in a folder: give it by --out")
    if not unfinished:
        what = "holds a run that is finished" if (out / RECIPE).exists() else "holds no run that was cut short"
        raise OptionError(f"{out} {what}: leave --resume out, and give another folder, to begin one")
    with locked(out):
        yield out


def _fitted(job: Task, model: Any, guide: Any, seed: int, how: Compile, folder: Path) -> tuple[Fit, int]:
    """What training comes to, also where it is cut short: the last good parameters are worth keeping."""
    try:
        bar = sys.stderr.isatty()
        return fit(
            model,
            guide,
            job.data.train,
            epochs=job.epochs,
            batch_size=job.batch_size,
            lr=job.lr,
            seed=seed,
            transform=job.data.transform,
            progress=bar,
            compile=how,
            checkpoint=folder / STATES,
        ), OK
    except DGMError as error:
        kept: Fit | None = getattr(error, "fit", None)
        if kept is None:  # refused before it began
            raise
        print(f"error: {error}\nwhat was trained until then is written", file=sys.stderr)
        return kept, SOME_FAILED
    except Interrupted as interrupted:
        print(f"interrupted: what was trained is written; {AGAIN}", file=sys.stderr)
        return interrupted.fit, INTERRUPTED
    except Terminated as terminated:
        print(f"terminated: what was trained is written; {AGAIN}", file=sys.stderr)
        return terminated.fit, int(terminated.code or 0)


def run_evaluate(
    folder: Path,
    *,
    model: str | None,
    guide: str | None = None,
    data: str | None,
    data_dir: str | None,
    samples: int,
    thorough: bool = False,
    out: Path | None = None,
) -> int:
    """Evaluate a trained pair on the held-out rows: numbers, a sentence for each verdict, and a page."""
    job, run, pair = _restored(folder, model, guide, data, data_dir)
    name = entry_name(run.spec["guide"])
    told = f"{program_name(pair[0])} on {job.data.name} with {name}"
    print(f"{told}, {len(job.data.test[0])} held-out rows", flush=True)
    seed = run.spec["seed"]
    result = evaluate(
        *pair,
        job.data.test,
        num_samples=samples,
        y_std=job.data.y_std,
        seed=seed,
        thorough=thorough,
        train=job.whole(seed),
    )
    result.meta.update(title=f"{name} for {program_name(pair[0])}", data=job.data.name, run=folder.name)
    shape = job.data.image_shape
    if shape is not None:
        result.meta["images"] = job.data.test[0].reshape(-1, *shape).float().cpu().numpy()
    print(f"{result}\n")
    for verdict in result.verdicts:
        print(f"{verdict.says}\n    {verdict.rests}")
    page = saved(lambda: result.report(folder / "evaluation.html" if out is None else out), folder)
    print(f"page: {page}")
    return OK


def run_sample(
    folder: Path,
    *,
    model: str | None,
    guide: str | None = None,
    data: str | None,
    data_dir: str | None,
    n: int,
    seed: int,
    mean: bool,
    out: Path | None,
) -> int:
    """Write draws from a trained pair."""
    job, _, pair = _restored(folder, model, guide, data, data_dir)
    print(f"samples: {write_draws(*pair, job.data, out, folder, n=n, seed=seed, mean=mean)}")
    return OK


def _spec(job: Task, guide: str, attach: str, seed: int) -> dict[str, Any]:
    """How a run is made again, as plain JSON."""
    source = asdict(job.source)
    source["data_dir"] = os.path.abspath(source["data_dir"]) if source["data_dir"] else None
    if Path(source["data"]).suffix.lower() in DATA_ENDINGS:
        source["data"] = os.path.abspath(source["data"])
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in job.options.items()}
    return {
        "source": source,
        "guide": guide,
        "attach": attach,
        "seed": seed,
        "encoder": list(job.encoder),
        "options": options,
        "rows": digest((*job.data.train, *job.data.test)),
    }


def _restored(
    folder: Path, model: str | None, guide: str | None, data: str | None, data_dir: str | None
) -> tuple[Task, Run, tuple[Any, Any]]:
    """The task and the trained pair of a run.

    Raises:
        OptionError: the run's model or guide is in a file, which only the command line may name: a folder from
            elsewhere must not make code run. DataError: the run is damaged, or its data are not those that it was
            trained on.
    """
    run = load_run(folder)
    spec = checked_recipe(run.spec, folder / RECIPE)
    source = Source(**spec["source"])
    trained, attach, seed, rows = spec["guide"], spec["attach"], spec["seed"], spec["rows"]
    kept = {"encoder": spec["encoder"], "options": spec["options"]}
    for role, was, given in (("model", source.model, model), ("guide", trained, guide)):
        if is_file(was) and given is None:
            raise OptionError(
                f"this run's {role} is in a file: give it by --{role} {was} if you trust it; a run's folder alone "
                "makes no code run"
            )
    told = {"model": model, "data": data, "data_dir": data_dir}
    job = task(Source(**{**asdict(source), **{k: v for k, v in told.items() if v is not None}}), saved=kept)
    if digest((*job.data.train, *job.data.test)) != rows:
        raise DataError(
            f"the rows of {job.source.data!r} are not those that the run in {folder} was trained and tested on: "
            "give the file as it was by --data"
        )
    (make,) = job.guides([guide or trained], attach).values()
    fresh, attached = job.pair(make, seed)
    return job, run, run.restore(fresh, attached, *job.whole(seed))

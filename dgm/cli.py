"""The command line: words in, exit codes out. The work is in `dgm.commands`, imported when a command runs.

Exit codes: 0 all well, 1 some runs failed or something was found, 2 bad usage or input, 130 interrupted, 143 ended.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .cli_bench import bench_app
from .errors import DGMError, OptionError, TrainingError

HELP = """Train deep generative models and Bayesian neural networks with any guide, and compare guides.

Start with `dgm compare`. `dgm list` shows the models, guides and data sets."""

app = typer.Typer(
    help=HELP, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _option(*names: str, help: str, default: str | None = None, **rest: Any) -> Any:
    return typer.Option(*names, help=help, show_default=default if default is not None else True, **rest)


PRESET = "by model and data"
FAMILIES = (  # those of dgm.guides.DEFAULT, written out because --help must not import it
    "diagonal-normal,low-rank-normal,full-normal,inverse-autoregressive-flow,coupling-spline-flow,point"
)
Model = Annotated[str, _option("--model", help="A model of `dgm list models`, or path/to/file.py:name of your own.")]
Data = Annotated[str, _option("--data", help="A data set of `dgm list data`, or a .csv, .npz or .pt file.")]
DataDir = Annotated[
    str | None, _option("--data-dir", help="Folder with data files.", default="$DGM_DATA, else a download")
]
Split = Annotated[str, _option("--split", help="Which split into train and test rows: a number, or a name.")]
Target = Annotated[str | None, _option("--target", help="Column or array of a file to predict.", default="none, or y")]
DataSeed = Annotated[int, _option("--data-seed", min=0, help="Seed of a file's split, of binarization, of made data.")]
Binarize = Annotated[
    str | None,
    _option("--binarize", help="Pixels of images: batch, once, threshold or none.", default="the data set's own"),
]
Attach = Annotated[str, _option("--attach", help="How a family is attached to the model (`dgm list guides`).")]
Guides = Annotated[
    str | None,
    _option(
        "--guides",
        "--guide",
        help="Families or guides of `dgm list guides`, or path/to/file.py:name of your own, comma-separated.",
        default=FAMILIES,
    ),
]
Epochs = Annotated[int | None, _option("--epochs", min=1, help="Passes over the training rows.", default=PRESET)]
BatchSize = Annotated[int | None, _option("--batch-size", min=1, help="Rows in a step.", default=PRESET)]
Rate = Annotated[float | None, _option("--lr", help="Step size of Adam.", default="by model and data")]
Folder = Annotated[Path, typer.Argument(help="What `dgm train` wrote.")]
Compile = Annotated[
    str,
    _option(
        "--compile", help="How a step runs: auto, trace (a graph), inductor (compiled) or eager; the numbers are equal."
    ),
]
RunModel = Annotated[
    str | None, _option("--model", help="path/to/file.py:name, where the run's model is your own.", default="the run's")
]
RunGuide = Annotated[
    str | None, _option("--guide", help="path/to/file.py:name, where the run's guide is your own.", default="the run's")
]
RunData = Annotated[str | None, _option("--data", help="The run's data file, where it has moved.", default="the run's")]
RunDataDir = Annotated[str | None, _option("--data-dir", help="Folder with data files.", default="the run's")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"dgm {__version__}")
        raise typer.Exit


def _go(run: Callable[..., int], *args: Any, quiet: bool = False, **kwargs: Any) -> NoReturn:
    """Run a command's work: its exit code, or an error in one line; quiet shows no log, for which torch is imported."""
    try:
        with nullcontext() if quiet else _work("commands").log_lines():
            code = run(*args, **kwargs)
    except DGMError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1 if isinstance(error, TrainingError) else 2
    except OSError as error:  # a full disk, a name that is too long: of the machine, and no traceback explains more
        if isinstance(error, BrokenPipeError):
            raise
        place = f"{str(error.filename)[:200]}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted: nothing was finished", file=sys.stderr)
        code = 130
    raise typer.Exit(code)


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name for part in text.split(",") if (name := part.strip())) if text is not None else None


def _number(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _work(module: str = "commands") -> Any:
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:  # of a package that dgm needs
        first = str(error).partition("\n")[0]
        raise OptionError(f"the installation is broken ({first}): `dgm doctor` says what and the cure") from error


@app.command()
def compare(
    model: Model = "vae",
    data: Data = "digits",
    guides: Guides = None,
    attach: Attach = "joint",
    seeds: Annotated[int | None, _option("--seeds", min=1, help="Runs of each guide.", default="3")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    search_lr: Annotated[
        bool, _option("--search-lr", help="Find each guide's step size on training rows first.")
    ] = False,
    samples: Annotated[
        int | None, _option("--samples", min=100, help="K of the held-out bound.", default="1000")
    ] = None,
    jobs: Annotated[int | None, _option("--jobs", min=1, help="Worker processes.", default="number of cores")] = None,
    out: Annotated[
        Path | None, _option("--out", help="Folder for the results.", default="dgm-runs/<model>-<data>-<time>")
    ] = None,
    data_dir: DataDir = None,
    binarize: Binarize = None,
    split: Split = "0",
    target: Target = None,
    data_seed: DataSeed = 0,
    compile: Compile = "auto",
    smoke: Annotated[bool, _option("--smoke", help="Smallest size: 2 guides, 1 seed, 2 epochs, 200 samples.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in --out: only runs that are missing or failed are made.")
    ] = False,
) -> None:
    """Which guide for my model? Train several on equal terms and rank them; writes rows, plots and a page."""

    def run() -> int:
        source = _work().Source(model, data, data_dir, _number(split), target, data_seed, binarize)
        return _work().run_compare(
            source,
            guides=_names(guides),
            attach=attach,
            seeds=seeds,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            search_lr=search_lr,
            samples=samples,
            jobs=jobs,
            out=out,
            smoke=smoke,
            compile=compile,
            resume=resume,
        )

    _go(run)


@app.command()
def train(
    model: Model = "vae",
    data: Data = "digits",
    guide: Annotated[
        str, _option("--guide", help="A family or guide of `dgm list guides`, or path/to/file.py:name of your own.")
    ] = "full-normal",
    attach: Attach = "joint",
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Annotated[int, _option("--seed", min=0, help="Of start, data order and noise.")] = 0,
    out: Annotated[
        Path | None, _option("--out", help="Folder for the run.", default="dgm-runs/<model>-<data>-<guide>-<time>")
    ] = None,
    data_dir: DataDir = None,
    binarize: Binarize = None,
    split: Split = "0",
    target: Target = None,
    data_seed: DataSeed = 0,
    compile: Compile = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, which was cut short, to the same numbers.")
    ] = False,
) -> None:
    """Train one model with one guide, and keep the pair: safetensors and JSON."""

    def run() -> int:
        source = _work().Source(model, data, data_dir, _number(split), target, data_seed, binarize)
        return _work("commands_run").run_train(
            source,
            guide=guide,
            attach=attach,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
            out=out,
            compile=compile,
            resume=resume,
        )

    _go(run)


@app.command()
def evaluate(
    folder: Folder,
    samples: Annotated[int, _option("--samples", min=1, help="K of the bound.")] = 5000,
    thorough: Annotated[
        bool,
        typer.Option("--thorough", help="Latent diagnostics, the annealed bound, and where the gap is: minutes."),
    ] = False,
    out: Annotated[Path | None, _option("--out", help="The page.", default="evaluation.html in the run")] = None,
    model: RunModel = None,
    guide: RunGuide = None,
    data: RunData = None,
    data_dir: RunDataDir = None,
) -> None:
    """How good is a trained pair? Bound, k-hat and predictive scores on held-out rows, verdicts, and a page."""
    _go(
        lambda: _work("commands_run").run_evaluate(
            folder,
            model=model,
            guide=guide,
            data=data,
            data_dir=data_dir,
            samples=samples,
            thorough=thorough,
            out=out,
        )
    )


@app.command()
def sample(
    folder: Folder,
    n: Annotated[int, _option("--n", min=1, help="Number of draws.")] = 16,
    out: Annotated[
        Path | None, _option("--out", help="A .png or .csv file.", default="samples.png or samples.csv in the run")
    ] = None,
    seed: Annotated[int, _option("--seed", min=0, help="Of the draws.")] = 0,
    mean: Annotated[bool, _option("--mean/--pixels", help="Images: E[x | z], or x itself.", default="mean")] = True,
    model: RunModel = None,
    guide: RunGuide = None,
    data: RunData = None,
    data_dir: RunDataDir = None,
) -> None:
    """Draw from a trained model: images (PNG), rows (CSV), or predictions of the test inputs (CSV)."""
    _go(
        lambda: _work("commands_run").run_sample(
            folder, model=model, guide=guide, data=data, data_dir=data_dir, n=n, seed=seed, mean=mean, out=out
        )
    )


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(help="A model, as in the other commands; without one the installation is examined."),
    ] = None,
    data: Annotated[
        str | None,
        _option("--data", help="A data set of `dgm list data`, or a .csv, .npz or .pt file.", default="digits"),
    ] = None,
    guide: Annotated[
        str, _option("--guide", help="A family or guide of `dgm list guides`, or path/to/file.py:name of your own.")
    ] = "diagonal-normal",
    attach: Attach = "joint",
    epochs: Epochs = None,
    steps: Annotated[int | None, _option("--steps", min=1, help="Steps of the short training.", default="300")] = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    seed: Annotated[int, _option("--seed", min=0, help="Of start, data order and noise.")] = 0,
    data_dir: DataDir = None,
    binarize: Binarize = None,
    split: Split = "0",
    target: Target = None,
    data_seed: DataSeed = 0,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="The installation: also compile a function, which takes a minute.")
    ] = False,
) -> None:
    """What is wrong, and the cure? Of a model with its guide and data, or of the installation."""

    def run() -> int:
        if model is None:
            if any(value is not None for value in (data, epochs, steps, batch_size, lr, target, binarize)):
                raise OptionError("which model? dgm doctor MODEL --data ...; without any option the installation")
            return _work("commands_doctor").run_environment(thorough)
        return _work("commands_doctor").run_doctor(
            _work().Source(model, data or "digits", data_dir, _number(split), target, data_seed, binarize),
            guide=guide,
            attach=attach,
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=seed,
        )

    _go(run, quiet=model is None)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="models, guides, data, all, or compatibility (a table).")] = "all",
) -> None:
    """Models, guides and data sets, one line each; or which guide goes with what."""
    _go(lambda: _work().run_list(what))


@app.command()
def inspect(
    model: Model = "vae",
    data: Data = "digits",
    guides: Guides = None,
    attach: Attach = "joint",
    data_dir: DataDir = None,
    binarize: Binarize = None,
    split: Split = "0",
    target: Target = None,
    data_seed: DataSeed = 0,
) -> None:
    """What a model is made of: latents, observed sites, plates, numbers of parameters."""

    def run() -> int:
        source = _work().Source(model, data, data_dir, _number(split), target, data_seed, binarize)
        return _work().run_inspect(source, guides=_names(guides), attach=attach)

    _go(run)


app.add_typer(bench_app(_go, _work), name="bench")


_CONTROL = {code: "?" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}
"""What a name from a file could command a terminal with."""


class _Lasting:
    """A stream that goes on in silence when its reader leaves (`dgm compare | head`): results are still written.

    Control characters of names are shown as ?.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text.translate(_CONTROL))
            return len(text)
        except BrokenPipeError:
            return self._leave(len(text))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave(0)

    def _leave(self, written: int) -> int:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # also for what Python itself flushes at its end
        os.close(nowhere)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main() -> None:
    """The console script."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without the sign ± shows ?
        if stream is not None:
            setattr(sys, name, _Lasting(stream))
    app()


if __name__ == "__main__":
    main()

"""The state of a training as plain values and tensors, and back: what a run needs to go on as if it had never stopped.

Parameters and buffers, optimiser and schedule, the place in the data order, every random stream, the history, and what
early stopping has seen.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .digest import digest
from .errors import ModelError, OptionError
from .feeding import Loaded, Memory
from .heldout import spaced
from .mapped import MappedArray
from .pair_weights import load_weights, weights
from .stopping import NoisyPlateau

if TYPE_CHECKING:
    from .options import Options
    from .replicas import Replicas
    from .svi import SVI
    from .training import Run

__all__ = [
    "check_same",
    "fingerprint",
    "group_state",
    "load_group_state",
    "load_progress",
    "load_run_state",
    "progress",
    "random_streams",
    "run_state",
    "set_random_streams",
]

State = dict[str, Any]

MAY_CHANGE = ("epochs", "steps", "progress", "device", "compile", "nonfinite", "skips")
"""Options of `fit` that a training may be resumed with changed: it may last longer, or run in another way."""
EXAMPLE_ROWS = 8
"""Rows of the data that are kept with a pair, to make its guide again."""
RECORD = ("evaluations", "seconds", "cpu_seconds", "error", "why", "early")


def run_state(run: Run) -> State:
    """Everything of a training in progress."""
    run.svi.settle()
    optimiser = run.svi._optimiser()
    return {
        "told": run.told,
        "weights": weights(run.svi.pair),
        "optimiser": optimiser.state_dict(),
        "schedule": None if run.scheduler is None else run.scheduler.state_dict(),
        "random": random_streams(),
        "source": run.source.state(),
        "svi_steps": run.svi.steps,
        "skipped": list(run.svi.skipped),
        "example": list(run.example),
        **progress(run),
    }


def load_run_state(run: Run, state: Mapping[str, Any]) -> None:
    """Set a training that is prepared, and has not begun, to a state; its random streams are left for later.

    Raises:
        ModelError: the state is of another model or guide.
    """
    load_weights(run.svi.pair, state["weights"], "the checkpoint")
    run.svi._optimiser().load_state_dict(state["optimiser"])
    if run.scheduler is not None:
        run.scheduler.load_state_dict(state["schedule"])
        # a schedule's start moves the step size of its optimiser: what was saved is right
        run.svi._optimiser().load_state_dict(state["optimiser"])
    run.svi.steps, run.example = state["svi_steps"], tuple(state["example"])
    run.svi.skipped[:] = state.get("skipped", [])
    load_progress(run, state)


def group_state(engine: Replicas, runs: Sequence[Run], sources: Sequence[Memory], schedulers: Sequence[Any]) -> State:
    """Everything of trainings that run as one, beside the place in the data."""
    optimisers = [svi._optimiser() for svi in engine.svis]
    known = engine.rule is not None  # then the moments are in the stacks
    return {
        "parameters": list(engine.parameters),
        "states": [list(state) for state in engine.states],
        "alive": engine.alive,
        "engine_steps": engine.steps,
        "generators": [generator.get_state() for generator in engine.generators],
        "groups": [[_plain_group(group) for group in optimiser.param_groups] for optimiser in optimisers],
        "optimisers": [] if known else [optimiser.state_dict() for optimiser in optimisers],
        "schedules": [scheduler.state_dict() for scheduler in schedulers],
        "sources": [source.state() for source in sources],
        "random": random_streams(),
        "fixed": [_fixed(svi) for svi in engine.svis],
        "runs": [
            {**progress(run), "svi_steps": run.svi.steps, "skipped": list(run.svi.skipped), "weight": run.at.weight}
            for run in runs
        ],
        "errors": [engine.errors.get(k) for k in range(engine.count)],
    }


def load_group_state(
    engine: Replicas, runs: Sequence[Run], schedulers: Sequence[Any], state: Mapping[str, Any]
) -> None:
    """Set trainings that have not begun, but are prepared, to a state; random streams of data are the caller's.

    Raises:
        ModelError: the state is of other pairs.
    """
    engine.stack()
    names = list(engine.svis[0].parameters)
    for name, mine, saved in zip(names, engine.parameters, state["parameters"], strict=False):
        if mine.shape != saved.shape:
            raise ModelError(
                f"the checkpoint is not of these replicas: parameter {name!r} is {tuple(saved.shape)} there and "
                f"{tuple(mine.shape)} here, replicas first; was the model or the guide changed since?"
            )
    with torch.no_grad():
        for mine, saved in zip(engine.parameters, state["parameters"], strict=True):
            mine.copy_(saved)
        for slots, kept in zip(engine.states, state["states"], strict=True):
            for mine, saved in zip(slots, kept, strict=True):
                mine.copy_(saved)
        engine.alive.copy_(state["alive"])
        for svi, kept in zip(engine.svis, state["fixed"], strict=True):
            for name, value in _fixed(svi).items():
                value.copy_(kept[name])
    engine.steps = state["engine_steps"]
    for generator, streams in zip(engine.generators, state["generators"], strict=True):
        generator.set_state(streams)
    for scheduler, saved in zip(schedulers, state["schedules"], strict=True):
        scheduler.load_state_dict(saved)
    for k, svi in enumerate(engine.svis):
        optimiser = svi._optimiser()
        if state["optimisers"]:
            optimiser.load_state_dict(state["optimisers"][k])
        for group, saved in zip(optimiser.param_groups, state["groups"][k], strict=True):
            group.update(saved)
    for run, saved in zip(runs, state["runs"], strict=True):
        load_progress(run, saved)
        run.svi.steps, run.at.weight = saved["svi_steps"], saved["weight"]
        run.svi.skipped[:] = saved.get("skipped", [])
    engine.errors.update({k: text for k, text in enumerate(state.get("errors", [])) if text is not None})


def _fixed(svi: SVI) -> dict[str, Tensor]:
    """What of a pair is not trained: buffers and frozen parameters."""
    trained = {value.data_ptr() for value in svi.parameters.values()}
    return {name: value for name, value in weights(svi.pair).items() if value.data_ptr() not in trained}


def _plain_group(group: Mapping[str, Any]) -> State:
    """The options of an optimiser's group, without its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def progress(run: Run) -> State:
    """What a training remembers beside its parameters."""
    best = None if run.best is None else [run.best[0], dict(run.best[1])]
    rule = None if run.rule is None else dict(vars(run.rule))
    record = {name: getattr(run, name) for name in RECORD}
    return {**record, "history": columns(run.rows), "best": best, "rule": rule}


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of numbers as an array for each column: thousands of epochs are no text."""
    return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}


def rows_of(found: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """What `columns` took apart.

    >>> rows_of(columns([{"step": 1, "elbo": -2.5}]))
    [{'step': 1, 'elbo': -2.5}]
    """
    return [dict(zip(found, values, strict=True)) for values in zip(*(c.tolist() for c in found.values()), strict=True)]


def load_progress(run: Run, state: Mapping[str, Any]) -> None:
    """Set what `progress` gave."""
    for name in RECORD:
        setattr(run, name, state[name])
    run.rows = rows_of(state["history"])
    like = next(iter(run.svi.parameters.values()))
    if state["best"] is not None:
        value, best = state["best"]
        run.best = (value, {name: tensor.to(like.device) for name, tensor in best.items()})
    if state["rule"] is not None:
        run.rule = NoisyPlateau(state["rule"]["patience"], state["rule"]["z"])
        vars(run.rule).update(state["rule"])


# --- random streams -------------------------------------------------------------------------------------------------


def random_streams() -> State:
    """The random streams of torch, numpy and Python, as they stand."""
    version, numbers, rest = random.getstate()
    kind, words, place, has, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, words.astype(np.int64), place, has, cached],  # type: ignore[union-attr]
        "python": [version, np.array(numbers, dtype=np.int64), rest],
    }


def set_random_streams(state: Mapping[str, Any]) -> None:
    """Set what `random_streams` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, words, place, has, cached = state["numpy"]
    np.random.set_state((kind, words.astype(np.uint32), place, has, cached))
    version, numbers, rest = state["python"]
    random.setstate((version, tuple(int(n) for n in numbers), rest))


# --- what was asked for ---------------------------------------------------------------------------------------------


def fingerprint(
    options: Options, source: Memory | Loaded, held_out: Sequence[Tensor] | None = None, **more: Any
) -> dict[str, Any]:
    """What a training was told, in words that two processes agree on, and a fingerprint of its rows."""
    told = {f.name: words(getattr(options, f.name)) for f in fields(options)}
    told["validation"] = None if held_out is None else rows_digest(held_out)
    told["data"] = source.rows if isinstance(source, Loaded) else rows_digest(source.all_rows())
    return told | {name: words(value) for name, value in more.items()}


def rows_digest(data: Sequence[Any]) -> str:
    """A fingerprint of arrays: shapes, and at most a thousand rows; a file larger than memory is not read."""
    shapes = [tuple((t.array if isinstance(t, MappedArray) else t).shape) for t in data]
    return digest([*shapes, *(t[spaced((torch.empty(len(t), 0),), 1000)[1].to(t.device)] for t in data)])


def words(value: Any) -> Any:
    """An option as plain JSON: functions and classes by their names, arrays by a fingerprint."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, partial):
        told = [words(value.func), [words(a) for a in value.args], {k: words(v) for k, v in value.keywords.items()}]
        return ["partial", *told]
    if isinstance(value, (Tensor, np.ndarray)):
        return "array " + rows_digest([torch.as_tensor(value)])
    if isinstance(value, Mapping):
        return {str(key): words(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [words(item) for item in value]
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    inside = {name: words(item) for name, item in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    return [f"{type(value).__module__}.{type(value).__qualname__}", inside]


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Any) -> None:
    """Refuse to go on with a training that was told something else.

    Raises:
        OptionError: the first option that differs, with both values; or a training that was longer than is asked now.
    """
    for name in sorted({*saved, *now} - set(MAY_CHANGE)):
        if saved.get(name) != now.get(name):
            here, there = now.get(name), saved.get(name)
            what = f"{name} is {here!r} here and {there!r} there" if name != "data" else "the training rows are others"
            raise OptionError(
                f"{folder} holds a training that this one does not continue: {what}. Give what it was begun with, or "
                "another folder"
            )


def example_of(batch: Sequence[Any]) -> tuple[Tensor, ...]:
    """A few rows of a batch, for making a guide again."""
    return tuple(t[:EXAMPLE_ROWS].detach().cpu().clone() for t in batch if isinstance(t, Tensor) and t.dim())


def after_skipping(run: Run, state: Mapping[str, Any]) -> Callable[[], None]:
    """What to call when the batches that were trained on have been passed over."""

    def then() -> None:
        run.source.restore(state["source"])
        set_random_streams(state["random"])

    return then

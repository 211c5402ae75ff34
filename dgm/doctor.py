"""What is wrong with my model? The checks, a short instrumented training, and every known symptom."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .borrowed import copied, copied_programs, quietly, restored
from .case import Case, NotSeen
from .checks import check_all_rows
from .course import run_course
from .dataflow import Reading, read_pair
from .errors import DataError, DGMError, GuideError, ModelError, OptionError, did_you_mean
from .feeding import Batch, Loaded, Memory, Transform, _sources
from .findings import Diagnosis, Finding
from .heldout import spaced
from .mapped import MappedArray
from .optim import adam
from .options import checked_seed
from .pair import Pair, batch_rows, chunk_of
from .posthoc import finishers
from .programs import Program, floating_type, owner, preserved_buffers, preserved_rng, program_name
from .sites import DATA_PLATE
from .starting import maker
from .symptoms import Look, symptoms

__all__ = ["doctor"]

SEEN = 2000
"""Rows that symptoms look at, evenly spaced, where the training takes minibatches."""


def doctor(
    model: Program,
    *data: Any,
    guide: Any = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    steps: int = 300,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    transform: Transform | None = None,
    loss: Any = None,
    validation: float | Any | None = None,
    checks: Iterable[str] | None = None,
) -> Diagnosis:
    """Findings about a model, its guide and its data, in order of harm, each with evidence, consequence and cure.

    The checks that stand before every training, then a short training with instruments (Adam), then the symptoms of
    `dgm.symptoms`. The caller's own pair and random stream stay as they are.

    Args:
        model: a model, or a maker of one (a class, a function without arguments).
        data: arrays with rows first, as `dgm.fit` takes them, or one DataLoader.
        guide: an attached guide, a callable `(model, *batch) -> guide`, or None for `Joint`.
        batch_size, lr, loss, transform, sizes, seed: as in `dgm.fit`; give what the real training will have.
        steps: of the short training; at least 20.
        validation: share of the rows, or rows, to hold out; None for none. Some checks then judge by them.
        checks: names of the symptoms to look for; all of `dgm.symptoms.symptoms()` unless told.

    Returns:
        a `Diagnosis`; false where nothing is found.

    Raises:
        OptionError: an option out of its domain.

    >>> from dgm.models.linear_vae import example
    >>> model, (x,) = example()
    >>> found = doctor(model, x, steps=20)
    >>> found.course.steps, "posterior collapse" in found.looked
    (20, True)
    """
    begin = time.perf_counter()
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 20:
        raise OptionError(f"steps is {steps!r}, expected a whole number, at least 20")
    seed = checked_seed(seed)
    adam(lr)  # refuses a bad step size now
    chosen = _chosen(checks)
    found: list[Finding] = []
    with preserved_rng(seed), contextlib.ExitStack() as stack:
        case = _case(found, stack, model, guide, data, batch_size, lr, steps, seed, sizes, transform, loss, validation)
        if case is not None:
            _train(case, found)
        looked, skipped, notes = _look(case, found, chosen)
    course = case.held.get("course") if case is not None else None
    return Diagnosis(tuple(found), looked, skipped, notes, time.perf_counter() - begin, course)


def _chosen(checks: Iterable[str] | None) -> dict[str, Look]:
    known = symptoms()
    if checks is None:
        return known
    names = [checks] if isinstance(checks, str) else list(checks)
    for name in names:
        if name not in known:
            raise OptionError(f"unknown check {name!r}: {did_you_mean(name, known)}")
    return {name: known[name] for name in names}


def _case(
    found: list[Finding],
    stack: contextlib.ExitStack,
    model: Any,
    guide: Any,
    data: tuple[Any, ...],
    batch_size: int | None,
    lr: float,
    steps: int,
    seed: int,
    sizes: Mapping[str, int] | None,
    transform: Transform | None,
    loss: Any,
    validation: Any,
) -> Case | None:
    """The pair and its data, as far as they can be made; what cannot is a finding."""
    with _refusals(found):
        make = maker(model)
        attached = isinstance(guide, nn.Module) or isinstance(owner(guide), nn.Module)
        if attached and make is model:
            raise OptionError(
                "guide is an attached guide and model a maker: give the model that it was attached to, or a guide's "
                "maker (model, *batch) -> guide"
            )
        if attached:
            own, guide = copied_programs(model, guide)
        else:
            own = make()
        stack.enter_context(preserved_buffers(model, guide))  # an autoguide runs the model that it was made with
        stack.enter_context(restored(own, guide))

        def renew() -> tuple[Memory | Loaded, Batch | None]:
            return _sources(data, validation, batch_size, seed, transform, None, floating_type(own))

        source, held_out = renew()
        full = dict(sizes) if sizes is not None else source.sizes(own)
        plates = {DATA_PLATE, *full}
        seen, places = _rows(source, seed)
        refused: list[Finding] = []
        with _refusals(refused):
            if isinstance(source, Memory):
                check_all_rows(own, source.all_rows(), plates, whole=source.whole, transform=transform)
            if held_out is not None:
                check_all_rows(own, held_out, plates)
        found += refused
        if not attached:
            guide = _guide(own, guide, seen, plates)
        batch = source.first()
        rows = torch.arange(len(batch[0]), device=batch[0].device)
        case = Case(
            Pair(own, guide, loss),
            source,
            batch,
            rows,
            seen,
            places,
            full,
            held_out,
            lr,
            steps,
            seed,
            loss,
            lambda: renew()[0],
        )
        if refused:
            case.why = "the checks before the training refused the data"
        return case
    return None


def _guide(model: Program, guide: Any, rows: Batch, plates: set[str]) -> Any:
    """The guide: a default one, what a maker makes, or a program as it stands."""
    if guide is None:
        guides = importlib.import_module("dgm.guides.joint")  # by name: the core does not know the zoo
        return guides.Joint(model, *rows, plates=plates)
    if not callable(guide):
        raise OptionError(f"guide is {guide!r}, expected a guide, a callable (model, *batch) -> guide, or None")
    return guide(model, *rows) if _makes(guide, model, rows) else guide


def _makes(guide: Callable[..., Any], model: Any, rows: Batch) -> bool:
    """Whether a callable makes a guide of a model, rather than being one that is called as the model is."""
    try:
        signature = inspect.signature(guide)
    except (TypeError, ValueError):
        return True

    def takes(*arguments: Any) -> bool:
        try:
            signature.bind(*arguments)
        except TypeError:
            return False
        return True

    first = next(iter(signature.parameters), "")
    return takes(model, *rows) and (isinstance(guide, type) or first == "model" or not takes(*rows))


def _rows(source: Memory | Loaded, seed: int) -> tuple[Batch, Tensor]:
    """Rows for the symptoms to look at, and their numbers."""
    if not isinstance(source, Memory):
        batch = source.first()
        return batch, torch.arange(len(batch[0]))
    if source.whole or source.rows <= SEEN:
        return source.everything(seed), torch.arange(source.rows)
    _, places = spaced((torch.zeros(source.rows),), SEEN)
    numbers = source.numbers(places)
    batch = tuple(t.read(numbers.numpy()) if isinstance(t, MappedArray) else t[numbers] for t in source.tensors)
    if source.transform is not None:
        batch = source.transform(batch, torch.Generator(source.device).manual_seed(seed))
    return batch, places


def _train(case: Case, found: list[Finding]) -> None:
    """Read the pair, train a copy of it, read that; what fails stands in the case with its reason."""
    if case.why:  # the data were refused: what can be read off the program is read all the same
        case.held["before"] = _reading(case, case.first)
        return
    refused: list[Finding] = []
    with _refusals(refused), batch_rows(case.index):
        case.held["latents"] = case.first.check(case.batch, case.plates)
    case.held["before"] = _reading(case, case.first)
    if not refused and finishers(case.first.guide) and not case.first.parameters():
        case.why = f"{program_name(case.first.guide)} is made by its finish, without a training"
        return
    if not refused:
        with _refusals(refused):
            pair = copied(case.first, case.loss)
            options: dict[str, Any] = {"steps": case.steps, "lr": case.lr, "loss": case.loss, "seed": case.seed}
            with quietly():
                course = run_course(pair.model, pair.guide, case.source, sizes=case.sizes, **options)
            case.held["course"], case.trained = course, pair
            case.held["after"] = _reading(case, pair)
    if refused:
        case.why = "the checks before the training refused the pair"
    found += refused


def _reading(case: Case, pair: Pair) -> Reading | None:
    """One run on the rows to look at; on the first minibatch where the pair takes no others."""
    for rows, places in ((case.rows, case.places), (case.batch, case.index)):
        try:
            with chunk_of(case.source.rows, places):
                found = read_pair(pair, rows, case.seed, case.sizes)
            case.rows, case.places = rows, places
            return found
        except Exception as error:  # the user's own code may fail in any way
            case.unread = " ".join(f"the pair cannot be run: {type(error).__name__}: {error}".split())[:200]
    return None


def _look(
    case: Case | None, found: list[Finding], chosen: Mapping[str, Look]
) -> tuple[tuple[str, ...], dict[str, str], tuple[str, ...]]:
    """Every symptom; one that cannot be looked at, or fails, is said and takes nothing with it."""
    looked, skipped = ["checks before training"], {}
    for name, look in chosen.items():
        if case is None:
            skipped[name] = "model, guide or data could not be made"
            continue
        try:
            with preserved_rng(case.seed):
                found += list(look(case))
            looked.append(name)
        except NotSeen as reason:
            skipped[name] = str(reason)
        except Exception as error:  # a symptom may meet programs that nobody thought of
            skipped[name] = f"it failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return tuple(looked), skipped, tuple(case.notes) if case is not None else ()


@contextlib.contextmanager
def _refusals(found: list[Finding]) -> Iterator[None]:
    """What a check refuses becomes a finding; options of the doctor itself are refused as ever."""
    try:
        yield
    except OptionError:
        raise
    except DGMError as error:
        part = {DataError: "data", ModelError: "model", GuideError: "guide"}.get(type(error), "training")
        found.append(_refusal(part, str(error)))
    except Exception as error:  # the user's own code may fail in any way
        found.append(_refusal("model", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def _refusal(part: str, message: str) -> Finding:
    says, _, cure = message.rpartition("; ")
    return Finding(
        name="refused",
        part=part,
        harm=3,
        evidence=says or message,
        consequence="dgm.fit refuses it; what does not refuse it trains on wrong numbers, or dies later",
        cure=cure if says else "as it says; then look again, for nothing behind it was looked at",
        size=float("inf"),
    )

"""What a comparison refuses before anything is trained: bad options, and a model or data that no guide could cure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .cells import Settings, start
from .checks import check_all_rows
from .data import check_batch_size
from .errors import DGMError, ModelError, OptionError, did_you_mean
from .fit import checked_seed, fit
from .optim import adam
from .programs import preserved_rng
from .sites import DATA_PLATE


def check_options(
    guides: Mapping[str, Any],
    train: tuple[Tensor, ...],
    epochs: int,
    batch_size: int | None,
    lr: float,
    num_samples: int,
    jobs: int,
    fit_options: Mapping[str, Any],
) -> None:
    """Refuse what no run could be made with."""
    if not isinstance(guides, Mapping) or not guides:
        raise OptionError(f"guides is {guides!r}, expected {{name: (model, *batch) -> guide}} with one guide or more")
    for name, guide in guides.items():
        if not callable(guide) or isinstance(guide, nn.Module):
            raise OptionError(
                f"guides[{name!r}] is {type(guide).__name__}, expected a callable (model, *batch) -> guide"
            )
    for name, value, least in (("epochs", epochs, 1), ("num_samples", num_samples, 100), ("jobs", jobs, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            why = ": k-hat needs a tail to look at" if name == "num_samples" else ""
            raise OptionError(f"{name} is {value!r}, expected a whole number, at least {least}{why}")
    check_batch_size(len(train[0]), batch_size)
    adam(lr)  # refuses a bad step size now
    if "checkpoint" in fit_options:
        raise OptionError("checkpoint is of one training: a comparison keeps its finished runs by folder=...")
    known = set(inspect.signature(fit).parameters) - {"model", "guide", "data"}
    for name in fit_options:
        if name not in known:
            raise OptionError(f"unknown option {name!r} of compare and fit: {did_you_mean(name, known)}")


def checked_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(seeds, bool | str) or not (isinstance(seeds, int) or hasattr(seeds, "__iter__")):
        raise OptionError(f"seeds is {seeds!r}, expected how many, or a sequence of whole numbers")
    chosen = tuple(checked_seed(s) for s in (range(seeds) if isinstance(seeds, int) else seeds))
    if not chosen or len(set(chosen)) != len(chosen):
        raise OptionError(f"seeds is {list(chosen)}, expected at least one, each once")
    return chosen


def check_model(
    make: Callable[[], Any],
    guides: Mapping[str, Callable[..., Any]],
    seed: int,
    train: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...],
    settings: Settings,
) -> bool:
    """Hold model and data against each other, where no guide could help; whether the model has global latents."""
    with preserved_rng(seed):
        model = make()
        if not callable(model):
            raise ModelError(f"the maker gave a {type(model).__name__}, expected a model: a module or a function")
        plates = {DATA_PLATE, *(settings.fit_options.get("sizes") or {})}
        one_batch = settings.batch_size in (None, len(train[0]))
        found = check_all_rows(model, train, plates, whole=one_batch, transform=settings.fit_options.get("transform"))
        check_all_rows(model, held_out, plates)
    first: Exception | None = None
    for guide in guides.values():
        try:
            start(make, guide, seed, train, settings)
            break
        except Exception as error:  # of one guide: its rows will say so
            first = first or error
    else:
        if isinstance(first, DGMError):
            raise first  # nothing can be trained
    return bool(found.global_)

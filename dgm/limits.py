"""The domains of the options of a training: one place for Python, files and the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from .errors import OptionError


def check_limits(options: Any) -> None:
    """Refuse an option of `fit` that is out of its domain, before anything is made; `options` has them as attributes.

    Raises:
        OptionError: the message names the option, its value and what is expected.
    """
    for name in ("kl_warmup", "kl_weight"):
        check_number(name, getattr(options, name))
    check_whole("validate_every", options.validate_every, 1, "a number of epochs")
    if options.patience is not None:
        check_whole("patience", options.patience, 2, "a number of validations")
    share = options.validation
    if isinstance(share, bool | int | str) or (isinstance(share, float) and not 0 < share < 1):
        raise OptionError(
            f"validation is {share!r}, expected the share of the rows to hold out, between 0 and 1, or held-out arrays"
        )
    sizes = options.sizes
    if sizes is not None and not (isinstance(sizes, Mapping) and all(isinstance(plate, str) for plate in sizes)):
        raise OptionError(
            f"sizes is {sizes!r}, expected {{plate name: rows of the full data}}, such as {{'data': 60000}}"
        )
    for name, example in (
        ("transform", "lambda batch, generator: batch"),
        ("schedule", "lambda optimiser: torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)"),
    ):
        value = getattr(options, name)
        if value is not None and not callable(value):
            raise OptionError(f"{name} is {value!r}, expected a function such as {example}")
    if options.dtype is not None and not isinstance(options.dtype, torch.dtype):
        raise OptionError(f"dtype is {options.dtype!r}, expected a torch dtype such as torch.float64")
    check_device(options.device)


def check_number(name: str, value: Any) -> None:
    """A finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
        raise OptionError(f"{name} is {value!r}, expected a number >= 0")


def check_whole(name: str, value: Any, least: int, what: str) -> None:
    """A whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} is {value!r}, expected {what} >= {least}")


def check_device(device: Any) -> None:
    """A device that this machine has.

    Raises:
        OptionError: it is no device, holds no values ("meta"), or is not here.
    """
    if device is None:
        return
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise OptionError(f"device is {device!r}, expected one such as 'cpu' or 'cuda:0' ({first})") from error
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "meta": 0}
    if (place.index or 0) >= here.get(place.type, 2**31):
        has = [kind for kind, count in here.items() if count]
        raise OptionError(f"device is {device!r}, which this machine does not have (it has {', '.join(has)})")


__all__ = ["check_device", "check_limits", "check_number", "check_whole"]

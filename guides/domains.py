"""Sizes and scales out of their domain, refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from dgm.errors import OptionError

__all__: list[str] = []  # nothing for the registry


def check_size(name: str, value: Any, least: int = 1, why: str = "") -> None:
    """Refuse what is no whole number, or below the least.

    Args:
        name: what it is called, "PlanarFlow: transforms". value: what came. why: what the message ends with.

    Raises:
        OptionError: with the name and the value.

    >>> check_size("PlanarFlow: transforms", 2)
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(f"{name} must be a whole number, at least {least}, got {value!r}{why}")
    if value < least:
        raise OptionError(f"{name} must be at least {least}, got {value}{why}")


def check_widths(name: str, hidden: Sequence[Any]) -> None:
    """Refuse hidden layers that are none, or have a width below 1.

    Raises:
        OptionError: with the name and what came.

    >>> check_widths("PlanarFlow", (64, 64))
    """
    if isinstance(hidden, str) or not isinstance(hidden, Sequence) or not hidden:
        raise OptionError(f"{name}: hidden needs one width or more, as (64,), each >= 1, got {hidden!r}")
    if any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in hidden):
        raise OptionError(f"{name}: hidden needs one width or more, each a whole number >= 1, got {hidden!r}")


def check_scale(name: str, value: Any) -> None:
    """Refuse what is no positive finite number.

    Raises:
        OptionError: with the name and the value.

    >>> check_scale("Global: init_scale", 0.1)
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise OptionError(f"{name} must be positive and finite, got {value!r}")

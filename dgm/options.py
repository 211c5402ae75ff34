"""What `fit` was told, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .errors import OptionError
from .feeding import Transform
from .limits import check_limits
from .nonfinite import Guard, Policy
from .pace import Compile
from .schedules import KLSchedule

__all__ = ["Options", "Plan", "checked_seed"]


@dataclass(frozen=True)
class Plan:
    """The options of one training that are numbers; checked once."""

    epochs: int | None
    steps: int | None
    kl_warmup: float
    seed: int
    kl: float = 1.0
    kl_schedule: KLSchedule | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} is {value!r}, expected a positive whole number")
        if (self.epochs is None) == (self.steps is None):
            raise OptionError("give epochs or steps, one of them")
        if not 0 <= self.kl_warmup < math.inf:
            raise OptionError(f"kl_warmup is {self.kl_warmup!r}, expected a number of {self.unit}s >= 0")
        if self.kl_schedule is not None and (self.kl_warmup or not callable(self.kl_schedule)):
            raise OptionError(
                "kl_schedule is a function of the time, such as dgm.schedules.cyclical(10), instead of kl_warmup"
            )
        if not 0 <= self.kl < math.inf:
            raise OptionError(f"kl_weight is {self.kl!r}, expected a number >= 0; 1 for the ELBO")

    @property
    def unit(self) -> str:
        return "epoch" if self.epochs is not None else "step"

    def total(self, steps_per_epoch: int) -> int:
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch

    def kl_weight(self, step: int, steps_per_epoch: int) -> float:
        if self.kl_schedule is not None:
            weight = float(self.kl_schedule((step + 1) / (1 if self.unit == "step" else steps_per_epoch)))
            if not 0 <= weight < math.inf:
                raise OptionError(f"kl_schedule gives {weight!r} at step {step + 1}, expected a weight >= 0")
            return self.kl * weight
        length = self.kl_warmup * (1 if self.unit == "step" else steps_per_epoch)
        return self.kl if length == 0 else self.kl * min(1.0, (step + 1) / length)


def checked_seed(seed: Any) -> int:
    """A seed as torch takes it.

    Raises:
        OptionError: not a whole number in [0, 2**63).
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**63:
        raise OptionError(f"seed is {seed!r}, expected a whole number from 0 to 2**63 - 1")
    return int(seed)


@dataclass(frozen=True)
class Options:
    """What `fit` was told, checked once; see there."""

    epochs: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    optim: Any = None
    lr: float = 1e-3
    loss: Any = None
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    clip: float | None = None
    kl_warmup: float = 0.0
    kl_weight: float = 1.0
    kl_schedule: KLSchedule | None = None
    validation: float | Any | None = None
    validate_every: int = 1
    patience: int | None = None
    seed: int = 0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    progress: bool = False
    transform: Transform | None = None
    sizes: Mapping[str, int] | None = None
    compile: Compile = "auto"
    nonfinite: Policy = "stop"
    skips: int = 10

    def __post_init__(self) -> None:
        check_limits(self)
        Guard(self.nonfinite, self.skips)
        self.plan(self.seed, self.kl_weight)
        if self.patience is not None and self.validation is None:
            raise OptionError("patience needs held-out data: give validation=0.1, or arrays")
        if isinstance(self.validate_every, bool) or self.validate_every < 1:
            raise OptionError(f"validate_every is {self.validate_every!r}, expected a number of epochs >= 1")

    def plan(self, seed: int, kl_weight: float) -> Plan:
        """How long, with which seed and KL weight; 100 epochs unless told."""
        epochs = 100 if self.epochs is None and self.steps is None else self.epochs
        return Plan(epochs, self.steps, self.kl_warmup, checked_seed(seed), kl_weight, self.kl_schedule)

    def single(self, seed: int, lr: float, kl_weight: float) -> dict[str, Any]:
        """The arguments of `fit` for one replica."""
        own = {"seed": seed, "lr": lr, "kl_weight": kl_weight, "progress": False}
        return {f.name: getattr(self, f.name) for f in fields(self)} | own

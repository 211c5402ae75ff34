"""What came of a training, and how one that was asked to end says so."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import pandas as pd

from .programs import Program

__all__ = ["HISTORY", "Fit", "Interrupted", "Stop", "Terminated"]

HISTORY = "epoch step evaluations elbo kl_weight lr valid_elbo valid_se seconds".split()


@dataclass
class Fit:
    """A trained pair and how it came about.

    Attributes:
        model, guide: the trained pair, in place.
        history: one row for each epoch (or step): epoch, step, evaluations, elbo (training, nats a datum), kl_weight,
            lr, valid_elbo and valid_se (nats a datum; NaN where not validated), seconds. The last row's valid_elbo is
            that of the finished guide, where the guide has a `finish`.
        steps, evaluations: optimiser steps; model density evaluations (rows times particles), `finish` included.
        seconds, cpu_seconds: wall-clock and process time of training and of the guide's `finish`, validation apart; a
            replica's share of its group.
        stopped: why training ended.
        error: of a replica that met a value that is not finite; None for all others.
        engine: how the steps ran: "eager", "trace" or "inductor", and why not faster.
    """

    model: Program
    guide: Program
    history: pd.DataFrame = field(default_factory=pd.DataFrame)
    steps: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    stopped: str = ""
    seed: int = 0
    error: str | None = None
    engine: str = ""

    def __repr__(self) -> str:
        last = f", elbo {self.history['elbo'].iloc[-1]:.4g} nats a datum" if len(self.history) else ""
        return f"Fit({self.steps} steps in {self.seconds:.1f} s{last}; {self.stopped})"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `fit`; `fit` is what was finished, and the pair holds the parameters of its last whole step.

    fits: the same of each replica, by its number.
    """

    def __init__(self, fit: Fit, fits: dict[int, Fit] | None = None):
        super().__init__(f"interrupted after {fit.steps} steps")
        self.fit, self.fits = fit, fits or {}


class Terminated(SystemExit):
    """SIGTERM during a `fit` with checkpoints: the step was finished and saved, and the process ends with code 143.

    fit, fits: as those of `Interrupted`.
    """

    def __init__(self, fit: Fit, fits: dict[int, Fit] | None = None):
        super().__init__(143)
        self.fit, self.fits = fit, fits or {}


class Stop(Exception):
    """A signal asked for the end, after this step."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def ended(self, fit: Fit, fits: dict[int, Fit] | None = None) -> BaseException:
        """What the caller of `fit` gets to see."""
        return Interrupted(fit, fits) if self.number == signal.SIGINT else Terminated(fit, fits)

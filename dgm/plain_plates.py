"""A model whose plates are what they hold: no declared size of the full data, so no scale and no random subsample."""

from __future__ import annotations

from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import nn

from .programs import Program, with_home

__all__ = ["PlainPlates"]


class PlainPlates(nn.Module):
    """The program with N / B taken out of every plate that declares its full size N.

    What is asked of one datum alone, as its evidence and its best q, has no scale. A plate that draws its subsample is
    given the first indices, so that the program has no randomness but its latents'.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro import poutine
    >>> def model(x):
    ...     with pyro.plate("data", 1000, subsample_size=len(x)):
    ...         pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
    >>> poutine.trace(PlainPlates(model)).get_trace(torch.zeros(3)).nodes["x"]["scale"]
    1.0
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, home = with_home(program)
        if self.program is not home:
            self.home = home  # the object of a bound method: its parameters are those of this module too

    def forward(self, *batch: Any, **kwargs: Any) -> Any:
        with _Plain():
            return self.program(*batch, **kwargs)


class _Plain(Messenger):
    def _pyro_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            count = msg["fn"].subsample_size
            if msg["value"] is None and count is not None:
                msg["value"], msg["done"] = torch.arange(count, device=msg["fn"].device), True
            return
        frames = []
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and frame.full_size not in (None, frame.size):
                msg["scale"] = msg["scale"] * (frame.size / frame.full_size)
                frame = frame._replace(full_size=frame.size)
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)

"""One torch optimiser over all parameters of a pair, from whatever the user has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from .errors import GuideError, OptionError


def adam(lr: float = 1e-3, **options: Any) -> Any:
    """A factory for Adam (Kingma and Ba, "Adam: a method for stochastic optimization", 2015), one fused kernel.

    >>> optimiser = adam(1e-3)([torch.zeros(2, requires_grad=True)])
    >>> isinstance(optimiser, torch.optim.Adam)
    True
    """
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < float("inf"):
        raise OptionError(f"lr is {lr!r}, expected a positive number such as 1e-3")
    return partial(torch.optim.Adam, lr=lr, fused=True, **options)


def make_optimiser(optim: Any, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """A torch optimiser that holds every parameter.

    Args:
        optim: a factory called with the list of parameters, a ready torch optimiser, or a PyroOptim.
        parameters: the trainable parameters of the pair, by name.

    Raises:
        GuideError: a ready optimiser misses a parameter; the message names it.
        OptionError: none of the three, or a PyroOptim with features that have their own option here.
    """
    if isinstance(optim, PyroLRScheduler):
        raise OptionError("optim is a Pyro scheduler: give its optimiser, and the torch scheduler to fit(schedule=...)")
    if isinstance(optim, PyroOptim):
        return _from_pyro(optim, parameters)
    if isinstance(optim, torch.optim.Optimizer):
        for group in optim.param_groups:
            if not 0 <= float(group.get("lr", 0.0)) < float("inf"):
                raise OptionError(f"the optimiser's lr is {group['lr']!r}, expected a number >= 0 such as 1e-3")
        held = {id(p) for group in optim.param_groups for p in group["params"]}
        missing = [name for name, p in parameters.items() if id(p) not in held]
        if missing:
            raise GuideError(
                f"the optimiser does not hold {', '.join(map(repr, missing))} of the pair, which would never be "
                "trained: give a factory, e.g. partial(torch.optim.Adam, lr=1e-3)"
            )
        return optim
    if not callable(optim):
        raise OptionError(f"optim is {optim!r}, expected a factory such as partial(torch.optim.Adam, lr=1e-3)")
    optimiser = optim(list(parameters.values()))
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise OptionError(f"optim made a {type(optimiser).__name__}, expected a torch optimiser")
    return make_optimiser(optimiser, parameters)


def _from_pyro(optim: PyroOptim, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    if optim.pt_clip_args:
        raise OptionError(
            "the PyroOptim clips gradients one parameter at a time: leave clip_args out and give clip=..."
        )
    constructor: Any = optim.pt_optim_constructor  # Pyro declares an optimiser where it holds the class
    arguments = optim.pt_optim_args
    if isinstance(arguments, dict):
        return constructor(list(parameters.values()), **arguments)
    if len(inspect.signature(arguments).parameters) != 1:
        raise OptionError(
            "the PyroOptim's argument function takes two names (deprecated in Pyro): take one, the full name"
        )
    groups = [{"params": [p], **arguments(name.split(".", 1)[-1])} for name, p in parameters.items()]
    return constructor(groups)

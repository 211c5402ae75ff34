"""Running Pyro programs without leaving a trace of it: no global parameters, no changed random stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import ImproperUniform
from pyro.distributions.transforms import biject_to
from pyro.nn.module import PyroModule
from pyro.params.param_store import ParamStoreDict
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import transform_to

Program = Callable[..., Any]
"""A Pyro program: a module, a bound method of one, or a plain function."""


def owner(program: Program) -> nn.Module | None:
    """The module that holds a program's parameters: itself, or the object of a bound method."""
    if isinstance(program, nn.Module):
        return program
    bound = getattr(program, "__self__", None)
    return bound if isinstance(bound, nn.Module) else None


def program_name(program: Program) -> str:
    """What messages call a program."""
    if isinstance(program, nn.Module):
        return type(program).__name__
    return getattr(program, "__qualname__", type(program).__name__)


def constrained(unconstrained: Tensor, constraint: Any) -> Tensor:
    """The value that a program sees of a parameter; it remembers its leaf, as Pyro's own do."""
    value = transform_to(constraint)(unconstrained)
    value.unconstrained = lambda: unconstrained
    return value


class LocalParameters(Messenger):
    """Answers `pyro.param` and `pyro.module` from a dictionary of its own instead of Pyro's global store.

    Parameters of PyroModules stay where they are, in the module; a function's `pyro.param("loc", init)` becomes a
    leaf that is kept here under its name. `parameters` is what an optimiser must know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parameters: dict[str, Tensor] = {}
        self.constraints: dict[str, Any] = {}
        self.substitutes: Mapping[str, Tensor] = {}

    def _pyro_param(self, msg: Any) -> None:
        function = getattr(msg["fn"], "__func__", None)
        if function is not ParamStoreDict.get_param:
            return  # a PyroModule announces a parameter that it holds itself
        name, init = msg["args"][0], (msg["args"][1] if len(msg["args"]) > 1 else msg["kwargs"].get("init_tensor"))
        constraint = msg["args"][2] if len(msg["args"]) > 2 else msg["kwargs"].get("constraint", None)
        if isinstance(init, nn.Parameter):  # pyro.module: the module keeps its parameter
            self.parameters.setdefault(name, init)
            msg["value"] = init
        else:
            if name not in self.parameters:
                self._create(name, init, constraint)
            leaf = self.substitutes.get(name, self.parameters[name])
            msg["value"] = constrained(leaf, self.constraints[name])
        msg["done"] = True

    def _create(self, name: str, init: Any, constraint: Any) -> None:
        if init is None:
            raise KeyError(f"pyro.param({name!r}) is read before it was given an initial value")
        value = init() if callable(init) else init
        constraint = torch.distributions.constraints.real if constraint is None else constraint
        with torch.no_grad():
            leaf = transform_to(constraint).inv(value.detach()).clone().contiguous()
        self.parameters[name] = leaf.requires_grad_(True)
        self.constraints[name] = constraint


@contextlib.contextmanager
def isolated(*programs: Program, parameters: LocalParameters | None = None, validate: bool = True) -> Iterator[None]:
    """Run programs so that nothing reaches Pyro's global parameter store and no setting survives.

    Pyro's own `module_local_params` refuses modules that were built under its default setting, unless their context
    is given an (empty) store first; nothing is ever kept in it, for `LocalParameters` answers every request.
    """
    for program in programs:
        module = owner(program)
        for part in module.modules() if module is not None else ():
            if isinstance(part, PyroModule) and not hasattr(part._pyro_context, "param_state"):
                part._pyro_context.param_state = {"params": {}, "constraints": {}}
    with (
        pyro.settings.context(module_local_params=True),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(validate),
        parameters if parameters is not None else LocalParameters(),
    ):
        yield


@contextlib.contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Leave torch's random streams (CPU and GPU) as they were; inside, start from `seed` if one is given."""
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluating(*programs: Program) -> Iterator[None]:
    """Evaluation mode and no gradients, put back as they were: batch-norm statistics do not move while predicting."""
    modules = [part for program in programs if (module := owner(program)) is not None for part in module.modules()]
    before = [part.training for part in modules]
    try:
        for part in modules:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, mode in zip(modules, before, strict=True):
            part.training = mode


class StartValues(Messenger):
    """Gives latent sites a value where one is known, or where the prior cannot be drawn from (flat priors).

    Pyro's `ImproperUniform` raises on `sample`; a program that has one is read at the image of zero instead.
    """

    def __init__(self, values: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.values = dict(values or {})

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"]:
            return
        fn = msg["fn"]
        if msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["done"] = True
            return
        base = fn
        while hasattr(base, "base_dist") and not isinstance(base, ImproperUniform):
            base = base.base_dist
        if isinstance(base, ImproperUniform):
            transform = biject_to(fn.support)
            shape = transform.inverse_shape(fn.shape())
            msg["value"] = transform(torch.zeros(shape))
            msg["done"] = True


def announce(parameters: Mapping[str, Tensor]) -> None:
    """Tell Pyro's losses that these parameters exist.

    `Trace_ELBO.loss_and_grads` skips the backward pass of a program in which it saw no parameter: a plain `nn.Module`
    says nothing of its own.
    """
    for name, value in parameters.items():
        effectful(lambda *_, value=value, **__: value, type="param")(name, name=name)

"""Running Pyro programs without leaving a trace of it: no global parameters, no changed random stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import ImproperUniform
from pyro.distributions.transforms import biject_to
from pyro.nn.module import _Context
from pyro.params.param_store import ParamStoreDict, user_param_name
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from .errors import ModelError, OptionError

Program = Callable[..., Any]
"""A Pyro program: a module, a bound method of one, or a plain function."""


class FunctionProgram(nn.Module):
    """A plain function as a module: the home of what it asks of `pyro.param`."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def owner(program: Program) -> nn.Module | None:
    """The module that holds a program's parameters: itself, or the object of a bound method."""
    if isinstance(program, nn.Module):
        return program
    bound = getattr(program, "__self__", None)
    return bound if isinstance(bound, nn.Module) else None


def with_home(program: Program) -> tuple[Program, nn.Module]:
    """The program, and the module where its parameters live: a function gets one."""
    home = owner(program)
    if home is not None:
        return program, home
    wrapped = FunctionProgram(program)
    return wrapped, wrapped


def program_name(program: Program) -> str:
    """What messages call a program."""
    if isinstance(program, FunctionProgram):
        return program_name(program.function)
    if isinstance(program, nn.Module):
        return type(program).__name__
    return getattr(program, "__qualname__", type(program).__name__)


class LocalParameters(Messenger):
    """Answers `pyro.param` and `pyro.module` from the program's own module instead of Pyro's global store.

    `pyro.param("loc", init, constraint=...)` becomes an `nn.Parameter` of the program's home, unconstrained, in its
    child `pyro_parameters`; a parameter of that name at one of the `others` is shared, as it is in Pyro. The modules
    that `pyro.module` names keep their parameters; the home only remembers them, by name.
    """

    def __init__(self, home: nn.Module, *others: nn.Module):
        super().__init__()
        self.home, self.places = home, (home, *others)

    def _pyro_param(self, msg: Any) -> None:
        if getattr(msg["fn"], "__func__", None) is not ParamStoreDict.get_param:
            if isinstance(self.home, FunctionProgram):  # a PyroModule that the function closes over tells what it holds
                self._remember(msg["args"][0], msg["fn"]())
            return
        name, init = msg["args"][0], (msg["args"][1] if len(msg["args"]) > 1 else None)
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if isinstance(init, nn.Parameter):
            self._remember(name, init)
            msg["value"] = init
        elif isinstance(init, Tensor) and user_param_name(name) != name:
            msg["value"] = init  # of a module whose parameters are exchanged from outside, for a graph or a replica
        else:
            msg["value"] = self._value(name, init, constraint)
        msg["done"] = True

    def _remember(self, name: str, value: Any) -> None:
        leaf = value if isinstance(value, nn.Parameter) else getattr(value, "unconstrained", lambda: None)()
        if isinstance(leaf, nn.Parameter):
            known = self.home.__dict__.setdefault("pyro_modules", {})
            while known.setdefault(name, leaf) is not leaf:
                name += "'"  # two modules that are not known by name may hold a parameter of one name

    def _value(self, name: str, init: Any, constraint: Any) -> Tensor:
        key = name.replace(".", "|")
        for place in self.places:
            if key in getattr(place, "pyro_parameters", {}):
                return self._constrained(place, key)
        if init is None:
            raise ModelError(f"pyro.param({name!r}) is read before it was given an initial value: give it one")
        value = init() if callable(init) else init
        with torch.no_grad():
            leaf = transform_to(constraint).inv(value.detach()).clone().contiguous()
        if not hasattr(self.home, "pyro_parameters"):
            self.home.add_module("pyro_parameters", nn.ParameterDict())
            self.home.__dict__["pyro_constraints"] = {}
        held: Any = self.home.pyro_parameters
        held[key] = nn.Parameter(leaf)
        self.home.__dict__["pyro_constraints"][key] = constraint
        return self._constrained(self.home, key)

    @staticmethod
    def _constrained(place: nn.Module, key: str) -> Tensor:
        leaf = place.pyro_parameters[key]  # type: ignore[index]
        value = transform_to(place.__dict__["pyro_constraints"][key])(leaf)
        value.unconstrained = lambda: leaf
        return value


def bound(program: Program, home: nn.Module, *others: nn.Module) -> Program:
    """The program with its `pyro.param`s answered by its home."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with LocalParameters(home, *others):
            return program(*args, **kwargs)

    return run


@contextlib.contextmanager
def isolated(*, validate: bool = True) -> Iterator[None]:
    """Run programs so that nothing reaches Pyro's global parameter store and no setting survives.

    Pyro's own `module_local_params` refuses modules that were built under its default setting, unless their context
    has an (empty) store; nothing is ever kept in it, for `LocalParameters` answers every request.
    """
    with (
        pyro.settings.context(module_local_params=True),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(validate),
        _context_store(),
    ):
        yield


@contextlib.contextmanager
def _context_store() -> Iterator[None]:
    """An empty store for every module that has none, also those that a function closes over."""
    context: Any = _Context
    if hasattr(context, "param_state"):
        yield
        return
    context.param_state = _Empty(params={}, constraints={})
    try:
        yield
    finally:
        del context.param_state


class _Empty(dict[str, Any]):
    """A store's state that stays empty: a module that met it would otherwise keep what a program asked for inside of
    `poutine.block` (Pyro's autoguides run their model so), and Pyro refuses modules with such a rest."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        return None


@contextlib.contextmanager
def preserved_buffers(*programs: Program) -> Iterator[None]:
    """Leave buffers as they were: to read a program is no training, and moves no batch-norm statistics."""
    modules = [module for program in programs if (module := owner(program)) is not None]
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


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


def move(*programs: Program, device: Any = None, dtype: Any = None) -> None:
    """Programs that are modules to a device and a floating type."""
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"dtype is {dtype}, expected a floating one such as torch.float64; labels stay int64")
    for program in programs:
        if isinstance(program, type):
            raise OptionError(f"{program_name(program)} is a class, expected an object: call it first")
        module = owner(program)
        if module is not None and (device is not None or dtype is not None):
            nn.Module.to(module, device=device, dtype=dtype)


def floating_type(*programs: Program) -> torch.dtype | None:
    """That of the first parameter of the programs, in their order; None where there is none yet."""
    homes = [home for home in map(owner, programs) if home is not None]
    return next((p.dtype for home in homes for p in home.parameters() if p.is_floating_point()), None)

"""The noise of the reparameterisation as an input: eps comes in from outside, and a step is a pure function.

`z = g(phi, x, eps)` with eps free of parameters (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014). A mode
of torch answers every parameter-free draw of a program; what it answers is recorded first and replayed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor
from torch.overrides import TorchFunctionMode

_NORMAL = {torch.Tensor.normal_, torch.randn, torch.randn_like, torch.normal}
_UNIFORM = {torch.Tensor.uniform_, torch.rand, torch.rand_like}
_EXPONENTIAL = {torch.Tensor.exponential_}


@dataclass(frozen=True)
class Draw:
    """One parameter-free draw of a program: which standard variable, how many, of which type."""

    kind: str  # "normal" | "uniform" | "exponential"
    shape: Size
    dtype: torch.dtype
    device: torch.device

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw it as the program itself would have: the same generator gives the same numbers."""
        return self.fill(torch.empty(self.shape, dtype=self.dtype, device=self.device), generator)

    def fill(self, out: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw it into a tensor that is there."""
        return self.method(out)(generator=generator)

    def method(self, out: Tensor) -> Callable[..., Tensor]:
        """What fills a tensor that is there: one call for each step, where a step is short."""
        methods: dict[str, Any] = {"normal": out.normal_, "uniform": out.uniform_, "exponential": out.exponential_}
        return methods[self.kind]


class _Noise(TorchFunctionMode):
    """Passes every parameter-free draw through `answer(draw)`."""

    def __init__(self, answer: Callable[[Draw], Tensor]):
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is None:
            if func in _NORMAL:
                return self._normal(func, args, kwargs)
            if func in _UNIFORM:
                return self._uniform(func, args, kwargs)
            if func in _EXPONENTIAL:
                rate = args[1] if len(args) > 1 else kwargs.get("lambd", 1.0)
                return _into(args[0], self._ask("exponential", args[0].shape, args[0]) / rate)
        return func(*args, **kwargs)

    def _ask(self, kind: str, shape: Size, like: Tensor) -> Tensor:
        return self.answer(Draw(kind, Size(shape), like.dtype, like.device))

    def _normal(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.normal:  # normal(mean, std): tensors or numbers, shapes by broadcasting
            mean, std = _two(args, kwargs, ("mean", "std"), (0.0, 1.0))
            size = kwargs.get("size", args[2] if len(args) > 2 else None)
            like = torch.as_tensor(mean + 0.0 * std if size is None else torch.empty(size))
            return mean + std * self._ask("normal", like.shape, like)
        if func is torch.Tensor.normal_:
            mean, std = _two(args[1:], kwargs, ("mean", "std"), (0.0, 1.0))
            eps = self._ask("normal", args[0].shape, args[0])
            return _into(args[0], eps if mean == 0 and std == 1 else mean + std * eps)
        like = torch.empty_like(*args, **kwargs) if func is torch.randn_like else torch.empty(*args, **kwargs)
        return self._ask("normal", like.shape, like)

    def _uniform(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is torch.Tensor.uniform_:
            low, high = _two(args[1:], kwargs, ("from", "to"), (0.0, 1.0))
            eps = self._ask("uniform", args[0].shape, args[0])
            return _into(args[0], eps if low == 0 and high == 1 else low + (high - low) * eps)
        like = torch.empty_like(*args, **kwargs) if func is torch.rand_like else torch.empty(*args, **kwargs)
        return self._ask("uniform", like.shape, like)


def _two(args: Any, kwargs: Any, names: tuple[str, str], defaults: tuple[float, float]) -> tuple[Any, Any]:
    values = [args[i] if len(args) > i else kwargs.get(name, defaults[i]) for i, name in enumerate(names)]
    return values[0], values[1]


def _into(target: Tensor, value: Tensor) -> Tensor:
    """Answer an in-place draw. vmap refuses to write a batched value into an unbatched tensor; then what the call
    returns is the answer (`torch.distributions` uses that), and whoever reads the target itself meets NaN, not luck."""
    try:
        return target.copy_(value)
    except RuntimeError:
        target.fill_(torch.nan)
        return value.to(target.dtype)


def _states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


class Recorded(list[Draw]):
    """The draws of one run, in order; `complete` says that the run had no other randomness."""

    complete: bool = True

    def sample(self, generator: torch.Generator | None = None) -> list[Tensor]:
        """Fresh noise: with the default generator, the very numbers that the program would draw next."""
        return [draw.sample(generator) for draw in self]

    def sample_many(self, samples: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Noise of many runs, each tensor with a leading `(samples,)`."""
        wide = [Draw(d.kind, Size((samples, *d.shape)), d.dtype, d.device) for d in self]
        return [draw.sample(generator) for draw in wide]


@contextmanager
def recording() -> Iterator[Recorded]:
    """Record the parameter-free draws of a program while it draws as usual.

    `complete` is found, not guessed: the random state after the run must be the one that the recorded draws alone
    would have left. Dropout, Gamma or Categorical draws leave another.

    >>> with recording() as draws:
    ...     _ = torch.randn(3), torch.rand(2)
    >>> [(d.kind, tuple(d.shape)) for d in draws], draws.complete
    ([('normal', (3,)), ('uniform', (2,))], True)
    """
    draws = Recorded()

    def answer(draw: Draw) -> Tensor:
        draws.append(draw)
        return draw.sample()

    before = _states()
    with _Noise(answer):
        yield draws
    after = _states()
    with torch.random.fork_rng():
        torch.set_rng_state(before[0])
        if len(before) > 1:
            torch.cuda.set_rng_state_all(before[1:])
        draws.sample()
        draws.complete = all(torch.equal(mine, theirs) for mine, theirs in zip(_states(), after, strict=False))


class NoiseExhausted(RuntimeError):
    """A program drew more, or other, noise than it did when it was recorded."""


@contextmanager
def replaying(noise: Sequence[Tensor]) -> Iterator[None]:
    """Answer the draws of a program, in order, with given noise.

    Raises:
        NoiseExhausted: the program asks for more, for another shape, or leaves some unused: its draws depend on the
            data or on other draws.

    >>> with replaying([torch.ones(3)]):
    ...     torch.randn(3)
    tensor([1., 1., 1.])
    """
    position = 0

    def answer(draw: Draw) -> Tensor:
        nonlocal position
        if position >= len(noise):
            raise NoiseExhausted(f"the program drew {draw.kind} {tuple(draw.shape)} after all {len(noise)} given draws")
        eps = noise[position]
        position += 1
        if eps.shape != draw.shape:
            raise NoiseExhausted(f"draw {position} asks for shape {tuple(draw.shape)}, given {tuple(eps.shape)}")
        return eps

    with _Noise(answer):
        yield
    if position != len(noise):
        raise NoiseExhausted(f"the program used {position} of {len(noise)} given draws")

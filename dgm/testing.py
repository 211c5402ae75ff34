"""Contracts that anyone can hold their own models, guides and families against.

Each function runs laws that every part of the zoo obeys, and raises `ContractError` with the name of the site or
parameter that breaks one. They need no test framework: call them from any test.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from .bounds import importance_bound
from .pair import Minibatch, NotReparameterised, Pair
from .posthoc import has_density
from .programs import Program, StartValues, bound, evaluating, isolated, preserved_rng, program_name, with_home
from .sites import DATA_PLATE, Latents, Site, latents, trace_once
from .svi import SVI
from .testing_families import SIGMAS, ContractError, check_family, require
from .weights import LogWeightSampler, log_weight_terms

__all__ = ["ContractError", "check_exact", "check_family", "check_model", "check_pair"]

# --- models ----------------------------------------------------------------------------------------------------------


def check_model(model: Program, *batch: Any, plates: Iterable[str] = (DATA_PLATE,)) -> Latents:
    """The laws of a model: it can be read, its data stand in a plate, and minibatches are scaled without bias.

    At fixed latents, log p(batch) with its data plates scaled by N / B, averaged over the batches of an epoch, is
    log p of all rows. A batch of latents gives under `torch.func.vmap` what they give one by one, or vmap refuses.

    Args:
        model: a Pyro program.
        batch: data, at least two rows, as the model takes it.
        plates: names of the data plates.

    Returns:
        the latents that were found.

    Raises:
        ContractError: a law is broken; the message names the site.

    >>> from dgm.models.vae import example
    >>> model, batch = example()
    >>> list(check_model(model, *batch))
    ['z']
    """
    plates, name = tuple(plates), program_name(model)
    with _untouched(name), evaluating(model):
        found = latents(model, *batch, plates=plates)
        _observed_in_plates(name, found, batch, plates)
        values = [_values(trace_once(model, *batch, seed=seed), found) for seed in (0, 1)]
        _unbiased_scale(model, batch, found, values[0], plates)
        _stacked_density(model, batch, values)
    return found


def _values(trace: poutine.Trace, found: Latents) -> dict[str, Tensor]:
    return {name: trace.nodes[name]["value"] for name in found}  # type: ignore[misc]


def _observed_in_plates(name: str, found: Latents, batch: Sequence[Any], plates: Sequence[str]) -> None:
    require(found.observed, f"{name} observes nothing (obs=...)")
    lengths = {len(item) for item in batch if isinstance(item, Tensor) and item.dim()}
    for site, node in found.observed.items():
        frames = [frame for frame in node["cond_indep_stack"] if frame.name in plates]
        require(frames, f"{name}: observed site {site!r} stands in no data plate ({', '.join(plates)})")
        size = frames[0].size
        require(size in lengths, f"{name}: the plate of site {site!r} has {size} rows, the data {lengths}")


def _density(model: Program, batch: Sequence[Any], values: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
    """log p(batch, values), with the data plates scaled to `sizes`."""
    program, home = with_home(model)
    with isolated(validate=False), preserved_rng(0), Minibatch(sizes):
        return poutine.trace(poutine.condition(bound(program, home), dict(values))).get_trace(*batch).log_prob_sum()  # type: ignore[return-value]


def _rows(batch: Sequence[Any], halves: Mapping[int, slice]) -> list[Any]:
    def cut(item: Any) -> Any:
        part = halves.get(len(item)) if isinstance(item, Tensor) and item.dim() else None
        return item if part is None else item[part]

    return [cut(item) for item in batch]


def _latent_rows(values: Mapping[str, Tensor], found: Latents, halves: Mapping[int, slice]) -> dict[str, Tensor]:
    def cut(site: Site, value: Tensor) -> Tensor:
        if site.plate is None:
            return value
        axis = site.plate_frame.dim - site.event_dim
        return value.movedim(axis, 0)[halves[site.plate_frame.size]].movedim(0, axis)

    return {name: cut(found[name], value) for name, value in values.items()}


def _unbiased_scale(
    model: Program, batch: Sequence[Any], found: Latents, values: Mapping[str, Tensor], plates: Sequence[str]
) -> None:
    frames = {name: found.plates[name] for name in plates if name in found.plates}
    if any(frame.full_size not in (None, frame.size) or frame.size < 2 for frame in frames.values()):
        return  # the model scales by itself, to a size that this batch does not have
    sizes = {name: 2 * (frame.size // 2) for name, frame in frames.items()}
    parts = [{frame.size: slice(0, sizes[name]) for name, frame in frames.items()}]
    for half in (0, 1):
        parts.append({f.size: slice(half * (f.size // 2), (half + 1) * (f.size // 2)) for f in frames.values()})
    whole, first, second = (
        float(_density(model, _rows(batch, part), _latent_rows(values, found, part), sizes)) for part in parts
    )
    mean = (first + second) / 2
    require(
        math.isclose(mean, whole, rel_tol=1e-4, abs_tol=1e-4),
        f"{program_name(model)}: the mean over batches of the scaled log density is {mean:.7g}, that of all rows "
        f"{whole:.7g}: a site inside a data plate depends on other rows, or one outside on their number",
    )


def _stacked_density(model: Program, batch: Sequence[Any], values: Sequence[dict[str, Tensor]]) -> None:
    one_by_one = torch.stack([_density(model, batch, value, {}) for value in values])
    stack = {name: torch.stack([value[name] for value in values]) for name in values[0]}
    if not stack:
        return
    try:
        together = torch.func.vmap(lambda value: _density(model, batch, value, {}))(stack)
    except (RuntimeError, NotImplementedError, ValueError):
        return  # it says no, and will be run once for each sample
    require(
        torch.allclose(together, one_by_one, rtol=1e-4, atol=1e-4, equal_nan=True),
        f"{program_name(model)}: log densities under vmap {together.tolist()}, one by one {one_by_one.tolist()}",
    )


# --- pairs -----------------------------------------------------------------------------------------------------------


def check_pair(
    model: Program,
    guide: Program,
    *batch: Any,
    steps: int = 20,
    lr: float = 1e-3,
    compile: Literal[False, "trace"] = "trace",
    log_evidence: Tensor | None = None,
    plates: Iterable[str] = (DATA_PLATE,),
    tolerance: float = 1e-4,
) -> None:
    """The laws of a model and its guide. The pair is left as it came.

    `dgm.SVI` gives the losses of `pyro.infer.SVI` at the same seed, traced and eager (of the objective that the guide
    asks for, where it has one, else of Trace_ELBO); nothing reaches Pyro's global
    store; every parameter receives a gradient; the log weights have their shape, are finite, and one draw of them is
    the negative loss of the same noise; no bound lies above the evidence.

    Args:
        model, guide: Pyro programs with the same call signature.
        batch: all rows, as both take them.
        steps: steps of Adam to compare, at least 1.
        lr: its step size.
        compile: False to leave the traced step out, which costs seconds for deep flows.
        log_evidence: exact log p, `(N,)` where all latents are local, else `()`; in nats.
        plates: names of the data plates.
        tolerance: how far losses may be apart, relative to 1 + |loss|; float32 needs 1e-4.

    Raises:
        ContractError: a law is broken; the message names the parameter or step.

    >>> from dgm.guides.joint import Joint
    >>> from dgm.models.linear_vae import example
    >>> model, batch = example()
    >>> check_pair(model, Joint(model, *batch), *batch, log_evidence=model.log_evidence(*batch).detach())
    """
    name, plates = f"{program_name(model)} with {program_name(guide)}", tuple(plates)
    make = partial(torch.optim.Adam, lr=lr)
    with preserved_rng(0), _untouched(name):
        first = SVI(model, guide, make, compile=compile, warm=min(5, steps - 1))
        first.prepare(*batch)
        with _restored(first):
            _log_weight_laws(first, batch, plates, name, log_evidence)
        with _restored(first):
            mine = _losses(first, batch, steps)
            _every_parameter_learns(first, batch, name)
        runs = [("pyro.infer.SVI", lambda: _stock_losses(model, guide, first.pair.loss_fn, batch, steps, lr))]
        if compile and first.fallback is None:
            eager = SVI(first.model, first.guide, make, compile=False)
            runs.append(("the eager step", lambda: _losses(eager, batch, steps)))
        for other, run in runs:
            with _restored(first):
                theirs = run()
            for step, (a, b) in enumerate(zip(mine, theirs, strict=True), 1):
                told = f"{name}: at step {step} dgm.SVI gives the loss {a:.8g}, {other} {b:.8g}"
                require(abs(a - b) <= tolerance * (1 + abs(b)), told)


def _losses(svi: SVI, batch: Sequence[Any], steps: int) -> list[float]:
    torch.manual_seed(3)
    return [svi.step(*batch) for _ in range(steps)]


def _stock_losses(
    model: Program, guide: Program, loss: Any, batch: Sequence[Any], steps: int, lr: float
) -> list[float]:
    with pyro.get_param_store().scope(), pyro.settings.context(module_local_params=False):
        model, guide = _registered("model", model), _registered("guide", guide)
        with preserved_rng(0), torch.no_grad(), StartValues():  # whatever is made at the first call is made
            trace = poutine.trace(guide).get_trace(*batch)
            poutine.replay(model, trace=trace)(*batch)
        svi = pyro.infer.SVI(model, guide, pyro.optim.PyroOptim(torch.optim.Adam, {"lr": lr}), loss)
        torch.manual_seed(3)
        return [float(svi.step(*batch)) for _ in range(steps)]


def _registered(name: str, program: Program) -> Program:
    """Stock Pyro trains a plain module only where the program names it."""
    if not isinstance(program, nn.Module) or isinstance(program, PyroModule):
        return program

    def run(*args: Any, **kwargs: Any) -> Any:
        pyro.module(name, program)
        return program(*args, **kwargs)

    return run


@contextmanager
def _restored(svi: SVI) -> Iterator[None]:
    """Parameters and buffers of a pair as they were before."""
    held = [*svi.pair.parameters().values(), *svi.pair.owners.buffers()]
    before = [tensor.detach().clone() for tensor in held]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)


@contextmanager
def _untouched(name: str) -> Iterator[None]:
    """Nothing may reach Pyro's global store or settings."""
    store, settings = set(pyro.get_param_store().keys()), pyro.settings.get()
    yield
    new = sorted(set(pyro.get_param_store().keys()) - store)
    require(not new, f"{name}: {', '.join(map(repr, new))} reached Pyro's global parameter store")
    changed = sorted(key for key, value in pyro.settings.get().items() if settings.get(key) != value)
    require(not changed, f"{name}: the Pyro settings {', '.join(changed)} were changed")


def _every_parameter_learns(svi: SVI, batch: Sequence[Any], name: str) -> None:
    try:
        loss = sum((svi.pair.loss(None, batch) for _ in range(3)), torch.zeros(()))
    except NotReparameterised:
        return
    parameters = svi.pair.parameters()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        require(gradient is not None, f"{name}: parameter {parameter!r} takes no part in the loss")
        require(gradient is not None and gradient.abs().sum() > 0, f"{name}: the gradient of {parameter!r} is zero")


def _log_weight_laws(
    svi: SVI, batch: Sequence[Any], plates: Sequence[str], name: str, log_evidence: Tensor | None, draws: int = 100
) -> None:
    model, guide = svi.model, svi.guide
    single = Pair(model, guide, pyro.infer.Trace_ELBO())  # one draw, whatever objective the guide asks for
    with preserved_rng(0):
        single.loss(None, batch)  # a site without a pathwise gradient is met once, and draws twice then
    for seed in (1, 2):
        with evaluating(model, guide), preserved_rng(seed):
            loss = float(single.loss(None, batch))
        terms = log_weight_terms(model, guide, *batch, num_samples=1, seed=seed, plates=plates)
        weight = float(terms.total)
        told = f"{name}: one draw's log weights sum to {weight:.8g}, the negative loss of the same noise is {-loss:.8g}"
        require(math.isclose(weight, -loss, rel_tol=1e-4, abs_tol=1e-3), told)
    terms = log_weight_terms(model, guide, *batch, num_samples=draws, seed=3, plates=plates)
    rows = next((svi.latents.plates[p].size for p in plates if p in svi.latents.plates), 0) if svi.latents else 0
    for label, part, shape in (("local", terms.local, (draws, rows)), ("global", terms.global_, (draws,))):
        got = tuple(part.shape)
        require(got == shape, f"{name}: the {label} log weights have shape {got}, expected {shape}")
        require(part.isfinite().all(), f"{name}: a {label} log weight is not finite")
    if log_evidence is None or not has_density(guide):
        return
    if LogWeightSampler(model, guide, *batch, plates=plates).runs.deterministic:
        return  # a point has no density, and its objective is no bound
    weights = terms.total[:, None] if terms.has_global else terms.local
    exact = log_evidence.detach().reshape(-1)
    require(len(exact) == weights.shape[1], f"log_evidence has {len(exact)} entries, expected {weights.shape[1]}")
    groups = weights.unflatten(0, (10, draws // 10))
    for label, bounds in (("ELBO", groups.mean(1)), ("importance bound", importance_bound(groups.transpose(0, 1)))):
        gap = (bounds - exact).mean(-1)
        mean, error = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
        told = f"{name}: the {label} lies {mean:.4g} ± {error:.2g} nats a datum above the evidence"
        require(mean <= SIGMAS * error + 1e-4, told)


def check_exact(
    model: Program,
    guide: Program,
    *batch: Any,
    log_evidence: Tensor,
    num_samples: int = 10,
    plates: Iterable[str] = (DATA_PLATE,),
    tolerance: float = 1e-4,
) -> None:
    """At the exact posterior every log weight is the evidence: log p(x, z) - log p(z | x) = log p(x) for every z.

    Args:
        model, guide: Pyro programs; the guide is the exact posterior. Use float64.
        batch: data, as both take them.
        log_evidence: exact log p, `(N,)` where all latents are local, else `()`; in nats.
        num_samples: draws to look at, at least 1.
        plates: names of the data plates.
        tolerance: nats.

    Raises:
        ContractError: a log weight is another number; the message names draw and row.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5 ** 0.5))
    >>> x = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    >>> check_exact(model, guide, x, log_evidence=dist.Normal(0.0, 2.0 ** 0.5).log_prob(x))
    """
    name = f"{program_name(model)} with {program_name(guide)}"
    with _untouched(name):
        terms = log_weight_terms(model, guide, *batch, num_samples=num_samples, plates=plates)
    weights = terms.total[:, None] if terms.has_global else terms.local
    exact = log_evidence.detach().reshape(-1)
    require(len(exact) == weights.shape[1], f"log_evidence has {len(exact)} entries, expected {weights.shape[1]}")
    off = (weights - exact).abs()
    draw, row = divmod(int(off.argmax()), off.shape[1])
    where = f"draw {draw}" if terms.has_global else f"draw {draw}, row {row}"
    require(
        off.max() <= tolerance,
        f"{name}, {where}: the log weight is {float(weights[draw, row]):.10g}, the evidence {float(exact[row]):.10g}",
    )

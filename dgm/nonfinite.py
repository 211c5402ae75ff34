"""Values that are not finite: stop or skip, and the report of step, rows, first bad site and first bad parameter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from .errors import OptionError, TrainingError
from .noise import NoiseExhausted, replaying
from .objectives import Objective
from .pair import Pair
from .programs import preserved_buffers, preserved_rng
from .raised import describe, is_numerical, message

log = logging.getLogger("dgm")

Policy = Literal["stop", "skip"]
POLICIES: tuple[Policy, ...] = ("stop", "skip")
GROWN = 10.0
"""A parameter that grew so many times beyond its start (or beyond 1) has blown up."""
SHOWN = 5


class Guard:
    """What a training does at a step whose loss or gradient is not finite: stop, or skip it, with a budget.

    A step that is not finite changes no parameter, no moment, no counter of the optimiser and no buffer. The learning
    rate's schedule, the data order and the noise go on.

    Args:
        policy: "stop" raises at the first such step, "skip" leaves it out.
        skips: how many steps may be skipped; one more raises.

    Attributes:
        skipped: numbers of the steps that were skipped, counted from 1.

    Raises:
        OptionError: another policy, or a budget that is no whole number >= 0.

    >>> guard = Guard("skip", 1)
    >>> guard.meet(7, "the loss is nan", lambda: "step 7: the loss is nan")
    >>> guard.skipped
    [7]
    """

    def __init__(self, policy: Policy = "stop", skips: int = 10):
        if policy not in POLICIES:
            raise OptionError(f"nonfinite is {policy!r}, expected 'stop' or 'skip'")
        if isinstance(skips, bool) or not isinstance(skips, int) or skips < 0:
            raise OptionError(f"skips is {skips!r}, expected a whole number >= 0, the steps that may be skipped")
        self.policy: Policy = policy
        self.skips = skips
        self.skipped: list[int] = []

    def meet(self, step: int, what: str, report: Callable[[], str], who: str = "") -> None:
        """Book a step that is not finite; the first is reported in full, the others shortly.

        Raises:
            TrainingError: the policy is to stop, or the budget is used up.
        """
        if self.policy == "stop":
            raise TrainingError(who + report())
        if len(self.skipped) >= self.skips:
            before = f"skipped before it: {len(self.skipped)} of at most {self.skips}"
            listed = f" (steps {', '.join(map(str, self.skipped))})" if self.skipped else ""
            raise TrainingError(f"{who}{report()}; {before}{listed}")
        count = f"skipped, {len(self.skipped) + 1} of at most {self.skips}"
        if self.skipped:
            log.warning("%sstep %d: %s; %s", who, step, what, count)
        else:
            log.warning("%s%s; %s", who, report(), count)
        self.skipped.append(step)


# --- the report ------------------------------------------------------------------------------------------------------


def largest(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest entry of each parameter, to tell later how they grew."""
    return {name: float(p.detach().abs().max()) if p.numel() else 0.0 for name, p in parameters.items()}


def explain_nonfinite(
    pair: Pair,
    step: int,
    what: str,
    gradients: Sequence[str],
    batch: Sequence[Any],
    rows: Tensor | None,
    noise: Sequence[Tensor] | Tensor,
    start: Mapping[str, float] | None = None,
) -> str:
    """The message of training that met a value that is not finite: step, rows, site, parameter, cause and cure.

    Args:
        what: is not finite, "the loss is nan".
        gradients: names of the parameters whose gradient is not finite.
        batch, rows: the data of the step, and `(B,)` which rows of all data these are.
        noise: the draws of the step, or the state of torch's generator before it.
        start: the largest entry of each parameter when training began.
    """
    parameters = pair.parameters()
    parts = [f"step {step}: {what}"]
    bad = [name for name, p in parameters.items() if not bool(torch.isfinite(p).all())]
    if bad:
        parts.append(f"parameter {bad[0]!r} was not finite before the step")
    data = _bad_data(batch, rows)
    site = _first_bad_site(pair, parameters, batch, rows, noise)
    parts += [part for part in (site, data) if part]
    if rows is not None and "row" not in "".join(parts):
        parts.append(f"the batch is {_listed(rows)}")
    if gradients:
        parts.append(f"first parameter whose gradient is not finite: {gradients[0]!r}")
    grown = _grown(start or {}, largest(parameters), step)
    parts += [grown] if grown else []
    if data:
        cure = "mend or drop those rows"
    elif grown:
        cure = "try a smaller learning rate"
    else:
        cure = "try a smaller learning rate, clip=10, or look at that site's scale"
    parts.append(f"the parameters are those of the last good step; {cure}")
    return "; ".join(parts)


def bad_gradients(names: Sequence[str], gradients: Sequence[Tensor | None]) -> list[str]:
    """Names of the parameters whose gradient is not finite; the largest where only their norm is not."""
    found = [(n, g) for n, g in zip(names, gradients, strict=True) if g is not None and g.numel()]
    bad = [name for name, g in found if not bool(torch.isfinite(g).all())]
    return bad or [max(found, key=lambda pair: float(pair[1].abs().max()))[0]] if found else []


def _bad_data(batch: Sequence[Any], rows: Tensor | None) -> str:
    for i, item in enumerate(batch):
        if isinstance(item, Tensor) and item.is_floating_point() and not bool(torch.isfinite(item).all()):
            kind = "NaN" if bool(item.isnan().any()) else "inf"
            return f"argument {i} of the batch holds {kind}{_which_rows(torch.isfinite(item), len(item), rows)}"
    return ""


def _grown(start: Mapping[str, float], now: Mapping[str, float], step: int) -> str:
    ratios = {name: now[name] / max(size, 1.0) for name, size in start.items() if name in now}
    name = max(ratios, key=ratios.__getitem__, default=None)
    if name is None or not ratios[name] > GROWN:
        return ""
    return f"the parameters blew up: {name!r} grew from {start[name]:.3g} to {now[name]:.3g} in {step - 1} steps"


def _first_bad_site(
    pair: Pair,
    parameters: Mapping[str, Tensor],
    batch: Sequence[Any],
    rows: Tensor | None,
    noise: Sequence[Tensor] | Tensor,
) -> str:
    """Run the programs again with the noise of the step, and look at each site in turn."""
    last = ""
    with (
        pair.running(rows=rows),
        preserved_rng(),
        preserved_buffers(pair.model, pair.guide),
        torch.enable_grad(),
    ):
        try:
            for drawn in _particles(pair, batch, noise):
                found, last = _look(pair, list(parameters.values()), batch, rows, drawn)
                if found:
                    return found
        except NoiseExhausted:
            return "the site cannot be named: the programs draw other noise when they run again"
        except RuntimeError as error:
            return f"and the program raises {message(error)}"
    return last


Drawing = Callable[[], Any]


@contextmanager
def _drawn(noise: Sequence[Tensor] | Tensor) -> Iterator[None]:
    if isinstance(noise, Tensor):
        torch.set_rng_state(noise)
        yield
    else:
        with replaying(noise):
            yield


def _particles(pair: Pair, batch: Sequence[Any], noise: Sequence[Tensor] | Tensor) -> Iterator[Drawing]:
    """The noise of each particle of the step."""
    loss, count = pair.loss_fn, int(getattr(pair.loss_fn, "num_particles", 1))
    if isinstance(loss, Objective):
        programs = pair.programs(batch, {}, 1.0)
        with _drawn(noise):
            stacks = programs.noise(count, loss.draws)
        if stacks is not None:
            for s in range(count):
                yield partial(replaying, [eps[s] for eps in stacks])
            return
    yield partial(_drawn, noise)


def _look(
    pair: Pair, parameters: Sequence[Tensor], batch: Sequence[Any], rows: Tensor | None, drawn: Drawing
) -> tuple[str, str]:
    """The first site that is not finite, or whose gradient is not; and what else there is to say."""
    traces: dict[str, poutine.Trace] = {}
    where, handler = "guide", poutine.trace(pair.run_guide)
    try:
        with drawn():
            traces["guide"] = handler.get_trace(*batch)
            where, handler = "model", poutine.trace(poutine.replay(pair.run_model, trace=traces["guide"]))
            traces["model"] = handler.get_trace(*batch)
        for where in traces:  # read where one raises
            traces[where].compute_log_prob()
    except NoiseExhausted:
        raise
    except (ValueError, RuntimeError) as error:
        if not is_numerical(error):
            raise
        partial = handler.msngr.trace if where not in traces else None
        finite = _first_value({**traces, **({where: partial} if partial is not None else {})}, rows, False)
        return finite[0] or describe(error, where, partial, batch, rows), ""
    found, largest_site = _first_value(traces, rows, True)
    return found or _first_gradient(traces, parameters, batch, rows), largest_site


def _first_value(traces: Mapping[str, Any], rows: Tensor | None, densities: bool) -> tuple[str, str]:
    top = (0.0, "")
    for where, name, node in _sampled(traces):
        values: list[tuple[str, Any]] = [("value", node["value"])]
        if densities:
            size = float(torch.as_tensor(node["log_prob"]).detach().abs().sum())
            top = max(top, (size, f"{name!r} of the {where} ({size:.3g} nats)"))
            values.append(("log-probability", node["log_prob"]))
        for kind, value in values:
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                which = _rows_of_site(torch.isfinite(value), node, rows)
                return f"first site that is not finite: {name!r} of the {where} ({kind}{which})", ""
    return "", f"every site is finite, the largest is {top[1]}" if top[1] else ""


def _first_gradient(
    traces: Mapping[str, Any], parameters: Sequence[Tensor], batch: Sequence[Any], rows: Tensor | None
) -> str:
    """The first site whose log-density is finite but has a gradient that is not, and the operation that made it."""
    for where, name, node in _sampled(traces):
        total = torch.as_tensor(node["log_prob"]).sum()
        if not total.requires_grad:
            continue
        seen: list[tuple[str, Tensor]] = []
        hooks = [step.register_hook(_watch(step, seen)) for step in _backward(total)]
        try:
            found = torch.autograd.grad(total, parameters, allow_unused=True, retain_graph=True)
        finally:
            for hook in hooks:
                hook.remove()
        if all(g is None or bool(torch.isfinite(g).all()) for g in found):
            continue
        inside = ""
        if seen:
            operation, gradient = seen[0]
            sizes = [len(t) for t in batch if isinstance(t, Tensor) and t.dim()]
            inside = f" ({operation}{_which_rows(torch.isfinite(gradient), sizes[0] if sizes else 0, rows)})"
        return f"first site whose gradient is not finite: {name!r} of the {where}{inside}"
    return ""


def _sampled(traces: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for where, trace in traces.items():
        for name, node in trace.nodes.items():
            if node["type"] == "sample":
                yield where, name, node


def _backward(total: Tensor) -> list[Any]:
    """The operations behind a tensor."""
    stack, seen = [total.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return list(seen)


def _watch(node: Any, seen: list[tuple[str, Tensor]]) -> Callable[[Any, Any], None]:
    def finite(parts: Any) -> bool:
        return all(g is None or bool(torch.isfinite(g).all()) for g in parts)

    def hook(made: Any, given: Any) -> None:
        if not seen and finite(given) and not finite(made):
            bad = next(g for g in made if g is not None and not bool(torch.isfinite(g).all()))
            seen.append((node.name().removesuffix("0").removesuffix("Backward"), bad))

    return hook


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows_of_site(finite: Tensor, node: Any, rows: Tensor | None) -> str:
    frames = [frame for frame in node["cond_indep_stack"] if frame.vectorized]
    return _which_rows(finite, frames[0].size, rows) if frames else ""


def _which_rows(finite: Tensor, size: int, rows: Tensor | None) -> str:
    """Numbers of the rows that are not finite, along the axis that has their number."""
    axis = next((i for i, n in enumerate(finite.shape) if n == size), None)
    if axis is None or size == 0:
        return ""
    bad = (~finite).movedim(axis, 0).reshape(size, -1).any(1).nonzero().flatten()
    return f", {_listed(rows[bad] if rows is not None and len(rows) == size else bad)}"


def _listed(rows: Tensor) -> str:
    return f"rows {rows[:SHOWN].tolist()}" + (" ..." if len(rows) > SHOWN else "")


__all__ = ["Guard", "Policy", "bad_gradients", "explain_nonfinite", "largest"]

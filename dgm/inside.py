"""The model run inside a guide, at values of the guide's own: for guides that look at what they approximate.

Refinement by gradients, annealing and top-down inference need log p(x, z) or the priors themselves while the guide
runs. Nothing of that run may be seen outside: no site of it enters a trace, a plate's scale or a replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .errors import GuideError
from .packing import Packing
from .programs import FunctionProgram, LocalParameters, Program, owner, program_name
from .row_terms import by_row, data_frame
from .sites import Latents, Site

__all__ = ["hidden", "log_joint", "log_target", "missing", "refuse_unknown"]


@contextlib.contextmanager
def hidden(model: Program, shown: Collection[str] = ()) -> Iterator[None]:
    """Hide the sample statements of a model from every handler outside, all but those `shown`.

    Parameters pass: they are asked of the model's own module, so that they have one home however often it is run.
    Distributions are not validated, which would branch on values; the run of the model outside is.
    """

    def hide(message: Any) -> bool:
        return message["type"] == "sample" and message["name"] not in shown

    with contextlib.ExitStack() as stack:
        stack.enter_context(poutine.block(hide_fn=hide))
        places = _places()
        home = _home(model, places)
        if home is not None:
            stack.enter_context(LocalParameters(home, *places))
        stack.enter_context(pyro.validation_enabled(False))
        yield


def _places() -> tuple[nn.Module, ...]:
    """The modules that answer `pyro.param` at present; none in stock Pyro, whose global store does."""
    for handler in reversed(_PYRO_STACK):
        if isinstance(handler, LocalParameters):
            return handler.places
    return ()


def _home(model: Program, places: Sequence[nn.Module]) -> nn.Module | None:
    """Which of them is the model's: a plain function got its module where it met the guide."""
    if not places:
        return None
    return owner(model) or next((p for p in places if isinstance(p, FunctionProgram) and p.function is model), None)


def log_joint(
    model: Program,
    batch: Sequence[Any],
    values: Mapping[str, Tensor],
    plate: str,
    options: Mapping[str, Any] | None = None,
) -> Tensor:
    """log p(x_n, z_n | w) of each row at given values, `(B,)`, unseen from outside and differentiable.

    The terms of the sites in the data plate, its scale taken out; those of sample dimensions to the left of the plates
    are summed. It is a pure function of values, data and parameters under `torch.func.grad`, `vmap` and `make_fx`. Call
    it outside of the guide's own plate, which the model opens itself.

    Args:
        model: the program.
        batch: data, as the model takes it.
        values: every latent by name, constrained, in the shape that the model gives it.
        plate: name of the data plate.
        options: keyword arguments of the program.

    Raises:
        GuideError: a latent has no value.

    >>> import pyro.distributions as dist, torch
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> log_joint(model, [torch.zeros(5)], {"z": torch.ones(5)}, "data").shape
    torch.Size([5])
    """
    with hidden(model):
        trace = poutine.trace(poutine.condition(model, dict(values))).get_trace(*batch, **(options or {}))
        trace.compute_log_prob()
    total: Any = 0.0
    node: Any  # Pyro's Message leaves every field optional
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        if not node["is_observed"] and not node["infer"].get("_deterministic"):
            raise missing(name, model)
        frame = data_frame(node, {plate})
        if frame is not None:
            total = total + by_row(node["log_prob"], node, frame)
    return total


def log_target(
    model: Program,
    packing: Packing,
    batch: Sequence[Any],
    start: Tensor,
    given: Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[[Tensor], Tensor]:
    """u -> sum_n [log p(x_n, z_n(u_n) | w) + log |dz_n / du_n|], `(*S, B, d)` to `()`: to take gradients of.

    Rows do not depend on each other, so that the gradient in u holds that of each row.

    Args:
        model: the program. packing: all its local latents, of one plate. batch: data, as the model takes it.
        start: some u, to run the model once where Pyro's global store is used: it makes no parameter in a transform.
        given: values of the other latents by name. options: keyword arguments of the program.
    """

    def target(u: Tensor) -> Tensor:
        values, log_jacobian = packing.unpack(u)
        joint = log_joint(model, batch, {**(given or {}), **values}, str(packing.plate), options)
        return joint.sum() + sum(j.sum() for j in log_jacobian.values())

    if not _places():
        with torch.no_grad():
            target(start.detach())
    return target


def missing(name: str, model: Program) -> GuideError:
    """The error for a latent that the guide was not told of."""
    return GuideError(
        f"latent {name!r} of {program_name(model)} has no value where the guide runs the model: Joint hands the values "
        "of the global latents on, by the argument `given` of the guide's call"
    )


def refuse_unknown(found: Latents, chosen: Iterable[Site], guide: str) -> None:
    """Refuse local latents that a guide which runs the model does not serve: it would not know their values.

    Raises:
        GuideError: a local latent is left out; the message names it.
    """
    names = {site.name for site in chosen}
    for site in found.local:
        if site.name in names:
            continue
        where = f"in plate {site.plate!r}" + (", discrete" if site.discrete else "")
        raise GuideError(
            f"{guide} runs the model and needs every local latent, but does not serve {site.name!r} ({where}): leave "
            "`sites` out, or use Amortized, which only reads the model's sites"
        )

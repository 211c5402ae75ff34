"""Observed values against the support of their likelihood: what it cannot have produced, and the cure."""

from __future__ import annotations

import math
from numbers import Number
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from .data import refuse_nonfinite
from .errors import DataError


def check_support(value: Any, distribution: Distribution, site: str) -> None:
    """Refuse an observed value that its likelihood cannot have produced.

    To be called once for each observed site, on a distribution as a trace records it (expanded by its plates).

    Args:
        value: the observed value.
        distribution: its torch or Pyro distribution; ``.to_event``, ``.mask`` and the like are seen through.
        site: name for messages.

    Raises:
        DataError: the shapes differ (even where they would broadcast), a value is not finite, lies outside the
            support, or on an edge where the density is zero or infinite.

    >>> import pyro.distributions as dist
    >>> check_support(torch.tensor([0.5, 1.0]), dist.Bernoulli(torch.zeros(2)), "x")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    dgm.errors.DataError: site 'x': 50 % of the observed values lie outside the support {0, 1} of Bernoulli...
    """
    base = distribution
    while isinstance(base, Independent | MaskedDistribution | ExpandedDistribution):
        if isinstance(base, MaskedDistribution) and base._mask is False:
            return  # Pyro does not look at this value either
        base = base.base_dist
    kind = type(base).__name__
    if not isinstance(value, Tensor):
        raise DataError(f"site {site!r}: the observed value is a {type(value).__name__}, not a tensor; see as_tensors")
    _check_shape(value.shape, distribution.batch_shape + distribution.event_shape, site, kind)
    if value.numel() == 0:
        raise DataError(f"site {site!r}: the observed value is empty, shape {tuple(value.shape)}")
    if not torch.isfinite(value).all():
        refuse_nonfinite(value if value.dim() else value.reshape(1), f"the observed value of site {site!r}")
    support = _elementary(distribution)
    if support is None:
        return
    integer_bits = isinstance(support, type(constraints.boolean)) and not value.is_floating_point()
    if integer_bits:
        raise DataError(f"site {site!r}: {kind} needs floating values, got {value.dtype}; use .float()")
    check_inside(value, support, site, kind)
    _check_edge(value, distribution, support, site, kind)


def check_inside(value: Tensor, support: constraints.Constraint, site: str, kind: str) -> None:
    """Refuse values that a support of single values (`plain_support`) does not hold, by a DataError."""
    inside = support.check(value)
    if not inside.all():
        low, high = float(value.min()), float(value.max())
        share = 100.0 * float((~inside).double().mean())
        seen = f"{str(value.dtype).removeprefix('torch.')}, min {low:.6g}, max {high:.6g}"
        raise DataError(
            f"site {site!r}: {share:.3g} % of the observed values lie outside the support {_text(support)} of {kind} "
            f"({seen}); {_cure(support, value, low, high)}"
        )


def kind_of(distribution: Distribution) -> str:
    """The name of a distribution under `.to_event`, `.mask` and plates: `Normal`."""
    while isinstance(distribution, Independent | MaskedDistribution | ExpandedDistribution):
        distribution = distribution.base_dist
    return type(distribution).__name__


def plain_support(distribution: Distribution) -> constraints.Constraint | None:
    """The support of single values where it is the same for every batch of data, None where it has parameters."""
    support = _elementary(distribution)
    ends = [getattr(support, end, 0) for end in ("lower_bound", "upper_bound")]
    return support if all(isinstance(end, Number) for end in ends) else None


def _check_shape(value: torch.Size, expected: torch.Size, site: str, kind: str) -> None:
    if value == expected:
        return
    v, e = tuple(value), tuple(expected)
    if v == (*e, 1):
        cure = "pass it with .squeeze(-1)"
    elif e == (*v, 1):
        cure = "take .squeeze(-1) of the distribution's parameters, or pass the value with .unsqueeze(-1)"
    elif kind == "Categorical" and len(v) > 1 and v[:-1] == e:
        cure = "one-hot rows become class numbers by .argmax(-1), or use a OneHotCategorical likelihood"
    elif kind.startswith("OneHotCategorical") and v == e[:-1]:
        cure = f"class numbers become one-hot rows by torch.nn.functional.one_hot(y, {e[-1]}).float()"
    elif len(e) == 2 and e[0] == e[1] == v[0] and v in ((e[0],), (e[0], 1)):
        cure = "parameters of shape (N, 1) met a plate of N rows: take .squeeze(-1) of them, or .to_event(1)"
    elif math.prod(v) == math.prod(e):
        cure = f"pass it with .reshape({e})"
    else:
        cure = "one of the two has a wrong number of rows or columns"
    raise DataError(f"site {site!r}: the observed value has shape {v}, but {kind} has shape {e}; {cure}")


def _elementary(distribution: Distribution) -> constraints.Constraint | None:
    """The support of single values (or single events, such as a simplex), None where there is none to check."""
    try:
        support = distribution.support
    except NotImplementedError:
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return None if support is None or constraints.is_dependent(support) else support


def _bounds(support: constraints.Constraint) -> tuple[float, float]:
    """Least lower and greatest upper bound; infinite where there is none."""
    lower = getattr(support, "lower_bound", -math.inf)
    upper = getattr(support, "upper_bound", math.inf)
    return float(torch.as_tensor(lower).min()), float(torch.as_tensor(upper).max())


def _text(support: constraints.Constraint) -> str:
    if isinstance(support, type(constraints.boolean)):
        return "{0, 1}"
    low, high = _bounds(support)
    if math.isinf(low) and math.isinf(high):
        return repr(support)
    if support.is_discrete:
        return f"{{{low:g}, ..., {high:g}}}" if math.isfinite(high) else f"{{{low:g}, {low + 1:g}, ...}}"
    return f"between {low:g} and {high:g}"


_GREY = "binarize='batch', 'once' or 'threshold', or use a Gaussian or ContinuousBernoulli likelihood"


def _cure(support: constraints.Constraint, value: Tensor, low: float, high: float) -> str:
    """What to do about values in [low, high] that this support does not hold."""
    whole = bool((value == value.round()).all())
    bottom, top = _bounds(support)
    if isinstance(support, type(constraints.boolean)):
        if low < 0:
            signs = bool((value.abs() == 1).all())
            return "labels -1 and 1 become 0 and 1 by (y + 1) / 2" if signs else "use a Gaussian likelihood"
        if high <= 1:
            return f"grey pixels: {_GREY}"
        return f"divide by 255 first, then {_GREY}" if high <= 255 else "use a Gaussian likelihood, or counts"
    if isinstance(support, type(constraints.one_hot)):
        return "use torch.nn.functional.one_hot(y, K).float(), or a Categorical likelihood"
    if isinstance(support, type(constraints.simplex)):
        sums = value.sum(-1)
        return (
            f"each row must be >= 0 and sum to 1 (the sums run from {float(sums.min()):.6g} to {float(sums.max()):.6g})"
        )
    if support.is_discrete:
        if not whole:
            scaled = 0 <= low and high <= 1 and math.isfinite(top)
            return f"take (x * {top:g}).round()" if scaled else "values must be whole numbers: round them"
        if (low, high) == (bottom + 1, top + 1):
            return "labels count from 1: subtract 1"
        if high > top:
            known, needed = top - bottom + 1, high - bottom + 1
            return f"the model knows {known:g} classes, the data needs {needed:g}: give the model more"
        return f"values below {bottom:g} mean nothing here: drop or recode these rows"
    if (bottom, top) == (0.0, 1.0):
        return "divide by 255" if low >= 0 and high <= 255 else "rescale to [0, 1], or use a Gaussian likelihood"
    return "transform the data, or use a likelihood on all reals (Normal, StudentT)"


def _check_edge(
    value: Tensor, distribution: Distribution, support: constraints.Constraint, site: str, kind: str
) -> None:
    """Closed supports hide open ones (Beta at 0, Gamma at 0, Uniform at its upper end): ask the density itself."""
    if isinstance(support, type(constraints.simplex)):
        edge, interval = value == 0, "the simplex"
    else:
        low, high = _bounds(support)
        edge = (value == getattr(support, "lower_bound", -math.inf)) | (
            value == getattr(support, "upper_bound", math.inf)
        )
        interval = f"({low:g},{high:g})"
    if support.is_discrete or not edge.any():
        return
    with torch.no_grad():
        finite = bool(torch.isfinite(distribution.log_prob(value)).all())
    if not finite:
        share = 100.0 * float(edge.double().mean())
        raise DataError(
            f"site {site!r}: {int(edge.sum())} observed values ({share:.3g} %) are on the edge of {interval}, where "
            f"the density of {kind} is zero or infinite; move them inside, such as by .clamp(1e-3, 1 - 1e-3) for (0,1)"
        )

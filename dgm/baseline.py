"""The density that needs no model: independent marginals of what is observed, fitted to the training rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, MixtureSameFamily, OneHotCategorical, Poisson, constraints

from .dataflow import base_of, by_row

__all__ = ["marginals"]


def marginals(observed: Mapping[str, Any]) -> Tensor | None:
    r"""`(N,)`: log density of each row under independent marginals of these rows; None where there is none to fit.

    .. math:: \sum_j \log \hat p_j(x_{nj})

    Normal densities for sites on the reals, log-normal ones for positive sites, relative frequencies for binary and
    categorical sites, Poisson for counts. With inputs, this is the predictor that always says the mean, or the
    majority.

    Args:
        observed: nodes of a trace by name, as `dgm.sites.Latents.observed` has them.

    >>> import pyro, pyro.distributions as dist
    >>> from dgm.sites import latents
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Bernoulli(0.5), obs=x)
    >>> rows = marginals(latents(model, torch.tensor([0.0, 0.0, 0.0, 1.0])).observed)
    >>> round(float(rows.exp()[0]), 2)
    0.75
    """
    total: Any = None
    for node in observed.values():
        own = _site(node)
        if own is None or (total is not None and own.shape != total.shape):
            return None
        total = own if total is None else total + own
    return total


def _site(node: Any) -> Tensor | None:
    base, value = base_of(node["fn"]), node["value"]
    if not isinstance(value, Tensor) or not [f for f in node["cond_indep_stack"] if f.vectorized]:
        return None
    if isinstance(base, OneHotCategorical):
        share = by_row(node, value).reshape(-1, value.shape[-1])
        return _frequencies(share.argmax(-1)[:, None]) if len(share) == _rows(node) else None
    x = by_row(node, value)  # (N, columns)
    if isinstance(base, Bernoulli | Categorical):
        return _frequencies(x)
    x = x.double()
    if isinstance(base, Poisson):
        rate = x.mean(0).clamp_min(1e-6)
        return (x * rate.log() - rate - torch.lgamma(x + 1)).sum(1)
    part = base.component_distribution if isinstance(base, MixtureSameFamily) else base  # torch wraps its support
    support = getattr(part, "support", None)
    if support is constraints.real:
        return _normal(x)
    if support is not None and not support.is_discrete and getattr(support, "lower_bound", None) == 0:
        bounded = hasattr(support, "upper_bound")
        return None if bounded or bool((x <= 0).any()) else _normal(x.log(), -x.log())
    return None


def _rows(node: Any) -> int:
    return max(f.size for f in node["cond_indep_stack"] if f.vectorized)


def _normal(x: Tensor, jacobian: Tensor | None = None) -> Tensor | None:
    sd = x.std(0, correction=0)
    if not bool((sd > 0).all()):
        return None  # a column that never varies has no density
    log_p = -0.5 * ((x - x.mean(0)) / sd).square() - sd.log() - 0.5 * math.log(2 * math.pi)
    return (log_p if jacobian is None else log_p + jacobian).sum(1)


def _frequencies(x: Tensor) -> Tensor:
    columns: Sequence[Tensor] = x.long().unbind(1)
    parts = []
    for column in columns:
        counts = torch.bincount(column - column.min())
        parts.append((counts.double() / len(column)).log()[column - column.min()])
    return torch.stack(parts, 1).sum(1)

"""SWAG: the mean and low-rank covariance of plain gradient descent about the mode, as a normal density."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from dgm.curvature import row_gradients
from dgm.errors import GuideError, OptionError
from dgm.log_joint import Gradient, LogJoint
from dgm.sites import DATA_PLATE

from .mode import Mode, whole

__all__ = ["SWAG"]

PROBED = 1000
"""Rows from which the automatic step size is found."""

HALVINGS = 8
"""Step sizes that are tried where SGD diverges at the automatic one, each half of the one before."""


class SWAG(Mode):
    """q(u) = N(m, D/2 + C C' / (2 (K - 1))): mean, variances and last K deviations of SGD's iterates at constant step.

    Maddox, Izmailov, Garipov, Vetrov and Wilson, "A Simple Baseline for Bayesian Uncertainty in Deep Learning", 2019.

    It is trained as a point; `finish` goes on by plain SGD on -log p(x, u) / N over minibatches drawn at random, keeps
    every `every`-th iterate, and becomes the normal density of their moments. How wide it is depends on the step size:
    `lr=None` takes the one for which the stationary distribution of SGD is nearest to the posterior, 2 d B / (N tr C)
    with the covariance C of a row's gradient (Mandt, Hoffman and Blei, "Stochastic Gradient Descent as Approximate
    Bayesian Inference", 2017), at most 1 / (the largest curvature), above which descent is not stable, and half of it
    as often as it diverges.

    Args:
        model: the model; global continuous latents.
        batch: data, as the model takes it.
        rank: K, deviations kept, at least 2.
        collect: iterates averaged, at least `rank`.
        every: steps between them; default one pass over the rows.
        batch_size: B, rows in a step of SGD, fewer than there are; default N / 8, at most 100.
        lr: constant step size on the mean loss of a row; None for the one above.
        sites: names of the latents to serve; all of the model's.
        init: constrained start values by site name, as in `Global`.
        plates: names of the data plates.

    Attributes:
        notes: the step size, and how far the mean lies from the point that training found.
        evaluations: rows whose density `finish` evaluated.

    d parameters and d (K + 1) buffers; a sample costs d K.

    Raises:
        OptionError: rank < 2, collect < rank, every, batch_size or lr not positive.
        GuideError: a local latent. In `finish`: fewer than two rows, batch_size >= rows, or SGD that diverges.

    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, batch = example()
    >>> guide = SWAG(model, *batch, rank=2, collect=10)
    >>> guide.finish(model, *batch)
    >>> guide(*batch)["w"].shape
    torch.Size([3])
    """

    factor: Tensor
    variance: Tensor
    rate: Tensor
    moved: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        rank: int = 20,
        collect: int = 50,
        every: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        whole("SWAG", "rank", rank, 2)
        whole("SWAG", "collect", collect, 2)
        if collect < rank:
            raise OptionError(f"SWAG: rank is {rank}, collect {collect}: expected 2 <= rank <= collect")
        for name, value in (("every", every), ("batch_size", batch_size)):
            if value is not None:
                whole("SWAG", name, value)
        if lr is not None and not (isinstance(lr, int | float) and 0 < lr < math.inf):
            raise OptionError(f"SWAG: lr is {lr!r}, expected a positive number or None")
        super().__init__(model, *batch, sites=sites, init=init, plates=plates)
        self.rank, self.collect, self.every, self.batch_size, self.lr = rank, collect, every, batch_size, lr
        like = self.loc.detach()
        self.register_buffer("factor", like.new_zeros(len(like), rank))
        self.register_buffer("variance", torch.ones_like(like))
        self.register_buffer("rate", torch.zeros((), dtype=torch.float64))
        self.register_buffer("moved", torch.zeros((), dtype=torch.float64))
        self.evaluations = 0

    @property
    def notes(self) -> list[str]:
        if not self.done:
            return self.unfinished()
        return [
            f"SWAG: {self.collect} iterates of SGD at step size {float(self.rate):.3g}; their mean is "
            f"{float(self.moved):.2g} of its standard deviations (root mean square) from the point of training"
        ]

    def density(self) -> Any:
        return dist.LowRankMultivariateNormal(self.loc, self.factor, self.variance, validate_args=False)

    def finish(self, model: Callable[..., Any], *data: Any, seed: int = 0) -> None:
        """Go on by SGD at a constant step over minibatches of the rows, and become the normal of its iterates.

        Args:
            model: the trained model. data: all rows. seed: of the order of the rows.

        Raises:
            GuideError: fewer than two rows, batch_size >= rows, or a value that is not finite.
        """
        joint, start = LogJoint(model, [self.packing], self.plates), self.loc.detach().clone()
        rows = next(len(item) for item in data if isinstance(item, Tensor) and item.dim())
        size = self.batch_size or max(1, min(100, rows // 8))
        if size >= rows:
            raise GuideError(
                f"SWAG: batch_size is {size} of {rows} rows: without minibatches SGD has no noise and its iterates no "
                "spread; give a batch_size smaller than the number of rows"
            )
        self.evaluations = 0
        lr = self.lr if self.lr is not None else self._rate(joint, start, data, rows, size)
        slope = joint.traced(start, *_taken(data, torch.arange(size), rows), weight=rows / size)
        for halving in range(1 if self.lr is not None else HALVINGS):
            rate = lr / 2**halving  # one batch may curve more than the rows of which the step size was made
            draws = self._descend(slope, start, data, rows, size, rate, torch.Generator().manual_seed(seed))
            if bool(torch.isfinite(draws).all()):
                break
        else:
            raise GuideError(f"SWAG: SGD at the step size {rate:.3g} diverged from the point: give a smaller lr")
        mean, variance = draws.mean(0), draws.var(0, correction=0)
        deviations = (draws[-self.rank :] - mean).mT
        floor = torch.finfo(self.loc.dtype).eps * (mean.square() + 1)  # iterates that did not move have no variance
        with torch.no_grad():
            self.loc.copy_(mean)
            self.variance.copy_((variance / 2).clamp_min(floor))
            self.factor.copy_(deviations / math.sqrt(2 * (self.rank - 1)))
            width = self.variance + self.factor.square().sum(1)
            self.moved.fill_(float(((mean - start).square() / width).mean().sqrt()))
        self.rate.fill_(rate)
        self.mark()

    def _descend(
        self,
        slope: Gradient,
        u: Tensor,
        data: Sequence[Any],
        rows: int,
        size: int,
        lr: float,
        generator: torch.Generator,
    ) -> Tensor:
        """`(collect, d)`: every `every`-th iterate, or those up to one that is not finite."""
        every = self.every or max(1, rows // size)
        kept: list[Tensor] = []
        for step in range(self.collect * every):
            # drawn anew: in reshuffled passes the noise of a pass cancels, and the iterates hardly spread
            index = torch.randint(rows, (size,), generator=generator)
            u = u + (lr / rows) * slope(u, *_taken(data, index, rows))[1]
            if (step + 1) % every == 0:
                kept.append(u)
                if not bool(torch.isfinite(u).all()):
                    break
        self.evaluations += (step + 1) * size
        return torch.stack(kept)

    def _rate(self, joint: LogJoint, u: Tensor, data: Sequence[Any], rows: int, size: int) -> float:
        """Mandt, Hoffman and Blei's step size, where it is stable."""
        few = min(rows, PROBED)
        some = _taken(data, torch.arange(few), rows)
        total, square = torch.zeros(len(u), dtype=torch.float64, device=u.device), 0.0
        for part in row_gradients(joint, u, some):  # sums: all rows at once would be rows times weights
            total, square = total + part.double().sum(0), square + float(part.double().square().sum())
        noise = square / few - float((total / few).square().sum())  # the sum of variances
        slope = lambda v: torch.func.grad(lambda w: _mean_loss(joint, w, some, few, rows))(v)  # noqa: E731
        vector = torch.cos(torch.arange(len(u), dtype=u.dtype, device=u.device) ** 2)  # of no special direction
        turn = torch.func.vjp(slope, u)[1]
        largest = 0.0
        for _ in range(20):  # power iteration
            vector = vector / vector.norm()
            after = turn(vector)[0].detach()
            largest, vector = float(after.norm()), after
            if not 0 < largest < math.inf:
                break
        self.evaluations += 22 * few
        best = 2 * len(u) * size / (rows * noise) if noise > 0 else math.inf
        rate = min(best, 1 / largest if largest > 0 else math.inf)
        if not 0 < rate < math.inf:
            raise GuideError("SWAG: the gradient or curvature at the point is not finite, or zero: give lr")
        return rate


def _mean_loss(joint: LogJoint, u: Tensor, some: Sequence[Any], few: int, rows: int) -> Tensor:
    inside, rest = joint.terms(u, *some)
    return -(inside.sum() / few + rest / rows)


def _taken(data: Sequence[Any], index: Tensor, rows: int) -> list[Any]:
    return [
        item[index.to(item.device)] if isinstance(item, Tensor) and item.dim() and len(item) == rows else item
        for item in data
    ]

"""Laplace approximation: the normal density at the mode, of full, diagonal, Kronecker or last-layer curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dgm.curvature import fisher_diagonal, fisher_draws, fisher_factors, precision, prior_precision
from dgm.errors import GuideError, OptionError
from dgm.linear_calls import LinearCalls, layers_of
from dgm.log_joint import LogJoint
from dgm.programs import preserved_rng
from dgm.sites import DATA_PLATE

from .curved import CurvedDiagonal, CurvedKronecker, partial_normal
from .mode import FixedNormal, Mode, log_normaliser, positive, whole

__all__ = ["Laplace"]

Structure = Literal["full", "diagonal", "kronecker", "last-layer"]
STRUCTURES: tuple[str, ...] = ("full", "diagonal", "kronecker", "last-layer")
FISHER = ("diagonal", "kronecker")


class Laplace(Mode):
    """q(u) = N(u*, P^-1) at the mode u* of log p(x, u), with P the curvature there: a point until `dgm.fit` has ended.

        P = -d^2/du du' [sum_n log p(x_n | u) + log p(u)],    w = w(u),  u unconstrained, p(u) with the Jacobian

    MacKay, "A practical Bayesian framework for backpropagation networks", 1992; Ritter, Botev and Barber, "A scalable
    Laplace approximation for neural networks", 2018; Daxberger et al., "Laplace Redux", 2021.

    It is trained as a point and `finish` takes the curvature over all rows. "full": the exact Hessian. "diagonal": the
    Fisher information of each entry and the prior's exact curvature. "kronecker": for each linear layer, weight and
    bias together, n A (x) B + prior in the eigenbasis of A and B (exact where the prior is the same over a layer);
    other sites diagonal. "last-layer": the exact Hessian in the last linear layer, all else stays a point
    (`has_density` is then False). The point need be no mode: `notes` says how long the gradient is, how far the mode
    is in posterior standard deviations by one Newton step, and how many directions curve the wrong way; those get the
    prior's precision.

    Args:
        model: the model; global continuous latents.
        batch: data, as the model takes it.
        structure: "full", "diagonal", "kronecker" or "last-layer".
        sites: names of the latents to serve; all of the model's.
        init: constrained start values by site name, as in `Global`.
        draws: targets drawn for each row for the Fisher information; default 2000 / rows, at least 1.
        limit: largest size of a dense Hessian.
        plates: names of the data plates.

    Attributes:
        notes: what `finish` found. gradient_norm, newton_step, negative: the same as numbers ().
        evaluations: rows whose density `finish` evaluated, one for each column of a Hessian or draw of a target.
        log_evidence: Laplace's log p(x) = log p(x, u*) + d/2 log 2 pi - 1/2 log |P|; NaN where there is no density.

    d parameters; a sample costs d^2 ("full"), d ("diagonal"), or two matrix products a layer ("kronecker").

    Raises:
        OptionError: an unknown structure, draws or limit < 1.
        GuideError: a local latent; a Hessian larger than `limit`; no linear layer for "last-layer". In `finish`: a
            gradient or curvature that is not finite.

    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, batch = example()
    >>> guide = Laplace(model, *batch)
    >>> guide.finish(model, *batch)
    >>> guide(*batch)["w"].shape, guide.has_density
    (torch.Size([3]), True)
    """

    gradient_norm: Tensor
    newton_step: Tensor
    negative: Tensor
    evidence: Tensor
    columns: Tensor
    normal: Any

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        structure: Structure = "full",
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        draws: int | None = None,
        limit: int = 2000,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        if structure not in STRUCTURES:
            raise OptionError(f"Laplace: structure is {structure!r}, expected one of {', '.join(STRUCTURES)}")
        for name, value in (("draws", draws), ("limit", limit)):
            if value is not None:
                whole("Laplace", name, value)
        super().__init__(model, *batch, sites=sites, init=init, plates=plates)
        self.structure, self.draws = structure, draws
        for name in ("gradient_norm", "newton_step", "negative", "evidence"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))  # no NaN, which is not equal to itself
        self.evaluations = 0
        size = self.packing.size
        columns = torch.arange(size, device=self.loc.device)
        if structure == "last-layer":
            columns = self._last_layer(model, batch)
        self.register_buffer("columns", columns, persistent=False)
        if structure in ("full", "last-layer") and len(columns) > limit:
            raise GuideError(
                f"Laplace: the Hessian of {len(columns)} entries is larger than limit={limit}: take "
                "structure='kronecker', 'diagonal' or 'last-layer', or a larger limit "
                f"({8 * len(columns) ** 2 / 2**20:.0f} MiB)"
            )
        if structure == "diagonal":
            self.normal = CurvedDiagonal(self.loc)
        elif structure == "kronecker":
            self.normal = CurvedKronecker(self.loc, self._blocks(model, batch))
        else:
            self.normal = FixedNormal(self.loc[self.columns])

    @property
    def has_density(self) -> bool:
        return self.done and len(self.columns) == self.packing.size

    @property
    def log_evidence(self) -> float:
        return float(self.evidence) if self.has_density else math.nan

    @property
    def notes(self) -> list[str]:
        if not self.done:
            return self.unfinished()
        return [
            f"Laplace ({self.structure}): at the point the gradient norm is {float(self.gradient_norm):.3g}, the mode "
            f"{float(self.newton_step):.2g} posterior standard deviations away by one Newton step, and "
            f"{int(self.negative)} directions have negative curvature"
            + (" (they got the prior's precision)" if self.negative else "")
            + ("; the Fisher information sees that of the prior alone" if self.structure in FISHER else "")
            + ("; this is no mode: train longer or with a larger step size" if self._far() else "")
        ]

    def _far(self) -> bool:
        """Whether the point is no mode, by more than the posterior is wide."""
        return float(self.newton_step) > 1 or int(self.negative) > 0

    def density(self) -> Any:
        if self.structure != "last-layer":
            return self.normal(self.loc)
        return partial_normal(self.loc, self.columns, self.normal(self.loc[self.columns]))

    def finish(self, model: Callable[..., Any], *data: Any, seed: int = 0) -> None:
        """Take the curvature at the point over all rows, and become the normal density about it.

        Args:
            model: the trained model. data: all rows. seed: of the targets drawn for the Fisher information.

        Raises:
            GuideError: a gradient or curvature is not finite.
        """
        joint, u = LogJoint(model, [self.packing], self.plates), self.loc.detach()
        rows = next((len(item) for item in data if isinstance(item, Tensor) and item.dim()), 1)
        value, gradient = joint.gradient(u, *data)
        slope = _finite(gradient.double(), "the gradient of the log joint density")[self.columns]
        with preserved_rng(seed):
            if isinstance(self.normal, FixedNormal):
                matrix = _finite(precision(joint, u, data, self.columns), "the curvature of the log joint density")
                negative, passes = 0, len(matrix)
                if int(torch.linalg.cholesky_ex(matrix)[1]):
                    floor = _as_floor(prior_precision(joint, u, data))[0][self.columns]
                    matrix, negative = positive(matrix, floor)
                log_det = self.normal.set(u[self.columns], matrix)
                step = float((slope @ torch.linalg.solve(matrix, slope)).sqrt())
            else:
                prior, negative = _as_floor(prior_precision(joint, u, data))
                draws = self.draws or fisher_draws(rows)
                alone = self.normal.alone if isinstance(self.normal, CurvedKronecker) else self.columns
                fisher = torch.zeros_like(prior)
                if len(alone):
                    fisher[alone] = fisher_diagonal(joint, u, data, draws, alone)
                _finite(fisher, "the Fisher information")
                factors = fisher_factors(joint, u, data, draws) if self.structure == "kronecker" else []
                log_det, step = self.normal.set(fisher, prior, factors, slope)
                passes = draws
        self.evaluations = rows * (1 + passes)
        self.gradient_norm.fill_(float(slope.norm()))
        self.newton_step.fill_(step)
        self.negative.fill_(negative)
        self.evidence.fill_(float(value) + log_normaliser(len(u)) - 0.5 * log_det)
        self.mark()

    def _layers(self, model: Callable[..., Any], batch: Any) -> list[Any]:
        joint = LogJoint(model, [self.packing], self.plates)
        with torch.no_grad(), LinearCalls() as seen:
            values = joint.trace(self.loc.detach(), *batch)[1]
        layers = layers_of(seen, values)
        if not layers:
            raise GuideError(
                f"Laplace: structure={self.structure!r} needs a linear layer (torch.nn.functional.linear) whose weight "
                "is a latent, and the model runs none: take 'full' or 'diagonal'"
            )
        return layers

    def _entries(self, name: str) -> Tensor:
        block = next(b for b in self.packing.blocks if b.site.name == name)
        return torch.arange(block.start, block.stop, device=self.loc.device)

    def _last_layer(self, model: Callable[..., Any], batch: Any) -> Tensor:
        layer = self._layers(model, batch)[-1]
        return torch.cat([self._entries(name) for name in (layer.weight, layer.bias) if name is not None])

    def _blocks(self, model: Callable[..., Any], batch: Any) -> list[tuple[str, Tensor]]:
        """Of each linear layer its name and its entries as a matrix `(out, in)`, the bias as one more column."""
        blocks: dict[str, Tensor] = {}
        for layer in self._layers(model, batch):
            entries = self._entries(layer.weight).reshape(layer.call.weight.shape)
            if layer.bias is not None:
                entries = torch.cat([entries, self._entries(layer.bias)[:, None]], 1)
            blocks.setdefault(layer.weight, entries)
        return list(blocks.items())


def _finite(value: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise GuideError(
            f"Laplace: {what} is not finite at the point where training ended: train longer or with a smaller step "
            "size, look for damaged rows, or use Global with DiagonalNormal, which needs no curvature"
        )
    return value


def _as_floor(prior: Tensor) -> tuple[Tensor, int]:
    """The prior's precision where it is one, else 1; and how many entries had none."""
    _finite(prior, "the curvature of the prior")
    return torch.where(prior > 0, prior, torch.ones_like(prior)), int((prior < 0).sum())

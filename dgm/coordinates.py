"""Coordinates of a model's latents: one unconstrained vector of packings, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .packing import Packing

__all__ = ["Coordinates"]


class Coordinates:
    """The latents of some packings as one vector u, in the coordinates where guides live.

    Args:
        packings: what u is made of, in this order: `(d,)` for global latents, `(rows * d,)` for those of every row.

    Attributes:
        size: length of u. names: of the latents.

    >>> from dgm.models.bayesian_linear_regression import example
    >>> from dgm.sites import latents
    >>> model, (x, y) = example()
    >>> coordinates = Coordinates([Packing(latents(model, x, y).values())])
    >>> values, log_jacobian = coordinates.unpack(torch.zeros(coordinates.size))
    >>> values["w"].shape, coordinates.by_datum
    (torch.Size([3]), False)
    """

    def __init__(self, packings: Sequence[Packing]):
        self.packings = list(packings)
        # (rows, 1, ...) in front of a local vector: the data plate stands where it does in the model
        self.leads = [() if p.frame is None else (p.frame.size, *[1] * (-p.frame.dim - 1)) for p in self.packings]
        self.sizes = [math.prod(lead) * p.size for lead, p in zip(self.leads, self.packings, strict=True)]
        self.size = sum(self.sizes)
        self.names = {site.name for packing in self.packings for site in packing.sites}

    @property
    def by_datum(self) -> bool:
        """Whether all latents are local, in one plate: p(x, w) is then a product over rows."""
        return len(self.packings) == 1 and self.packings[0].frame is not None

    def values(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The latents by name, and log |dw/du| of all of them, from u `(d,)`."""
        values, log_jacobian = self.unpack(u)
        total = u.new_zeros(())
        for term in log_jacobian.values():
            total = total + term.sum()
        return values, total

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The latents by name, and log |dw/du| of each, in its batch shape."""
        values: dict[str, Tensor] = {}
        log_jacobian: dict[str, Tensor] = {}
        for packing, part in self._pieces(u):
            own, terms = packing.unpack(part)
            values.update(own)
            log_jacobian.update(terms)
        return values, log_jacobian

    def raw(self, u: Tensor) -> dict[str, Tensor]:
        """The unconstrained latents by name."""
        return {name: part for packing, piece in self._pieces(u) for name, part in packing.parts(piece).items()}

    def _pieces(self, u: Tensor) -> list[tuple[Packing, Tensor]]:
        parts = zip(self.packings, self.leads, u.split(self.sizes), strict=True)
        return [(packing, part.reshape(*lead, packing.size)) for packing, lead, part in parts]

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Constrained values by name as u, `(*S, B, d)` where `by_datum`, else `(*S, 1, d)`; flattened, a u of `parts`.

        S are sample dimensions in front of every site's shape.
        """
        found = [packing.pack(values) for packing in self.packings]  # (*S, B, 1, ..., d) or (*S, d)
        pieces = [u.reshape(*u.shape[: u.dim() - len(lead) - 1], -1) for u, lead in zip(found, self.leads, strict=True)]
        u = torch.cat(pieces, -1).unsqueeze(-2)
        return u.unflatten(-1, (self.leads[0][0], -1)).squeeze(-3) if self.by_datum else u

    def log_jacobian(self, u: Tensor) -> Tensor:
        """log |dw/du|, one for each datum: `(B,)` where `by_datum`, else `(1,)`."""
        frame = self.packings[0].frame if self.by_datum else None
        total = u.new_zeros(1)
        for term in self.unpack(u)[1].values():
            rows = term.reshape(1, -1) if frame is None else term.movedim(frame.dim, 0)
            total = total + rows.reshape(rows.shape[0], -1).sum(-1)
        return total

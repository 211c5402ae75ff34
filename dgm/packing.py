"""Packing of any set of latents into one unconstrained vector, with its log-Jacobian."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.transforms import biject_to
from torch import Size, Tensor, nn

from .errors import ModelError
from .sites import Site, require_continuous

__all__ = ["Block", "Packing", "gather", "inner_shape", "spread"]


@dataclass(frozen=True, eq=False)
class Block:
    """One site's place in a packed vector."""

    site: Site
    start: int
    stop: int
    unconstrained_event: Size  # event shape before the bijection onto the support
    rest: tuple[int, ...]  # batch shape with 1 in the data plate's place, leading ones cut

    @property
    def transform(self) -> Any:
        return biject_to(self.site.support)


class Packing(nn.Module):
    """Any set of latents as one unconstrained vector u in R^d, and back, with the log-Jacobian of u -> values.

    For local sites the vector belongs to one datum: `u` has shape `(*S, B, d)` where the data plate's dimension
    stands as it does in the model; for global sites `(*S, d)`. S are sample dimensions, to the left of every plate.

    Args:
        sites: the latents, all global or all local in one plate; continuous.

    Raises:
        ModelError: a site is discrete, or sites of different plates are packed together.

    >>> import pyro.distributions as dist, pyro
    >>> from dgm.sites import latents
    >>> sites = latents(lambda: pyro.sample("s", dist.Dirichlet(torch.ones(3))))
    >>> packing = Packing(sites.values())
    >>> packing.size
    2
    >>> values, log_jacobian = packing.unpack(torch.zeros(5, 2))
    >>> values["s"].shape, log_jacobian["s"].shape
    (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(self, sites: Iterable[Site]):
        super().__init__()
        self.sites = list(sites)
        plates = {site.plate for site in self.sites}
        if len(plates) > 1:
            raise ModelError(
                f"sites of different plates cannot share a vector: {sorted(map(str, plates))}; pack each alone"
            )
        self.plate: str | None = next(iter(plates)) if plates else None
        self.frame = self.sites[0].plate_frame if self.plate is not None else None
        self.blocks: list[Block] = []
        start = 0
        for site in self.sites:
            require_continuous(site)
            event = Size(
                biject_to(site.support).inverse_shape(site.batch_shape + site.event_shape)[len(site.batch_shape) :]
            )
            rest = inner_shape(site)
            width = math.prod(rest) * math.prod(event)
            self.blocks.append(Block(site, start, start + width, event, rest))
            start += width
        self.size = start

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the latents: a guide's parameters have it too."""
        types = [site.value.dtype for site in self.sites if site.value is not None]
        return functools.reduce(torch.promote_types, types) if types else torch.get_default_dtype()

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Values and log |dz/du| of each site from a packed vector.

        Args:
            u: `(*batch, d)`, unconstrained.

        Returns:
            values by name, and log-Jacobians by name with the site's batch shape.
        """
        values: dict[str, Tensor] = {}
        log_jacobian: dict[str, Tensor] = {}
        for block, raw in zip(self.blocks, self.parts(u).values(), strict=True):
            transform = block.transform
            value = transform(raw)
            values[block.site.name] = value
            batch_dim = value.dim() - block.site.event_dim
            log_jacobian[block.site.name] = _sum_to(transform.log_abs_det_jacobian(raw, value), batch_dim)
        return values, log_jacobian

    def parts(self, u: Tensor) -> dict[str, Tensor]:
        """A packed vector cut and shaped as the sites' unconstrained values, by name."""
        return {b.site.name: spread(u[..., b.start : b.stop], b.rest, b.unconstrained_event) for b in self.blocks}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The packed vector of constrained values: the inverse of `unpack`, with ones where inner plates stood."""
        return self.join({b.site.name: b.transform.inv(values[b.site.name]) for b in self.blocks})

    def join(self, raw: Mapping[str, Tensor]) -> Tensor:
        """The packed vector of the sites' unconstrained values by name: the inverse of `parts`."""
        parts = [gather(raw[b.site.name], b.rest, b.unconstrained_event) for b in self.blocks]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts)) if parts else Size()
        return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1) if parts else torch.zeros(0)


def inner_shape(site: Site) -> tuple[int, ...]:
    """A site's batch shape with 1 in the data plate's place; leading ones are cut where no plate stands.

    A plate of one row (a single group) is a dimension of the value all the same.
    """
    rest = list(site.batch_shape)
    if site.plate is not None:
        rest[site.plate_frame.dim] = 1
    inner = max((-(frame.dim or 0) for frame in site.frames if frame.name != site.plate), default=0)
    while len(rest) > inner and rest[0] == 1:
        del rest[0]
    return tuple(rest)


def spread(flat: Tensor, rest: Sequence[int], event: Size) -> Tensor:
    """`(*batch, n)` -> `(*batch with the inner plates filled in, *event)`.

    Inner plates stand at their own place among the batch dimensions, where `flat` has ones: exchange the two.
    """
    batch = flat.shape[:-1]
    if not rest:
        return flat.reshape([*batch, *event])
    lead = (1,) * max(0, len(rest) - len(batch))
    out = flat.reshape([*lead, *batch, *rest, *event])
    dims = len(lead) + len(batch)
    for place, width in enumerate(rest):
        if width != 1:
            out = out.transpose(dims - len(rest) + place, dims + place)
    for _ in rest:  # what is left in the inner places are ones
        out = out.squeeze(dims)
    return out


def gather(value: Tensor, rest: Sequence[int], event: Size) -> Tensor:
    """The inverse of `spread`."""
    batch_dim = value.dim() - len(event)
    out = value.reshape([*value.shape[:batch_dim], *[1] * len(rest), *event])
    for place, width in enumerate(rest):
        if width != 1:
            out = out.transpose(batch_dim - len(rest) + place, batch_dim + place)
    return out.reshape([*out.shape[:batch_dim], math.prod(rest) * math.prod(event)])


def _sum_to(tensor: Tensor, dims: int) -> Tensor:
    """Sum the dimensions to the right of the first `dims`."""
    extra = tensor.dim() - dims
    return tensor.sum(tuple(range(-extra, 0))) if extra > 0 else tensor

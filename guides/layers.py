"""Global latents as the weights of layers: which site belongs to which layer, and what its matrix is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from dgm.errors import GuideError
from dgm.packing import Block, Packing
from dgm.sites import Site, latents, start_values

from .global_ import select

__all__ = ["Layer", "Matrix", "global_sites", "layers_of", "matrices_of", "packed_start", "spread"]


@dataclass(frozen=True, eq=False)
class Layer:
    """Latents that belong together: one vector, the matrix first if there is one.

    Attributes:
        name: what the sites' names have in common, as "network.0" of "network.0.weight" and "network.0.bias".
        packing: the sites in the order of the vector.
        shape: (rows, columns) of the layer's matrix: a weight's, with one column more where there is a bias; None for
            sites that are no such pair.
        order: (d,), the packed vector's entries as the matrix has them, row after row; None where they stand so.
    """

    name: str
    packing: Packing
    shape: tuple[int, int] | None
    order: Tensor | None


def global_sites(
    model: Callable[..., Any], batch: Sequence[Any], sites: Iterable[str] | None, plates: Iterable[str], guide: str
) -> list[Site]:
    """The global latents of these names, or all.

    Raises:
        GuideError: a latent is local (one for each row), a name is unknown, or there is no global latent.
    """
    chosen = select(latents(model, *batch, plates=plates), sites)
    for site in chosen:
        if site.plate is not None:
            raise GuideError(
                f"latent {site.name!r} is one for each row (plate {site.plate!r}), {guide} serves those of all rows: "
                f"use Amortized or Free for it, or Joint(..., global_={guide}) for a model that has both kinds"
            )
    if not chosen:
        raise GuideError("the model has no global latent: use Amortized or Free for local ones")
    return chosen


def layers_of(sites: Iterable[Site], by: str) -> list[Layer]:
    """One layer for each prefix of the sites' names, up to the last dot (`by="layer"`), or for each site."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        prefix = site.name.rpartition(".")[0] if by == "layer" else ""
        groups.setdefault(prefix or site.name, []).append(site)
    return [_layer(name, members) for name, members in groups.items()]


def _layer(name: str, sites: list[Site]) -> Layer:
    shapes = {site.name: shape_of(Packing([site]).blocks[0]) for site in sites}
    sites = sorted(sites, key=lambda site: len(shapes[site.name]) < 2)  # stable: matrices first
    first, *others = [shapes[site.name] for site in sites]
    packing = Packing(sites)
    if len(first) < 2 or math.prod(first) == 0:
        return Layer(name, packing, None, None)
    rows, columns = first[0], math.prod(first[1:])
    if not others:
        return Layer(name, packing, (rows, columns), None)
    if others != [Size([rows])]:
        return Layer(name, packing, None, None)
    place = torch.arange(packing.size)
    matrix = torch.cat([place[: rows * columns].reshape(rows, columns), place[rows * columns :].unsqueeze(-1)], -1)
    return Layer(name, packing, (rows, columns + 1), matrix.flatten())


def shape_of(block: Block) -> Size:
    """Shape of one site's unconstrained value, its inner plates in front."""
    return Size(block.rest) + block.unconstrained_event


@dataclass(frozen=True)
class Matrix:
    """A weight in a packed vector: `(outputs, inputs, *rest)`, as torch's linear and convolutional layers have it."""

    name: str
    outputs: int
    inputs: int
    rest: int


def matrices_of(packing: Packing, vectors: bool = False) -> dict[str, Matrix]:
    """The weights among the sites: real, with two axes or more; by choice a vector alone in its layer, as one row."""
    groups = [layer.packing.sites for layer in layers_of(packing.sites, "layer")]
    alone = {group[0].name for group in groups if len(group) == 1}
    found = {}
    for block in packing.blocks:
        shape, name = shape_of(block), block.site.name
        if vectors and len(shape) == 1 and shape[0] > 1 and name in alone:
            shape = Size([1, *shape])
        if len(shape) >= 2 and block.site.support_name == "real":
            found[name] = Matrix(name, shape[0], shape[1], math.prod(shape[2:]))
    return found


def spread(packing: Packing, matrices: Mapping[str, Matrix], factors: Mapping[str, Tensor]) -> Tensor:
    """Factors of the weights, (*S, outputs or 1, inputs or 1) by name, as one packed vector (*S, d); 1 elsewhere."""
    batch = torch.broadcast_shapes(*(factor.shape[:-2] for factor in factors.values()))
    like = next(iter(factors.values()))
    parts = []
    for block in packing.blocks:
        name, width = block.site.name, block.stop - block.start
        if name in factors:
            matrix = matrices[name]
            wide = factors[name].unsqueeze(-1).expand(*batch, matrix.outputs, matrix.inputs, matrix.rest)
            parts.append(wide.reshape(*batch, width))
        else:
            parts.append(like.new_ones(*batch, width))
    return torch.cat(parts, -1)


def packed_start(
    packing: Packing, model: Callable[..., Any], batch: Sequence[Any], init: Mapping[str, Tensor] | None
) -> Tensor:
    """Where the sites start, (d,): given, else the model's `init_values()`, else the prior's median."""
    return packing.pack(start_values(model, batch, packing.sites, init)).reshape(-1)

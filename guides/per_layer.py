"""Global latents by layer or by site: independent densities, one for each block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.distributions import as_pyro, auxiliary, sample_sites
from dgm.errors import GuideError, OptionError, did_you_mean
from dgm.sites import DATA_PLATE, start_values

from .diagonal_normal import DiagonalNormal
from .family import make_family
from .full_normal import FullNormal
from .global_ import placed
from .layers import Layer, global_sites, layers_of

__all__ = ["PerLayer"]

LARGEST = 5000  # entries of a block with every covariance: 12.5 million parameters

Make = Callable[..., nn.Module]


class PerLayer(PyroModule):
    """q(w) = prod_l F_l(u_l) |du_l / dw_l|: an independent density of a family for each layer, or each site.

    With FullNormal it is the normal whose covariance is block-diagonal; with MatrixNormal each layer has covariances of
    its outputs and of its inputs (Louizos and Welling: Structured and Efficient Variational Deep Learning with Matrix
    Gaussian Posteriors, 2016); with a mapping the last layer may be rich and the others points.

    The vector of a block is the weight row after row, then the bias. A family whose constructor takes `shape` is told
    that of the layer's matrix, (outputs, inputs) of a weight or (outputs, inputs + 1) of a weight and its bias, where
    the layer is such a pair; its vector is then that matrix row after row, bias last in each. A convolution's inputs
    are its channels and its window. Cost and parameters are those of the families; it attaches to global latents.

    Args:
        model: the model; only its sites are read.
        batch: a batch of data, as the model takes it.
        family: `family(features)`, or a mapping from patterns as "network.2" or "*.weight" to families: the first that
            matches a block's name or one of its sites' serves it. Blocks that none matches get DiagonalNormal.
        by: "layer" joins sites whose names share all before the last dot; "site" gives each its own block.
        sites: names of the latents to serve; default all.
        init: constrained start values by site name; otherwise the model's `init_values()`, else the prior's median.
        init_scale: standard deviation at the start, unconstrained; else the model's `init_scale`, else the family's.
        plates: names of the data plates.

    Attributes:
        layers: the blocks, by name.
        has_density: False where one of the families has none; the objective is then no bound.

    Raises:
        GuideError: a latent is local (one for each row), a name is unknown, there is no global latent, a pattern
            matches nothing, or a FullNormal block has more than 5000 entries.
        ModelError: a latent is discrete.
        OptionError: `by` is something else.

    >>> from dgm.models.bnn import example
    >>> model, batch = example()
    >>> guide = PerLayer(model, *batch)
    >>> list(guide.layers), guide(*batch)["network.0.weight"].shape
    (['network.0', 'network.2', 'noise_scale'], torch.Size([8, 3]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Make | Mapping[str, Make] = FullNormal,
        by: Literal["layer", "site"] = "layer",
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        init_scale: float | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ) -> None:
        super().__init__()
        if by not in ("layer", "site"):
            raise OptionError(f"PerLayer: by is {by!r}, expected 'layer' or 'site'")
        chosen = global_sites(model, batch, sites, plates, "PerLayer")
        blocks = layers_of(chosen, by)
        self.layers: dict[str, Layer] = {layer.name: layer for layer in blocks}
        makers = _makers(blocks, family)
        values = start_values(model, batch, chosen, init)
        scale = init_scale if init_scale is not None else getattr(model, "init_scale", None)
        families = {}
        for layer, make in zip(blocks, makers, strict=True):
            start = layer.packing.pack(values).reshape(-1)
            shaped = layer.shape is not None and _takes_shape(make)
            if shaped and layer.order is not None:
                start = start[layer.order]
                self.register_buffer(_home(layer.name), layer.order.argsort(), persistent=False)
            shape: dict[str, Any] = {"shape": layer.shape} if shaped else {}
            module = make_family(make, layer.packing.size, dtype=start.dtype, **shape)
            families[_key(layer.name)] = placed(module, start, scale)
        self.families = nn.ModuleDict(families)
        self.has_density = all(getattr(module, "has_density", True) for module in families.values())

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            family, order = self.families[_key(name)], getattr(self, _home(name), None)
            # objectives may read the packed vector's own density, where it is the family's as it stands
            infer: Any = auxiliary(layer.packing) if order is None else {"is_auxiliary": True}
            u = pyro.sample(f"_global_{name}", as_pyro(family()), infer=infer)  # (*S, d)
            if order is not None:
                u = torch.index_select(u, -1, order)
            values.update(sample_sites(layer.packing, u, getattr(family, "has_density", True)))
        return values


def _key(name: str) -> str:
    return name.replace(".", "|")  # a module's name holds no dots


def _home(name: str) -> str:
    """Name of the buffer that puts a matrix's entries back where the packed vector has them."""
    return f"order_{_key(name)}"


def _makers(blocks: list[Layer], family: Make | Mapping[str, Make]) -> list[Make]:
    """Each block's family."""
    if not isinstance(family, Mapping):
        makers = [family] * len(blocks)
    else:
        names = [[layer.name, *(site.name for site in layer.packing.sites)] for layer in blocks]
        every = [name for group in names for name in group]
        for pattern in family:
            if not any(fnmatchcase(name, pattern) for name in every):
                raise GuideError(f"PerLayer, family: {pattern!r} matches no layer: {did_you_mean(pattern, every)}")
        makers = []
        for group in names:
            fitting = (make for pattern, make in family.items() if any(fnmatchcase(n, pattern) for n in group))
            makers.append(next(fitting, DiagonalNormal))
    for layer, make in zip(blocks, makers, strict=True):
        size = layer.packing.size
        if _unwrapped(make) is FullNormal and size > LARGEST:
            raise GuideError(
                f"PerLayer: a FullNormal of {layer.name!r} has {size} entries and {size * (size + 3) // 2:,} "
                f"parameters, more than {LARGEST} entries allow: use LowRankNormal or MatrixNormal for it"
            )
    return makers


def _unwrapped(make: Any) -> Any:
    return _unwrapped(make.func) if isinstance(make, partial) else make


def _takes_shape(make: Make) -> bool:
    if isinstance(make, partial) and "shape" in make.keywords:
        return False
    try:
        return "shape" in inspect.signature(make).parameters
    except (TypeError, ValueError):  # a callable without a signature
        return False

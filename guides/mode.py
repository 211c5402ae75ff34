"""What posteriors that are made after training have in common: a point that is trained, and a density about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.distributions import as_pyro, sample_sites
from dgm.errors import GuideError, OptionError
from dgm.packing import Packing
from dgm.programs import program_name
from dgm.sites import DATA_PLATE, Site, latents, require_continuous, start_values

from .full_normal import TriangularNormal
from .global_ import select
from .point import Point

__all__: list[str] = []  # nothing for the registry


class Finished(PyroModule):
    """A guide that is one thing until `finish` and another afterwards; the state dict tells which.

    Attributes:
        done: whether `finish` has made the posterior.
    """

    finished: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("finished", torch.zeros((), dtype=torch.bool))
        self.done = False  # the buffer as a Python value: a forward pass must not look into a tensor

    def unfinished(self) -> list[str]:
        """The note of a guide whose posterior was never made."""
        return [f"{type(self).__name__}: not finished, it is still a point: let dgm.fit run to its end"]

    def mark(self) -> None:
        """The posterior is made."""
        self.finished.fill_(True)
        self.done = True

    def reopen(self) -> None:
        """Training begins again: what it was before `finish`."""
        self.finished.fill_(False)
        self.done = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.done = bool(self.finished)


class Mode(Finished):
    """The mode of log p(x, w(u)) + log |dw/du|, the density of the unconstrained latents u: a point until `finish`.

    The Jacobian is a part of it, unlike in `Point`, because the normal density that replaces the point lives there: the
    mode is that of the density which it approximates.

    Args:
        model, batch: the model and a batch of data; only its sites are read.
        sites: names of the latents to serve; all of the model's.
        init: constrained start values by site name, as in `Global`.
        plates: names of the data plates.

    Raises:
        GuideError: a latent is local, an unknown name, or latents that are left out.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        self.plates = tuple(plates)
        chosen = global_sites(model, batch, sites, self.plates, type(self).__name__)
        self.packing = Packing(chosen)
        self.point = Point(self.packing.size)
        start = self.packing.pack(start_values(model, batch, chosen, init)).reshape(-1)
        self.point.to(start)
        self.point.initialise(start)

    @property
    def loc(self) -> Tensor:
        """The point, (d,)."""
        return self.point.loc.bias

    @property
    def has_density(self) -> bool:
        return self.done

    def density(self) -> Any:
        """The density of u after `finish`."""
        raise NotImplementedError

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        q = self.density() if self.done else self.point()
        u = pyro.sample("_global", as_pyro(q), infer={"is_auxiliary": True})  # (*S, d)
        return sample_sites(self.packing, u)


def global_sites(
    model: Callable[..., Any], batch: Any, names: Iterable[str] | None, plates: Iterable[str], guide: str
) -> list[Site]:
    """All latents of a model, which must be global and continuous, and be served by this guide alone.

    Raises:
        GuideError: a latent is local, left out, or there is none.
        ModelError: a latent is discrete.
    """
    found = latents(model, *batch, plates=plates)
    chosen = select(found, names)
    for site in found.local:
        raise GuideError(
            f"latent {site.name!r} is one for each row (plate {site.plate!r}), {guide} works on the joint density of "
            "global latents alone: use Joint with Global and Amortized for this model"
        )
    for site in found.values():  # enumerated ones too: the joint density would be that of one of their values
        require_continuous(site)
    left = sorted(set(found) - {site.name for site in chosen})
    if left:
        raise GuideError(f"{guide} leaves out the latent {left[0]!r}; its density is that of all: name them all")
    if not chosen:
        raise GuideError(f"{program_name(model)} has no latent, {guide} has nothing to be a posterior of")
    return chosen


def whole(guide: str, name: str, value: Any, least: int = 1) -> None:
    """An option that counts something.

    Raises:
        OptionError: not a whole number, or below the least.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{guide}: {name} is {value!r}, expected a whole number of at least {least}")


class FixedNormal(nn.Module):
    """A normal density that is computed, not trained: buffers of fixed size, so that a state dict carries it.

    Args:
        like: (d,), tells size, dtype and device.

    >>> normal = FixedNormal(torch.zeros(2))
    >>> log_determinant = normal.set(torch.ones(2), torch.tensor([[4.0, 0.0], [0.0, 1.0]]))
    >>> normal().variance
    tensor([0.2500, 1.0000])
    """

    loc: Tensor
    log_scale: Tensor
    lower: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        like = like.detach()
        self.register_buffer("loc", torch.zeros_like(like))
        self.register_buffer("log_scale", torch.zeros_like(like))
        self.register_buffer("lower", like.new_zeros(len(like), len(like)))  # strictly, in units of the scale

    @torch.no_grad()
    def set(self, loc: Tensor, precision: Tensor) -> float:
        """The normal of this mean and precision matrix `(d, d)`, positive definite; returns log |precision|."""
        # P = U U' with U upper triangular, by a Cholesky factor of the reversed matrix: then U^-T is lower triangular
        # and is the Cholesky factor of the covariance, without an inverse of P
        upper = torch.linalg.cholesky(precision.double().flip(0, 1)).flip(0, 1)
        eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        tril = torch.linalg.solve_triangular(upper.mT, eye, upper=False)
        scale = tril.diagonal()
        self.loc.copy_(loc)
        self.log_scale.copy_(scale.log())
        self.lower.copy_((tril / scale[:, None]).tril(-1))
        return float(-2 * scale.log().sum())

    def forward(self, loc: Tensor | None = None) -> TriangularNormal:
        """The density, about `loc` (d,) where one is given."""
        return TriangularNormal(self.loc if loc is None else loc, self.log_scale, self.lower)


def positive(matrix: Tensor, floor: Tensor) -> tuple[Tensor, int]:
    """A precision matrix without its negative directions: each gets the prior's precision; and how many there were.

    Args:
        matrix: (d, d), symmetric. floor: (d,), precision of the prior, > 0.
    """
    values, vectors = torch.linalg.eigh(matrix)
    bad = values <= len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    if not bool(bad.any()):
        return matrix, 0
    prior = (vectors.square() * floor[:, None]).sum(0)
    return (vectors * torch.where(bad, prior, values)) @ vectors.mT, int(bad.sum())


def log_normaliser(size: int) -> float:
    """d/2 log 2 pi."""
    return 0.5 * size * math.log(2 * math.pi)

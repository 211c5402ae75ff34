"""One density for each datum, its parameters the output of an encoder network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.distributions import as_pyro, sample_sites
from dgm.errors import GuideError
from dgm.sites import DATA_PLATE, Packing, Site, latents

from .diagonal_normal import DiagonalNormal
from .encoders import mlp
from .global_ import select

__all__ = ["Amortized"]


class Amortized(PyroModule):
    """q(z_n | x_n) = F(u; encoder(x_n)) |du/dz|: one conditional density F serves every row.

    The encoder reads every tensor of the batch that has one entry for each row, flattened and side by side. Columns
    that leave [0, 1] are standardised by the mean and standard deviation of the batch given here, so give all of it.
    (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed and Wierstra, 2014.)

    Args:
        model: the model; only its sites are read.
        batch: data, as the model takes it.
        family: `family(features, context=c)` makes a conditional density on R^d.
        encoder: a factory `in_features -> module`, or a ready module `(B, in_features) -> (B, c)`.
        sites: names of the latents to serve; default all local ones.
        plates: names of the data plates.

    Raises:
        GuideError: a latent is global, the local latents stand in different plates, or no argument has their rows.
        ModelError: a latent is discrete.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)
    >>> guide = Amortized(model, torch.zeros(7, 2), encoder=mlp(16))
    >>> guide(torch.zeros(5, 2))["z"].shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Callable[..., nn.Module] = DiagonalNormal,
        encoder: Callable[..., nn.Module] | nn.Module | None = None,
        sites: Iterable[str] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        chosen = local_sites(latents(model, *batch, plates=plates), sites, type(self).__name__)
        self.packing = Packing(chosen)
        self.plate = DataPlate(chosen[0], batch)
        self.features = Features(batch, self.plate.rows)
        self.encoder = _build(encoder if encoder is not None else mlp(128), self.features.width)
        with torch.no_grad():
            context = self.encoder(self.features(batch)[:2])
        if context.dim() != 2:
            raise GuideError(f"the encoder gives shape {tuple(context.shape)} for 2 rows, expected (2, context)")
        self.family = family(self.packing.size, context=context.shape[-1])

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        context = self.encoder(self.features(batch))  # (B, c)
        with self.plate.open(batch) as shape:
            density = self.family(context.reshape(*shape, context.shape[-1]))
            u = pyro.sample(f"_{self.packing.plate}", as_pyro(density), infer={"is_auxiliary": True})  # (*S, B, d)
            return sample_sites(self.packing, u, getattr(self.family, "has_density", True))


def local_sites(found: Any, names: Iterable[str] | None, guide: str) -> list[Site]:
    """The local latents to serve, all in one plate."""
    if names is None and found.global_:
        raise GuideError(
            f"latent {found.global_[0].name!r} is global: {guide} serves one density for each row; use Joint, which "
            "adds Global for such latents, or name the local ones by sites=[...]"
        )
    chosen = select(found, names)
    if not chosen:
        raise GuideError(f"the model has no latent inside a data plate: use Global instead of {guide}")
    wrong = [site.name for site in chosen if site.plate is None]
    if wrong:
        raise GuideError(f"latent {wrong[0]!r} is global, {guide} serves local ones: use Global or Joint for it")
    if len({site.plate for site in chosen}) > 1:
        raise GuideError(
            f"the latents stand in different plates {sorted({str(s.plate) for s in chosen})}: Joint serves each"
        )
    return chosen


def _build(encoder: Any, width: int) -> nn.Module:
    if isinstance(encoder, nn.Module):
        return encoder
    built = encoder(width)
    if not isinstance(built, nn.Module):
        raise GuideError(
            f"encoder made a {type(built).__name__}, expected a torch module: give a factory such as mlp(64)"
        )
    return built


class DataPlate:
    """The data plate of a model, opened by a guide with as many rows as the present batch has."""

    def __init__(self, site: Site, batch: Sequence[Any]):
        frame = site.plate_frame
        self.name, self.dim, self.rows = frame.name, frame.dim, frame.size
        declared = frame.full_size if frame.full_size not in (None, frame.size) else None
        self.full_size: int | None = declared
        places = [
            i for i, item in enumerate(batch) if isinstance(item, Tensor) and item.dim() and len(item) == self.rows
        ]
        if not places:
            raise GuideError(
                f"no argument of the batch has the {self.rows} rows of plate {self.name!r}: the guide must see the "
                f'rows that the model uses; write pyro.plate("{self.name}", len(x)) for an argument x'
            )
        self.place = places[0]

    def count(self, batch: Sequence[Any]) -> int:
        return len(batch[self.place])

    def open(self, batch: Sequence[Any]) -> Any:
        return _Opened(self, self.count(batch))


class _Opened:
    """The plate as a context; gives the shape `(B, 1, ...)` that a row's context vectors must have."""

    def __init__(self, plate: DataPlate, rows: int):
        self.shape = (rows, *([1] * (-plate.dim - 1)))
        self.plate = pyro.plate(plate.name, rows, dim=plate.dim)
        self.scale = poutine.scale(scale=1.0 if plate.full_size is None else plate.full_size / rows)

    def __enter__(self) -> tuple[int, ...]:
        self.scale.__enter__()
        self.plate.__enter__()
        return self.shape

    def __exit__(self, *error: Any) -> None:
        self.plate.__exit__(*error)
        self.scale.__exit__(*error)


class Features(nn.Module):
    """Everything a batch says of a row, as one vector: `(B, features)`."""

    shift: Tensor
    scale: Tensor

    def __init__(self, batch: Sequence[Any], rows: int):
        super().__init__()
        self.places = [
            i for i, item in enumerate(batch) if isinstance(item, Tensor) and item.dim() and len(item) == rows
        ]
        raw = self._raw(batch)
        self.width = raw.shape[-1]
        outside = ((raw < 0) | (raw > 1)).any(0)
        sd = raw.std(0, unbiased=False) if len(raw) > 1 else torch.ones_like(raw[0])
        sd = torch.where(outside & (sd > 0), sd, torch.ones_like(sd))
        mean = torch.where(outside, raw.mean(0), torch.zeros_like(sd))
        self.register_buffer("shift", mean)
        self.register_buffer("scale", sd)
        self.plain = not bool(outside.any())

    def _raw(self, batch: Sequence[Any]) -> Tensor:
        parts = [batch[i].reshape(len(batch[i]), -1) for i in self.places]
        dtype = next((p.dtype for p in parts if p.is_floating_point()), torch.get_default_dtype())
        return torch.cat([p.to(dtype) for p in parts], -1) if len(parts) > 1 else parts[0].to(dtype)

    def forward(self, batch: Sequence[Any]) -> Tensor:
        raw = self._raw(batch)
        return raw if self.plain else (raw - self.shift) / self.scale

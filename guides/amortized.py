"""One density for each datum, its parameters the output of an encoder network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from dgm.distributions import as_pyro, auxiliary, sample_sites
from dgm.entries import entry_name
from dgm.errors import DGMError, GuideError, did_you_mean
from dgm.packing import Packing
from dgm.programs import preserved_buffers, preserved_rng
from dgm.sites import DATA_PLATE, Site, latents

from .diagonal_normal import DiagonalNormal
from .domains import check_scale
from .encoders import mlp
from .family import make_family
from .global_ import select

__all__ = ["Amortized"]


class Amortized(PyroModule):
    """q(z_n | x_n) = F(u; encoder(x_n)) |du/dz|: one conditional density F serves every row.

    The encoder reads every tensor of the batch that has one entry for each row, flattened and side by side, or those
    that `inputs` names. Columns that leave [0, 1] are standardised by the mean and standard deviation of the batch
    given here, so give all of it; where the encoder has a `period` (sets, sequences), columns that far apart share one.
    (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed and Wierstra, 2014.)

    The start: a family's heads are linear in the context with torch's default weights, and their biases give location 0
    and scale 1, the width of a standard normal prior. `init_scale=1e-2`, say, starts near an autoencoder instead: the
    likelihood then leads, and the prior comes in as the scale grows.

    Args:
        model: the model; only its sites are read.
        batch: data, as the model takes it.
        family: `family(features, context=c)` makes a conditional density on R^d.
        encoder: a factory `in_features -> module`, or a ready module `(B, in_features) -> (B, c)`.
        sites: names of the latents to serve; default all local ones.
        inputs: which of the model's arguments the encoder sees, by name or place; default all that have the rows.
        init_scale: standard deviation at the start, > 0, unconstrained; default the family's own.
        plates: names of the data plates.

    Raises:
        GuideError: a latent is global, the local latents stand in different plates, no argument has their rows, the
            encoder does not give one vector for each row, or the family cannot be told its scale.
        OptionError: an init_scale that is not positive and finite.
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
        inputs: Iterable[str | int] | None = None,
        init_scale: float | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        chosen = local_sites(latents(model, *batch, plates=plates), sites, type(self).__name__)
        self.packing = Packing(chosen)
        self.plate = DataPlate(chosen[0], batch)
        self.features, self.encoder, width = encoded(model, batch, self.plate.rows, encoder, inputs, self.packing.dtype)
        self.family = make_family(family, self.packing.size, width, dtype=self.packing.dtype)
        if init_scale is not None:
            _initialise(self.family, self.packing.size, init_scale)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        context = self.encoder(self.features(batch))  # (B, c)
        with self.plate.open(batch) as shape:
            density = self.family(context.reshape(*shape, context.shape[-1]))
            u = pyro.sample(f"_{self.packing.plate}", as_pyro(density), infer=auxiliary(self.packing))  # (*S, B, d)
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


def _initialise(family: nn.Module, size: int, scale: float) -> None:
    initialise: Any = getattr(family, "initialise", None)
    if initialise is None:
        raise GuideError(
            f"init_scale={scale}: {type(family).__name__} cannot be told where to start; leave it out, or give the "
            "family a method initialise(loc, scale)"
        )
    check_scale("init_scale", scale)
    initialise(torch.zeros(size), scale)


def encoded(
    model: Callable[..., Any],
    batch: Sequence[Any],
    rows: int,
    encoder: Callable[..., nn.Module] | nn.Module | None = None,
    inputs: Iterable[str | int] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Features, nn.Module, int]:
    """What the encoder sees of a batch, the encoder, and the width of its context, found by running it.

    Args:
        dtype: floating type of the latents, and so of the encoder and what it sees; default that of the data.

    Raises:
        GuideError: an unknown input or one without the rows, or an encoder that does not give (B, c) for B rows, or is
            a ready module of another floating type.
    """
    places = None if inputs is None else _places(model, batch, rows, inputs)
    features = Features(batch, rows, places, dtype)
    built = _build(encoder if encoder is not None else mlp(128), features)
    features.share(batch, getattr(built, "period", None))
    name = f"encoder {type(built).__name__}"
    shapes = []
    for count in (2, 3):
        seen = features(batch)
        seen = seen[[i % len(seen) for i in range(count)]]
        try:
            with torch.no_grad(), preserved_rng(), preserved_buffers(built):
                context = built(seen)
        except DGMError:
            raise
        except Exception as error:  # the user's own code may fail in any way
            told = " ".join(str(error).split())
            raise GuideError(f"{name} cannot read rows of {features.width} values: {told}") from error
        if not isinstance(context, Tensor):
            raise GuideError(f"{name} gives a {type(context).__name__}, expected a tensor (B, c)")
        shapes.append(tuple(context.shape))
        if context.dim() != 2 or len(context) != count:
            raise GuideError(
                f"{name} gives shape {shapes[-1]} for {count} rows, expected ({count}, c): one vector for each row"
            )
    if shapes[0][1] != shapes[1][1]:
        raise GuideError(
            f"{name} gives {shapes[0][1]} values for each of 2 rows and {shapes[1][1]} for each of 3: the width of its "
            "output must not depend on the number of rows"
        )
    return features, built, shapes[0][1]


def _places(model: Callable[..., Any], batch: Sequence[Any], rows: int, inputs: Iterable[str | int]) -> list[int]:
    """The places in the batch of arguments by name or place."""
    if isinstance(inputs, str | int):
        raise GuideError(f"inputs is {inputs!r}, expected a list of names or places: inputs=[{inputs!r}]")
    program = model.forward if isinstance(model, nn.Module) else model
    taken = [
        p
        for p in inspect.signature(program).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    names = [p.name for p in taken][: len(batch)]
    chosen: list[int] = []
    for which in inputs:
        if not isinstance(which, str | int):
            raise GuideError(f"inputs holds {which!r}, expected names or places of the model's arguments")
        if isinstance(which, str) and which not in names:
            raise GuideError(f"inputs: the model has no argument {which!r}: {did_you_mean(which, names)}")
        place = names.index(which) if isinstance(which, str) else which
        if not 0 <= place < len(batch):
            raise GuideError(f"inputs: there is no argument {place}, the batch has {len(batch)}")
        item = batch[place]
        if not (isinstance(item, Tensor) and item.dim() and len(item) == rows):
            shape = tuple(item.shape) if isinstance(item, Tensor) else type(item).__name__
            raise GuideError(f"inputs: argument {which!r} ({shape}) does not have the {rows} rows of the data plate")
        chosen.append(place)
    if not chosen:
        raise GuideError("inputs names no argument: the encoder must see something")
    return chosen


def _build(encoder: Any, features: Features) -> nn.Module:
    dtype = features.shift.dtype
    if isinstance(encoder, nn.Module):
        other = next((p.dtype for p in encoder.parameters() if p.is_floating_point() and p.dtype != dtype), None)
        if other is not None:
            raise GuideError(
                f"encoder {type(encoder).__name__} has parameters of {other}, the latents and so what it sees are "
                f"{dtype}: convert it, encoder.to({dtype}), or give a factory such as mlp(64), which is converted"
            )
        return encoder
    if not callable(encoder):
        raise GuideError(f"encoder is {encoder!r}, expected a factory such as mlp(64), or a torch module")
    try:
        built = encoder(features.width)
    except DGMError:
        raise
    except Exception as error:  # the user's own code may fail in any way
        raise GuideError(
            f"encoder {entry_name(encoder)} cannot be made for rows of {features.width} values, "
            f"{type(error).__name__}: {error}; give a factory `in_features -> module` as mlp(64), or a ready module"
        ) from error
    if not isinstance(built, nn.Module):
        raise GuideError(
            f"encoder made a {type(built).__name__}, expected a torch module: give a factory such as mlp(64)"
        )
    return built.to(dtype)


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

    def open(self, batch: Sequence[Any], site: bool = True) -> Any:
        """The plate for the present rows; with its own site as `pyro.plate` has, which a program may have once."""
        return _Opened(self, self.count(batch), site)


class _Opened:
    """The plate as a context; gives the shape `(B, 1, ...)` that a row's context vectors must have."""

    def __init__(self, plate: DataPlate, rows: int, site: bool):
        self.shape = (rows, *([1] * (-plate.dim - 1)))
        self.plate: Any = (pyro.plate if site else IndepMessenger)(plate.name, rows, dim=plate.dim)
        self.declared = _Declared(plate.name, plate.full_size)

    def __enter__(self) -> tuple[int, ...]:
        self.declared.__enter__()
        self.plate.__enter__()
        return self.shape

    def __exit__(self, *error: Any) -> None:
        self.plate.__exit__(*error)
        self.declared.__exit__(*error)


class _Declared(Messenger):
    """Gives a plate the full size that the model's declares, and its scale N / B, without drawing a subsample.

    Whoever takes the scale of a site out reads it from the plate's frame, so that the two must not differ.
    """

    def __init__(self, name: str, full_size: int | None):
        super().__init__()
        self.name, self.full_size = name, full_size

    def _pyro_sample(self, msg: Any) -> None:
        if self.full_size is None:
            return
        frames = msg["cond_indep_stack"]
        for i, frame in enumerate(frames):
            if frame.name == self.name and frame.vectorized and frame.size != self.full_size:
                msg["cond_indep_stack"] = (*frames[:i], frame._replace(full_size=self.full_size), *frames[i + 1 :])
                msg["scale"] = msg["scale"] * (self.full_size / frame.size)


class Features(nn.Module):
    """Everything that an encoder sees of a row, as one vector: `(B, features)`.

    Args:
        batch: data, rows first. rows: how many.
        places: which tensors of the batch; default all that have the rows.
        dtype: floating type of the vector; default that of the first floating data.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        batch: Sequence[Any],
        rows: int,
        places: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.places = (
            list(places)
            if places is not None
            else [i for i, item in enumerate(batch) if isinstance(item, Tensor) and item.dim() and len(item) == rows]
        )
        seen = [batch[i] for i in self.places]
        self.width = sum(math.prod(item.shape[1:]) for item in seen)
        if dtype is None:
            dtype = next((item.dtype for item in seen if item.is_floating_point()), torch.get_default_dtype())
        self.register_buffer("shift", torch.zeros(self.width, dtype=dtype, device=seen[0].device))
        self.register_buffer("scale", torch.ones(self.width, dtype=dtype, device=seen[0].device))
        self.share(batch, None)

    def share(self, batch: Sequence[Any], period: int | None) -> None:
        """Standardise by these data: each column alone, or together with those that stand `period` columns apart."""
        raw = self._raw(batch)
        raw = raw if period is None else raw.reshape(-1, period)
        outside = ((raw < 0) | (raw > 1)).any(0)
        sd = raw.std(0, unbiased=False) if len(raw) > 1 else torch.ones_like(raw[0])
        sd = torch.where(outside & (sd > 0), sd, torch.ones_like(sd))
        mean = torch.where(outside, raw.mean(0), torch.zeros_like(sd))
        times = self.width // len(mean)
        self.shift, self.scale = mean.repeat(times), sd.repeat(times)
        self.plain = not bool(outside.any())

    def _raw(self, batch: Sequence[Any]) -> Tensor:
        parts = [batch[i].reshape(len(batch[i]), -1).to(self.shift.dtype) for i in self.places]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def forward(self, batch: Sequence[Any]) -> Tensor:
        raw = self._raw(batch)
        return raw if self.plain else (raw - self.shift) / self.scale

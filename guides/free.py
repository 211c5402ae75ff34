"""Separate parameters for every datum: no amortization, the yardstick of the amortization gap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from torch import Size, Tensor, nn
from torch.distributions import constraints

from dgm.distributions import auxiliary, sample_and_log_prob, sample_sites
from dgm.errors import GuideError
from dgm.noise import Recorded, recording, replaying
from dgm.packing import Packing
from dgm.pair import all_rows, current_rows
from dgm.programs import preserved_rng
from dgm.sites import DATA_PLATE, latents

from .amortized import DataPlate, local_sites
from .diagonal_normal import DiagonalNormal
from .family import make_family

__all__ = ["Free"]


class Free(PyroModule):
    """q(z_n) = F(u; phi_n) |du/dz| with its own parameters phi_n for each of the N rows.

    Any family, also one with no closed form: the members are one stack of parameters, run by one vmap. In minibatches
    the rows present are those that `dgm.SVI.step(..., rows=...)` names; `fit` does that by itself.

    Args:
        model: the model; only its sites are read.
        batch: the *whole* data, as the model takes it: one set of parameters is made for each row.
        family: `family(features)` makes a density on R^d.
        sites: names of the latents to serve; default all local ones.
        plates: names of the data plates.

    Raises:
        GuideError: a latent is global; or, when run, the rows present are unknown.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> guide = Free(model, torch.zeros(7))
    >>> guide(torch.zeros(7))["z"].shape
    torch.Size([7])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Callable[..., nn.Module] = DiagonalNormal,
        sites: Iterable[str] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        chosen = local_sites(latents(model, *batch, plates=plates), sites, type(self).__name__)
        self.packing = Packing(chosen)
        self.plate = DataPlate(chosen[0], batch)
        member = make_family(family, self.packing.size, dtype=self.packing.dtype)
        with preserved_rng(0), recording() as draws, torch.no_grad():
            sample_and_log_prob(member())
        if not draws.complete:
            raise GuideError(f"{type(member).__name__} draws noise that depends on its parameters: it cannot be free")
        self.draws: Recorded = draws
        self.members = nn.ParameterDict(
            {
                name.replace(".", "|"): nn.Parameter(p.detach().expand(self.plate.rows, *p.shape).clone())
                for name, p in member.named_parameters()
            }
        )
        self.__dict__["member"] = member  # a mould, not a part: its own parameters are never used

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        rows = self._rows(self.plate.count(batch))
        stacked = {name.replace("|", "."): p if rows is None else p[rows] for name, p in self.members.items()}
        with self.plate.open(batch) as shape:
            density = _Stack(self.member, stacked, self.draws, Size(shape), self.packing.size)
            u = pyro.sample(f"_{self.packing.plate}", density, infer=auxiliary(self.packing))  # (*S, B, d)
            return sample_sites(self.packing, u, getattr(self.member, "has_density", True))

    def _rows(self, count: int) -> Tensor | None:
        rows = current_rows()
        total = all_rows() or (count if rows is None else self.plate.rows)
        if total != self.plate.rows:
            raise GuideError(
                f"Free holds parameters for {self.plate.rows} rows and sees {total} without knowing which: train it "
                "with dgm.fit, or call step(..., rows=indices); it has none for held-out rows, where Amortized serves"
            )
        return rows


class _Stack(TorchDistribution):
    """Many densities of one family, their parameters stacked in front: `(B, ...)`."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        member: nn.Module,
        stacked: dict[str, Tensor],
        draws: Recorded,
        batch: Size,
        features: int,
        extra: Size = Size(),
    ):
        self.member, self.stacked, self.draws, self.own, self.extra = member, stacked, draws, batch, extra
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(extra + batch, Size((features,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Stack:
        wide = Size(batch_shape)
        return _Stack(
            self.member, self.stacked, self.draws, self.own, self.event_shape[0], wide[: len(wide) - len(self.own)]
        )

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.extra
        count, rows = shape.numel(), self.own.numel()
        noise = [_draw(d.kind, (count, rows, *d.shape), d.dtype, d.device) for d in self.draws]

        def one(parameters: dict[str, Tensor], *eps: Tensor) -> tuple[Tensor, Tensor]:
            with replaying(eps):
                return sample_and_log_prob(torch.func.functional_call(self.member, parameters, ()))

        over_rows = torch.func.vmap(one, in_dims=(0, *([0] * len(noise))))
        over_samples = torch.func.vmap(over_rows, in_dims=(None, *([0] * len(noise)))) if noise else None
        x, log_prob = over_samples(self.stacked, *noise) if over_samples else _repeat(over_rows(self.stacked), count)
        x = x.reshape(*shape, *self.own, -1)
        self._last = (x, log_prob.reshape(*shape, *self.own))
        return x

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is value:
            return self._last[1]
        flat = value.expand(*self.batch_shape, *self.event_shape).reshape(-1, self.own.numel(), self.event_shape[0])

        def one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(self.member, parameters, ()).log_prob(x)

        over_samples = torch.func.vmap(torch.func.vmap(one), in_dims=(None, 0))
        return over_samples(self.stacked, flat).reshape(self.batch_shape)


def _repeat(pair: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    x, log_prob = pair
    return x.expand(count, *x.shape), log_prob.expand(count, *log_prob.shape)


def _draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=device)
    match kind:
        case "normal":
            return out.normal_()
        case "uniform":
            return out.uniform_()
        case _:
            return out.exponential_()

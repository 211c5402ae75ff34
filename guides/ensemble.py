"""Deep ensemble: an equal mixture of members trained side by side, of points or of any family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.nn import PyroModule
from torch import Size, Tensor, nn
from torch.distributions import constraints

from dgm.distributions import auxiliary, sample_and_log_prob, sample_sites
from dgm.errors import GuideError, OptionError
from dgm.noise import recording
from dgm.objectives import ELBO, Objective
from dgm.packing import Packing
from dgm.programs import preserved_rng
from dgm.sites import DATA_PLATE, Site, init_values, latents, trace_once

from .family import make_family
from .global_ import placed, select
from .point import Point

__all__ = ["Ensemble"]


class Ensemble(PyroModule):
    """q(w) = 1/K sum_k F(u; phi_k) |du/dw|: K members of one family over the vector of all global latents.

    Of points it is the deep ensemble (Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive
    Uncertainty Estimation using Deep Ensembles", 2017), with the log prior as its regulariser; of normals a mixture of
    posteriors, whose log q is that of the whole mixture. Each step trains every member once: the objective that the
    guide asks for has K particles, one for each member, run as one computation. A loss of one's own should be
    ELBO(particles=K, draws="stratified") too, or only the drawn members move.

    Start: the model's proposed values (a network's weights) in another order and with other signs for each member, else
    a draw from the prior for each. Parameters: K times those of the family. Cost of a draw: one pass, of its density K.
    Attaches to global latents; models with parameters of their own share these among the members.

    Args:
        model: the model; only its sites are read.
        batch: data, as the model takes it.
        family: of a member; default `Point`.
        members: K, at least 2.
        sites: names of the latents to serve; default all.
        init: constrained values by site name, to permute; default the model's `init_values()`.
        init_scale: standard deviation at the start, for families that have one.
        plates: names of the data plates.

    Raises:
        GuideError: a latent is local, or the family's noise depends on its parameters.
        OptionError: members < 2.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m.sum(), 1.0), obs=x)
    >>> Ensemble(model, torch.ones(5), members=3)(torch.ones(5))["m"].shape
    torch.Size([2])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        family: Callable[..., nn.Module] = Point,
        members: int = 5,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        init_scale: float | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ):
        super().__init__()
        name = type(self).__name__
        if isinstance(members, bool) or not isinstance(members, int) or members < 2:
            raise OptionError(f"{name}: members is {members!r}, expected a whole number, at least 2; Global has one")
        chosen = select(latents(model, *batch, plates=plates), sites)
        local = [site for site in chosen if site.plate is not None]
        if local or not chosen:
            what = f"latent {local[0].name!r} is one for each row" if local else "the model has no global latent"
            raise GuideError(f"{what}: {name} serves latents of all rows; use Amortized or Joint for local ones")
        self.packing, self.count = Packing(chosen), members
        scale = init_scale if init_scale is not None else getattr(model, "init_scale", None)
        proposed = {**init_values(model), **(init or {})}
        made = [
            placed(
                make_family(family, self.packing.size, dtype=self.packing.dtype),
                self.packing.pack(_start(model, batch, chosen, proposed, k)).reshape(-1),
                scale,
            )
            for k in range(members)
        ]
        with preserved_rng(0), recording() as draws, torch.no_grad():
            sample_and_log_prob(made[0]())
        if not draws.complete:
            raise GuideError(f"{type(made[0]).__name__} draws noise that depends on its parameters: it has no members")
        self.has_density = bool(getattr(made[0], "has_density", True))
        stacked = {
            n: torch.stack([dict(m.named_parameters())[n].detach() for m in made])
            for n, _ in made[0].named_parameters()
        }
        self.members = nn.ParameterDict({n.replace(".", "|"): nn.Parameter(p) for n, p in stacked.items()})  # (K, ...)
        self.__dict__["member"] = made[0]  # a mould, not a part: its own parameters are never used

    def objective(self) -> Objective:
        """What trains every member at each step."""
        return ELBO(particles=self.count, draws="stratified")

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        stacked = {name.replace("|", "."): p for name, p in self.members.items()}
        like = next(iter(stacked.values()))
        mixture = _Members(self.member, stacked, self.packing.size, self.has_density, like)
        u = pyro.sample("_global", mixture, infer=auxiliary(self.packing))  # (d,)
        return sample_sites(self.packing, u, self.has_density)


def _start(
    model: Callable[..., Any], batch: Sequence[Any], sites: Sequence[Site], proposed: Mapping[str, Tensor], k: int
) -> dict[str, Tensor]:
    """Constrained start values of member k; the first has the proposed values as they are."""
    run: Any = trace_once(model, *batch, seed=k)
    values = {}
    for site in sites:
        value = proposed.get(site.name)
        if value is None:
            value = run.nodes[site.name]["value"]
        elif k > 0 and site.support_name == "real":
            flat = value.detach().reshape(-1)
            flat = flat[torch.randperm(len(flat))]
            value = (flat * (1 - 2 * torch.randint(2, flat.shape).to(flat.dtype))).reshape(value.shape)
        values[site.name] = value.detach()
    return values


class _Members(TorchDistribution):
    """An equal mixture of densities of one family, their parameters stacked in front: `(K, ...)`."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, member: nn.Module, stacked: dict[str, Tensor], features: int, density: bool, like: Tensor):
        self.member, self.stacked, self.density, self.like = member, stacked, density, like
        super().__init__(Size(), Size((features,)), validate_args=False)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        shape, count = Size(sample_shape), len(self.like)
        if shape:
            return torch.stack([self.rsample() for _ in range(shape.numel())]).reshape(*shape, *self.event_shape)
        # the member of a draw is no function of any parameter: the gradient of the draw is that of its member
        pick = (torch.rand((), dtype=self.like.dtype, device=self.like.device) * count).long().clamp(max=count - 1)
        chosen = {name: p.index_select(0, pick.reshape(1)).squeeze(0) for name, p in self.stacked.items()}
        return sample_and_log_prob(torch.func.functional_call(self.member, chosen, ()))[0]

    def log_prob(self, value: Tensor) -> Tensor:
        if not self.density:
            return value.new_zeros(value.shape[:-1])

        def one(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.member, parameters, ()).log_prob(value)

        each = torch.func.vmap(one)(self.stacked)  # (K, ...)
        return torch.logsumexp(each, 0) - torch.log(torch.tensor(float(len(each)), dtype=each.dtype))

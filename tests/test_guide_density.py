"""log q at any values: that of the guide's own draws, of its family, and of no guide that has none."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from torch import nn

from dgm.errors import DataError, GuideError
from dgm.guide_density import GuideDensity, log_q
from dgm.guides.amortized import Amortized
from dgm.guides.auxiliary import Auxiliary
from dgm.guides.coupling_affine_flow import CouplingAffineFlow
from dgm.guides.dropout import Dropout
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.hamiltonian import HamiltonianAnnealing
from dgm.guides.inverse_autoregressive_flow import InverseAutoregressiveFlow
from dgm.guides.joint import Joint
from dgm.guides.matrix_normal import MatrixNormal
from dgm.guides.mixture import Mixture
from dgm.guides.multiplicative_flow import MultiplicativeFlow
from dgm.guides.per_layer import PerLayer
from dgm.guides.point import Point
from dgm.guides.semi_amortized import SemiAmortized
from dgm.guides.top_down import TopDown
from dgm.models import bayesian_linear_regression, bnn, hierarchical_vae, vae
from dgm.packing import Packing
from dgm.pair import Pair
from dgm.programs import evaluating, isolated
from dgm.sites import latents


def draws_of(density, *batch, count=3):
    """Draws of a guide, and the log q that it counts itself: rows and the rest."""
    with evaluating(density.guide), isolated():
        traces = [poutine.trace(density.run).get_trace(*batch) for _ in range(count)]
    for trace in traces:
        trace.compute_log_prob()
    values = {n: torch.stack([t.nodes[n]["value"] for t in traces]) for n in density.latents}
    own = [sum(n["log_prob"].sum() for n in t.nodes.values() if n["type"] == "sample") for t in traces]
    return values, torch.stack(own)


GUIDES = [
    (vae, Amortized),
    (vae, partial(Amortized, family=FullNormal)),
    (vae, partial(Amortized, family=InverseAutoregressiveFlow)),
    (vae, Free),
    (hierarchical_vae, TopDown),
    (hierarchical_vae, Amortized),
    (bnn, partial(Global, family=CouplingAffineFlow)),
    (bnn, partial(Global, family=Mixture)),
    (bnn, partial(PerLayer, family=MatrixNormal)),  # its vector stands in another order than the packed one
    (bnn, Joint),
]


@pytest.mark.parametrize(("zoo", "make"), GUIDES)
def test_log_q_of_a_guides_own_draws_is_what_it_counts_itself(zoo, make):
    model, batch = zoo.example()
    torch.manual_seed(0)
    guide = make(model, *batch)
    with torch.no_grad():
        for p in guide.parameters():  # away from any symmetry of the start
            p.add_(0.05 * torch.randn_like(p))
    density = GuideDensity(guide, *batch)
    values, own = draws_of(density, *batch)
    found = density.at(values, *batch)
    torch.testing.assert_close(found.total, own, rtol=1e-4, atol=1e-3)
    moved = {name: value.clone() for name, value in values.items()}
    first = next(iter(moved))
    moved[first] = moved[first] + 0.3
    assert not torch.allclose(density.at(moved, *batch).total, own, atol=1e-2)


def positive(x):
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        k = pyro.sample("k", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z.sum(-1) + k[..., 0], s), obs=x)


def test_in_unconstrained_coordinates_it_is_the_density_of_the_family():
    x = torch.randn(6, generator=torch.Generator().manual_seed(0))
    guide = Joint(positive, x)
    packings = [guide.local_data.packing, guide.global_.packing]
    density = GuideDensity(guide, x, packings=packings)
    u = torch.randn(6 * 4 + 1, generator=torch.Generator().manual_seed(1))
    with evaluating(guide):
        rows, rest = density.terms(u, x)
        context = guide.local_data.encoder(guide.local_data.features((x,)))
        torch.testing.assert_close(rows, guide.local_data.family(context).log_prob(u[:24].reshape(6, 4)))
        torch.testing.assert_close(rest, guide.global_.family().log_prob(u[24:]))
        slope = torch.func.grad(lambda v: sum(part.sum() for part in density.terms(v, x)))(u)
        own = torch.func.grad(lambda v: guide.global_.family().log_prob(v[24:]))(u)
    torch.testing.assert_close(slope[24:], own[24:])
    # by values: the Jacobian of every support comes off, row by row
    values, jacobian = packings[0].unpack(u[:24].reshape(6, 4))
    s, log_s = packings[1].unpack(u[24:])
    found = density.at({n: v[None] for n, v in {**values, **s}.items()}, x)
    torch.testing.assert_close(found.local[0], rows - sum(jacobian.values()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.global_[0], rest - log_s["s"], rtol=1e-4, atol=1e-4)


def test_the_shape_is_one_for_each_row_or_one_for_all():
    model, batch = vae.example()
    guide = Amortized(model, *batch)
    assert log_q(guide, batch, {"z": torch.zeros(4, 20, 2)}).shape == (4, 20)
    x = torch.zeros(5)
    values = {"s": torch.ones(4), "z": torch.ones(4, 5, 2), "k": torch.full((4, 5, 3), 1 / 3)}
    assert log_q(Joint(positive, x), (x,), values).shape == (4,)


def test_a_hand_written_guide_is_held_at_its_own_sites_with_the_scale_of_the_plate_taken_out():
    def guide(x):
        with pyro.plate("data", 50, subsample=torch.arange(5)):
            pyro.sample("z", dist.Normal(x, 2.0))

    x, z = torch.arange(5.0), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_q(guide, (x,), {"z": z}), dist.Normal(x, 2.0).log_prob(z))


@pytest.mark.parametrize("kind", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal, autoguide.AutoIAFNormal])
def test_pyros_own_guides_are_read_as_well(kind):
    def model(x):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w.sum(), s), obs=x)

    x = torch.zeros(4)
    with isolated():
        guide = kind(model)
        Pair(model, guide).check((x,))
    density = GuideDensity(guide, x)
    values, own = draws_of(density, x)
    torch.testing.assert_close(density.at(values, x).total, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("zoo", "make", "words"),
    [
        (vae, Auxiliary, "draws the auxiliary variable '_data_auxiliary'"),
        (vae, HamiltonianAnnealing, "draws the auxiliary variable"),
        (vae, SemiAmortized, "draws noise that stands in no site"),
        (bnn, MultiplicativeFlow, "draws the auxiliary variable '_global_"),
        (bnn, Dropout, "has_density is False"),
        (bnn, partial(Global, family=Point), "has_density is False"),
    ],
)
def test_a_guide_without_a_known_density_says_why(zoo, make, words):
    model, batch = zoo.example()
    with pytest.raises(GuideError, match=words):
        GuideDensity(make(model, *batch), *batch)


def test_a_point_and_a_flow_in_one_direction_are_named():
    model, batch = bayesian_linear_regression.example()
    point = autoguide.AutoDelta(model)
    with isolated():
        Pair(model, point).check(batch)
    with pytest.raises(GuideError, match="gives the latent 'w' as a point"):
        GuideDensity(point, *batch)

    class OneWay(nn.Module):
        def __init__(self, features):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(features))

        def forward(self):
            return _OneWay(self.loc)

    with pytest.raises(GuideError, match="only known in the direction of its draws"):
        GuideDensity(Global(model, *batch, family=OneWay), *batch)


class _OneWay(torch.distributions.Distribution):
    arg_constraints = {}  # noqa: RUF012
    support = torch.distributions.constraints.real_vector
    has_rsample = True

    def __init__(self, loc):
        self.loc = loc
        super().__init__(torch.Size(), loc.shape, validate_args=False)

    def rsample_and_log_prob(self, shape=torch.Size()):
        eps = torch.randn(*shape, *self.loc.shape)
        return self.loc + eps.sinh(), dist.Normal(0.0, 1.0).log_prob(eps).sum(-1) - eps.cosh().log().sum(-1)

    def rsample(self, shape=torch.Size()):
        return self.rsample_and_log_prob(shape)[0]

    def log_prob(self, value):
        raise NotImplementedError("no inverse")


def test_a_guide_whose_sites_do_not_say_how_it_draws_is_found_out():
    def guide(x):
        u = pyro.sample("u", dist.Normal(torch.zeros(3), 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("w", dist.Delta(2 * u, event_dim=1))

    model, batch = bayesian_linear_regression.example()
    with pytest.raises(GuideError, match="draws the auxiliary variable 'u'"):
        GuideDensity(lambda x, y: guide(x), *batch)

    class Lying(Global):
        def forward(self, *batch):
            u = pyro.sample("_global", self.family(), infer={"is_auxiliary": True, "packing": self.packing})
            value = u + 1.0
            pyro.sample("w", dist.Delta(value, event_dim=1))

    with pytest.raises(GuideError, match="its sites do not say how it draws"):
        GuideDensity(Lying(model, *batch), *batch)


def test_values_that_do_not_fit_are_named():
    x = torch.zeros(5)
    guide = Joint(positive, x)
    good = {"s": torch.ones(4), "z": torch.ones(4, 5, 2), "k": torch.full((4, 5, 3), 1 / 3)}
    for change, words in (
        ({"s": None}, "latent 's' are missing"),
        ({"z": torch.ones(4, 6, 2)}, r"values of 'z': expected shape \(4, 5, 2\), got \(4, 6, 2\)"),
        ({"z": -torch.ones(4, 5, 2)}, "values of 'z': 20 lie outside of positive"),
        ({"s": torch.full((4,), torch.nan)}, "values of 's': 4 lie outside of positive, or are NaN"),
    ):
        values = {n: v for n, v in {**good, **change}.items() if v is not None}
        with pytest.raises(DataError, match=words):
            log_q(guide, (x,), values)


def test_packing_joins_what_it_parts():
    packing = Packing(latents(positive, torch.zeros(5)).local)
    u = torch.randn(7, 5, packing.size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(packing.join(packing.parts(u)), u)

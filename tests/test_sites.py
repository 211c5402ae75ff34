"""Reading programs: every kind of site in one model; packing there and back, with the log-Jacobian of autograd."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from dgm import Packing, latents
from dgm.errors import GuideError, ModelError
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.programs import preserved_rng
from dgm.sites import start_values, trace_once
from dgm.testing import check_model, check_pair

ROWS, GROUPS, TOPICS = 5, 3, 4


def everything(x: Tensor) -> None:
    """Every kind of site: `dim=-1` are the rows, unless a plate says that it stands to their right."""
    s = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    p = pyro.sample("simplex", dist.Dirichlet(torch.ones(TOPICS)))
    v = pyro.sample("vector", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    u = pyro.sample("unit", dist.Beta(2.0, 2.0))
    groups = pyro.plate("groups", GROUPS, dim=-2)
    with groups:
        g = pyro.sample("group", dist.Normal(0.0, 1.0))  # (3, 1)
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("local", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # (5, 2)
        t = pyro.sample("local simplex", dist.Dirichlet(torch.ones(3)))  # (5, 3)
        with groups:
            both = pyro.sample("local group", dist.Gamma(2.0, 1.0))  # (3, 5)
        loc = z.sum(-1) + v.sum() + u + p[..., 0] + (g + both).sum(-2) + t[..., 0]
        pyro.sample("x", dist.Normal(loc, s), obs=x)


def rows_left(x: Tensor) -> None:
    """The data plate stands at dim -2, an inner plate to its right."""
    inner = pyro.plate("inner", GROUPS, dim=-1)
    with inner:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))  # (3,)
    with pyro.plate("data", len(x), dim=-2):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))  # (5, 1)
        with inner:
            c = pyro.sample("c", dist.Dirichlet(torch.ones(2)))  # (5, 3, 2)
            pyro.sample("x", dist.Normal(a + b + c[..., 0], 1.0), obs=x)


X = torch.linspace(-1, 1, ROWS)
X2 = torch.linspace(-1, 1, ROWS * GROUPS).reshape(ROWS, GROUPS)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_site() -> None:
    found = latents(everything, X)
    got = {name: (tuple(s.shape), tuple(s.batch_shape), s.support_name, s.plate) for name, s in found.items()}
    assert got == {
        "scale": ((), (), "positive", None),
        "simplex": ((4,), (), "simplex", None),
        "vector": ((2,), (), "real", None),
        "unit": ((), (), "unit_interval", None),
        "group": ((3, 1), (3, 1), "real", None),
        "local": ((2,), (5,), "real", "data"),
        "local simplex": ((3,), (5,), "simplex", "data"),
        "local group": ((3,), (3, 5), "nonnegative", "data"),
    }
    assert [s.name for s in found.local] == ["local", "local simplex", "local group"]
    assert list(found.observed) == ["x"] and set(found.plates) == {"groups", "data"}
    assert found["local group"].plate_frame.dim == -1 and found["local"].plate_frame.size == ROWS


def test_a_data_plate_left_of_another() -> None:
    found = latents(rows_left, X2)
    assert {n: (tuple(s.shape), s.plate) for n, s in found.items()} == {
        "a": ((3,), None),
        "b": ((), "data"),
        "c": ((3, 2), "data"),
    }


def test_prints_as_a_table() -> None:
    lines = repr(latents(everything, X)).splitlines()
    assert lines[0].split() == ["scale", "()", "positive", "global"]
    assert lines[-1].split(maxsplit=3)[3].endswith('local in "data"')
    assert len({line.find("global") for line in lines if line.endswith("global")}) == 1, "columns do not stand in line"
    assert repr(latents(lambda x: pyro.sample("x", dist.Normal(0.0, 1.0), obs=x), torch.zeros(()))) == "no latents"


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(KeyError, match="did you mean 'vector'"):
        latents(everything, X)["vektor"]


def test_other_plate_names() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("labelled", len(y)):
            pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Normal(0.0, 1.0))

    assert [s.name for s in latents(model, torch.zeros(3), torch.zeros(2)).local] == ["b"]
    both = latents(model, torch.zeros(3), torch.zeros(2), plates=("labelled", "data"))
    assert [s.plate for s in both.local] == ["labelled", "data"]


class Noisy(PyroModule):
    """A PyroSample that is first read inside the plate becomes one latent for each row: the table shows it."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early
        self.noise = PyroSample(dist.LogNormal(0.0, 1.0))

    def forward(self, x: Tensor) -> None:
        if self.early:
            _ = self.noise
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, self.noise), obs=x)


@pytest.mark.parametrize(("early", "where"), [(True, "global"), (False, 'local in "data"')])
def test_pyro_sample_read_inside_a_plate_shows_as_local(early: bool, where: str) -> None:
    assert repr(latents(Noisy(early), X)).endswith(where)


def test_discrete_sites_are_read_and_enumerated_ones_left_out() -> None:
    @config_enumerate
    def mixture(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x)

    found = latents(mixture, X)
    assert found["k"].discrete and found["k"].enumerated and found["k"].plate == "data"
    with pyro.get_param_store().scope():  # called outside of dgm, a guide does as Pyro does
        assert set(Joint(mixture, X)(X)) == {"loc"}
    with pytest.raises(ModelError, match=r"latent 'k' is discrete .*config_enumerate"):
        Packing(found.local)


def test_improper_priors_are_read_and_start_at_the_image_of_zero() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), ()))
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
        s = pyro.sample("s", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(m + b.sum(), s), obs=x)

    found = latents(model, X)
    assert [(s.name, tuple(s.shape), s.support_name) for s in found.values()] == [
        ("m", (), "real"),
        ("b", (3,), "real"),
        ("s", (), "positive"),
    ]
    start = start_values(model, (X,), list(found.values()))
    assert start["s"] == 1 and torch.equal(start["b"], torch.zeros(3))
    check_pair(model, Joint(model, X), X, steps=8)


def test_start_values() -> None:
    sites = list(latents(everything, X).global_)
    values = start_values(everything, (X,), sites, {"scale": torch.tensor(2.0)})
    assert values["scale"] == 2 and values["simplex"].sum() == pytest.approx(1.0)
    with pytest.raises(ModelError, match=r"start value of 'scale' .*inside positive"):
        start_values(everything, (X,), sites, {"scale": torch.tensor(-2.0)})
    with pytest.raises(ModelError, match=r"start value of 'vector' has shape \(3,\), expected \(2,\)"):
        start_values(everything, (X,), sites, {"vector": torch.zeros(3)})


def test_a_class_instead_of_an_object() -> None:
    with pytest.raises(ModelError, match=r"the class Noisy, expected an object of it: write Noisy\(...\)"):
        latents(Noisy, X)


def test_reading_changes_nothing() -> None:
    def model(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), s), obs=x)

    before = torch.get_rng_state()
    latents(model, X)
    assert torch.equal(before, torch.get_rng_state())
    assert list(pyro.get_param_store().keys()) == []


# --- packing ---------------------------------------------------------------------------------------------------------


def packings() -> list[Any]:
    found, left = latents(everything, X), latents(rows_left, X2)
    return [
        pytest.param(everything, X, Packing(found.global_), (), id="global"),
        pytest.param(everything, X, Packing(found.local), (ROWS,), id="local"),
        pytest.param(rows_left, X2, Packing(left.global_), (), id="global right of the rows"),
        pytest.param(rows_left, X2, Packing(left.local), (ROWS, 1), id="rows left of a plate"),
    ]


@pytest.mark.parametrize("samples", [(), (7,), (2, 7)])
@pytest.mark.parametrize(("model", "x", "packing", "rows"), packings())
def test_there_and_back(
    model: Any, x: Tensor, packing: Packing, rows: tuple[int, ...], samples: tuple[int, ...]
) -> None:
    lead = (*samples, *([1] * (2 - len(rows)) if samples else []))  # samples stand left of every plate
    with preserved_rng(1):
        u = torch.randn(*lead, *rows, packing.size, dtype=torch.float64)
    values, log_jacobian = packing.unpack(u)
    for block in packing.blocks:
        site = block.site
        value = values[site.name]
        batch = value.shape[: value.dim() - site.event_dim]
        assert torch.broadcast_shapes(batch[len(batch) - len(site.batch_shape) :], site.batch_shape) == site.batch_shape
        assert bool(site.support.check(value).all())
        assert log_jacobian[site.name].shape == batch
    back = packing.pack(values)
    assert torch.allclose(back.reshape(u.shape), u, atol=1e-8)


@pytest.mark.parametrize(("model", "x", "packing", "rows"), packings())
def test_values_have_the_model_s_own_shapes(model: Any, x: Tensor, packing: Packing, rows: tuple[int, ...]) -> None:
    trace = trace_once(model, x)
    values, _ = packing.unpack(torch.zeros(*rows, packing.size))
    for name, value in values.items():
        assert value.shape == trace.nodes[name]["value"].shape, name


@pytest.mark.parametrize(("model", "x", "packing", "rows"), packings())
def test_log_jacobian_is_autograd_s(model: Any, x: Tensor, packing: Packing, rows: tuple[int, ...]) -> None:
    with preserved_rng(2):
        u = torch.randn(*rows, packing.size, dtype=torch.float64)
    _, log_jacobian = packing.unpack(u)
    total = sum(term.sum() for term in log_jacobian.values())

    def coordinates(flat: Tensor) -> Tensor:
        """As many coordinates as unconstrained ones: the last entry of a simplex follows from the others."""
        values, _ = packing.unpack(flat.reshape(u.shape))
        free = [v[..., :-1] if "simplex" in packing_support(packing, n) else v for n, v in values.items()]
        return torch.cat([v.reshape(-1) for v in free])

    jacobian = torch.autograd.functional.jacobian(coordinates, u.reshape(-1))
    assert jacobian.shape[0] == jacobian.shape[1]
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, total, atol=1e-8)


def packing_support(packing: Packing, name: str) -> str:
    return next(block.site.support_name for block in packing.blocks if block.site.name == name)


def test_jacobian_mutant() -> None:
    """The Jacobian of a positive site at u is u itself, not zero: a packing that forgot it would be seen."""
    packing = Packing([latents(everything, X)["scale"]])
    _, log_jacobian = packing.unpack(torch.tensor([0.7]))
    assert float(log_jacobian["scale"]) == pytest.approx(0.7)


def test_rows_are_not_mixed() -> None:
    """A row's vector moves that row's values and no other's."""
    for _, _, packing, rows in (p.values for p in packings()):
        if not rows:
            continue
        u = torch.zeros(*rows, packing.size)
        moved = u.clone()
        moved[2] = torch.linspace(-1, 1, packing.size)
        base, other = packing.unpack(u)[0], packing.unpack(moved)[0]
        for block in packing.blocks:
            axis = block.site.plate_frame.dim - block.site.event_dim
            changed = (base[block.site.name] != other[block.site.name]).movedim(axis, 0).reshape(ROWS, -1).any(1)
            assert changed.tolist() == [False, False, True, False, False], block.site.name


def test_sites_of_different_plates_cannot_share_a_vector() -> None:
    found = latents(everything, X)
    with pytest.raises(ModelError, match="sites of different plates"):
        Packing([found["scale"], found["local"]])


# --- the whole way: such models train --------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "x"), [(everything, X), (rows_left, X2)])
def test_contracts_of_models_with_every_kind_of_site(model: Any, x: Tensor) -> None:
    check_model(model, x)
    with preserved_rng(0):
        guide = Joint(model, x, family=FullNormal)
    check_pair(model, guide, x, compile=False)


def test_misspelt_site() -> None:
    with pytest.raises(GuideError, match="no latent 'groop': did you mean 'group'"):
        Global(everything, X, sites=["scale", "groop"])

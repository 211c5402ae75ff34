"""The doctor: each symptom of a training is found where it is, named with its number, and not in the healthy twin."""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

import dgm.models
from dgm.baseline import marginals
from dgm.commands import Source, task
from dgm.doctor import doctor
from dgm.errors import OptionError
from dgm.findings import Diagnosis, Finding
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import mlp
from dgm.guides.free import Free
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.guides.nuts import NUTS
from dgm.importance import ImportanceELBO
from dgm.models.bnn import BNN
from dgm.models.linear_vae import LinearVAE
from dgm.models.vae import VAE
from dgm.pair import Pair
from dgm.registry import families
from dgm.signal_to_noise import signal_to_noise
from dgm.sites import latents
from dgm.symptoms import symptoms


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_vae(rows: int = 60) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    """Healthy: a model that fits its data, and a step size that gets there."""
    model, x = LinearVAE.simulate(rows, features=4, latent=2, generator=torch.Generator().manual_seed(0))
    return model, (x,), {"lr": 1e-2, "steps": 100}


class Row(PyroModule):
    """x_n ~ N(f(z_n), s), with everything to be broken by a subclass."""

    def __init__(self, features: int = 3, latent: int = 2):
        super().__init__()
        self.decoder = nn.Linear(latent, features)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.latent = latent

    def loc(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z)

    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def prior(self) -> Any:
        return dist.Normal(torch.zeros(self.latent), 1.0).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.loc(z, x), self.scale()).to_event(1), obs=x)


class Strong(Row):
    """Each column is told by those before it, so that nothing is left for z."""

    def __init__(self) -> None:
        super().__init__()
        self.past = nn.Parameter(torch.tensor([[0.0, 0.0, 0.0], [0.9, 0.0, 0.0], [0.45, 0.5, 0.0]]))
        self.log_scale = nn.Parameter(torch.tensor([0.0, -0.8, -0.9]))
        with torch.no_grad():
            self.decoder.weight.mul_(1e-3)
            self.decoder.bias.zero_()

    def loc(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z) + x @ self.past.tril(-1).T


class Detached(Row):
    def loc(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z.detach()) if self.latent > 99 else nn.functional.linear(z, self.decoder.weight.detach())


class Root(Row):
    """A variance that a step of the optimiser can make negative."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.decoder.weight.zero_()
            self.decoder.bias.zero_()
        self.variance = nn.Parameter(torch.tensor(0.05))

    def scale(self) -> Tensor:
        return self.variance.sqrt()


class Memory(Row):
    """A parameter for each row: the likelihood has no maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(rows(n=20))

    def loc(self, z: Tensor, x: Tensor) -> Tensor:
        return self.own + 0.0 * self.decoder(z)


class Loud(Row):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.log_scale.fill_(9.0)


class Positive(Row):
    """Cannot say that x is negative."""

    def loc(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z).relu()


class Heavy(Row):
    def prior(self) -> Any:
        return dist.StudentT(1.0, torch.zeros(self.latent), 1.0).to_event(1)

    def scale(self) -> Tensor:
        return self.log_scale.exp() + 10.0


class Branching(Row):
    def loc(self, z: Tensor, x: Tensor) -> Tensor:
        return self.decoder(z) if z.sum().item() > 0 else self.decoder(z) * 1.0


class Beta(Row):
    """The latent's log p and log q count four times."""

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=4.0):
                z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(self.loc(z, x), self.scale()).to_event(1), obs=x)


def scaled_guide(model: Any, x: Tensor, scale: float = 1.0) -> Any:
    """Amortized by hand, its log q counted `scale` times."""
    encoder = nn.Linear(x.shape[1], 2)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder
            self.log_scale = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)), poutine.scale(scale=scale):
                pyro.sample("z", dist.Normal(self.encoder(x), self.log_scale.exp()).to_event(1))

    return Guide()


def blind_guide(model: Any, x: Tensor) -> Any:
    """The same q for every row."""

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return guide


class Shifted(Row):
    """x is z, far from the prior, and the same for all rows but for a little noise."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.log_scale.fill_(-2.0)

    def loc(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.cat([z, z[:, :1]], 1) + 0.0 * self.decoder(z)


def regression(y: Tensor, prior: float = 1.0) -> Any:
    """y_n ~ N(w, 1): one global latent."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(1), prior).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[..., 0] + 0.0 * x[:, 0], 1.0), obs=y)

    return model


def rows(*, mean: float = 0.0, sd: float = 1.0, n: int = 40) -> Tensor:
    common = normals(n, 1)
    return mean + sd * (common + 0.3 * normals(n, 3, seed=1))


def network(scale: float | None = None) -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
    x = normals(40, 3)
    guide = None if scale is None else partial(Global, init_scale=scale)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BNN(nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 1)))
    return model, (x, torch.sin(x[:, 0]) + 0.1 * normals(40, seed=2)), {"guide": guide, "lr": 1e-3, "steps": 40}


def made(model: Callable[[], Any], *data: Tensor, **options: Any) -> Callable[[], Any]:
    def make() -> tuple[Any, tuple[Tensor, ...], dict[str, Any]]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model(), data, {"lr": 1e-2, "steps": 100, **options}

    return make


def chain(n: int = 100) -> Tensor:
    """Each column is made of those before it."""
    noise = normals(n, 3)
    first = noise[:, 0]
    second = 0.9 * first + 0.45 * noise[:, 1]
    return torch.stack([first, second, 0.45 * first + 0.5 * second + 0.4 * noise[:, 2]], 1)


def pixels(n: int = 100) -> Tensor:
    """Two prototypes of twelve pixels, a tenth of them flipped."""
    which = (normals(n) > 0).float()[:, None]
    prototype = which * torch.tensor([1.0, 0.0] * 6) + (1 - which) * torch.tensor([1.0] * 6 + [0.0] * 6)
    flipped = torch.rand(n, 12, generator=torch.Generator().manual_seed(3)) < 0.1
    return torch.where(flipped, 1 - prototype, prototype)


SICK: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "collapse": ("posterior collapse", "posterior collapse", made(Strong, chain(), lr=2e-2)),
    "constant latent": (
        "constant latent",
        "constant latent",
        made(Shifted, rows(mean=4.0, sd=0.01), guide=blind_guide, lr=1e-1),
    ),
    "frozen": ("frozen parameters", "frozen parameters", made(Detached, rows(), steps=20)),
    "divergence": ("divergence", "divergence", made(Root, rows(sd=0.01), lr=0.1, steps=20)),
    "too low": ("learning rate", "learning rate too low", lambda: (*linear_vae()[:2], {"lr": 1e-6, "steps": 30})),
    "too high": (
        "learning rate",
        "learning rate too high",
        made(lambda: VAE(12, 2, (16,)), pixels(), lr=0.1, steps=100),
    ),
    "dead likelihood": ("scale parameters", "dead scale", made(Memory, rows(n=20), lr=0.1)),
    "loud likelihood": ("scale parameters", "exploding scale", made(Loud, rows(), steps=20)),
    "dead guide": ("scale parameters", "dead scale", lambda: network(1e-6)),
    "loud guide": (
        "scale parameters",
        "exploding scale",
        made(Row, rows(), guide=partial(Amortized, init_scale=1e3), steps=20, lr=1e-4),
    ),
    "wide start": ("wide start", "wide start", lambda: network(1.0)),
    "noisy start": ("gradient noise", "gradient noise", lambda: network(5.0)),
    "many samples": (
        "gradient noise",
        "gradient noise",
        lambda: (*linear_vae()[:2], {"lr": 3e-2, "steps": 60, "loss": ImportanceELBO(256)}),
    ),
    "beta": ("kl balance", "KL weight", made(Beta, rows(), steps=20)),
    "two scales": ("kl balance", "KL weight", made(Row, rows(), guide=partial(scaled_guide, scale=2.0), steps=20)),
    "far prior": (
        "kl balance",
        "KL too large",
        lambda: (regression(normals(20)), (normals(20, 1), 30 + normals(20)), {"lr": 0.3, "steps": 200}),
    ),
    "trivial": ("trivial baseline", "worse than trivial", made(Positive, rows(mean=-5.0), lr=3e-2, steps=150)),
    "k-hat": ("khat", "k-hat", made(Heavy, rows(), lr=3e-2, steps=150)),
    "python": ("eager steps", "steps in Python", made(Branching, rows(), steps=20)),
}
"""By name: the check, what it finds, and a model, its data and options that have it."""


PARTS = {"dead likelihood": "model", "loud likelihood": "model", "dead guide": "guide", "loud guide": "guide"}
LONG = {"many samples", "too high", "too low", "k-hat", "collapse"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c in LONG)) for c in SICK])
def test_it_is_found_and_its_number_is_told(case: str) -> None:
    check, name, make = SICK[case]
    model, data, options = make()
    found = doctor(model, *data, **options, checks=[check])
    (finding,) = [f for f in found if f.name == name and f.part == PARTS.get(case, f.part)]
    assert re.search(r"\d", finding.evidence), finding
    assert finding.consequence and finding.cure


HEALTHY: dict[str, Callable[[], Any]] = {
    "linear-vae": linear_vae,
    "rows": made(Row, rows(), lr=2e-2),
    "network": lambda: network(),
}


@pytest.fixture(scope="module", params=[pytest.param(h, marks=[pytest.mark.slow] * (h != "rows")) for h in HEALTHY])
def healthy(request: pytest.FixtureRequest) -> Diagnosis:
    model, data, options = HEALTHY[request.param]()
    return doctor(model, *data, **options)


def test_a_healthy_pair_has_nothing(healthy: Diagnosis) -> None:
    """All symptoms, those that are found above among them."""
    assert not healthy, healthy
    assert {check for check, _, _ in SICK.values()} <= set(healthy.looked) | set(healthy.skipped)


def test_no_check_breaks(healthy: Diagnosis) -> None:
    assert not [why for why in healthy.skipped.values() if why.startswith("it failed")], healthy.skipped


def test_the_terms_of_the_course_add_up(healthy: Diagnosis) -> None:
    course = healthy.course
    assert course is not None and len(course.losses) == course.steps == len(course.norms)
    curve = course.curve
    np.testing.assert_allclose(curve["bound"], curve["log_likelihood"] - curve["kl"])
    assert course.gain > 0 and (course.parameters["moved"] <= course.parameters["path"] + 1e-6).all()


def zoo() -> Iterator[tuple[str, Callable[[], Any]]]:
    for found in pkgutil.iter_modules(dgm.models.__path__):
        module = importlib.import_module(f"dgm.models.{found.name}")
        for name in ("example", "example_classification"):
            if hasattr(module, name):
                yield f"{found.name}.{name}", getattr(module, name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "example"), list(zoo()), ids=lambda v: v if isinstance(v, str) else "")
def test_nothing_is_found_in_the_zoo(name: str, example: Callable[[], Any]) -> None:
    model, data = example()
    found = doctor(model, *data)
    assert not found, found
    assert not [why for why in found.skipped.values() if why.startswith("it failed")], found.skipped


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(families()))
def test_no_family_of_guides_is_an_alarm(family: str) -> None:
    model, data, options = linear_vae(100)
    guide = partial(Joint, family=families()[family].make, encoder=mlp(16))
    found = doctor(model, *data, guide=guide, **options | {"steps": 300})
    assert not found, found
    assert not [why for why in found.skipped.values() if why.startswith("it failed")], found.skipped


PRESETS = [
    ("vae", "digits"),
    ("deep-latent-gaussian", "digits"),
    ("bnn", "diabetes"),
    ("bnn", "breast-cancer"),
    ("bnn", "moons"),
    ("bnn", "gap"),
    ("bayesian-linear-regression", "diabetes"),
    ("vae", "moons-points"),
    ("gaussian-mixture", "moons-points"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "data"), PRESETS)
def test_the_presets_of_compare_are_no_alarm(model: str, data: str) -> None:
    job = task(Source(model, data))
    (guide,) = job.guides(["diagonal-normal"], "joint").values()
    own, attached = job.pair(guide, 0)
    transform, rows = job.data.transform, job.data.train
    found = doctor(own, *rows, guide=attached, batch_size=job.batch_size, lr=job.lr, transform=transform)
    assert not found, found
    assert not [why for why in found.skipped.values() if why.startswith("it failed")], found.skipped


# --------------------------------------------------------------------------------------- the caller's own


def test_the_callers_pair_and_random_stream_stay_as_they_are() -> None:
    model = Row()
    x = rows()
    guide = Amortized(model, x, encoder=mlp(4))
    before = copy.deepcopy((model.state_dict(), guide.state_dict()))
    state = torch.get_rng_state()
    doctor(model, x, guide=guide, steps=20, checks=["learning rate"])
    assert torch.equal(state, torch.get_rng_state())
    for old, now in zip(before, (model.state_dict(), guide.state_dict()), strict=True):
        assert all(torch.equal(old[name], now[name]) for name in old)
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))


def test_what_a_function_closes_over_is_put_back() -> None:
    decoder = nn.Linear(2, 3)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    before = decoder.weight.detach().clone()
    found = doctor(model, rows(), steps=20, lr=1e-2, checks=["frozen parameters"])
    assert not found, found
    assert found.course is not None and set(found.course.parameters["part"]) == {"guide", "model"}
    assert found.course.parameters.loc[found.course.parameters["part"] == "model", "moved"].min() > 0
    assert torch.equal(decoder.weight, before)


def test_an_autoguide_keeps_its_model() -> None:
    """Its copy takes the model from Pyro's autoguides, from the original too."""
    model, x = Row(), rows()
    guide = AutoGuideList(model)
    guide.append(AutoNormal(model))
    inner = guide[0].model
    found = doctor(model, x, guide=guide, steps=20, lr=1e-2, checks=["frozen parameters"])
    assert not found, found
    assert guide.model is model and guide[0].model is inner and guide[0].master is not None


def test_guides_of_single_rows_and_guides_that_are_not_trained() -> None:
    found = doctor(Row(), rows(), guide=Free, batch_size=10, steps=20, checks=["frozen parameters", "khat"])
    assert not found and found.course is not None, found
    model, data, _ = network()
    found = doctor(model, *data, guide=NUTS, steps=20)
    assert not found and "NUTS is made by its finish" in found.skipped["learning rate"], found


def test_the_k_hat_of_a_few_global_latents_is_a_note() -> None:
    y = normals(20)
    found = doctor(regression(y), normals(20, 1), y, steps=20, checks=["khat"])
    assert not found and re.search(r"k-hat of the 1 global latents is -?[\d.inf]+ after", found.notes[0]), found


def test_the_same_seed_finds_the_same() -> None:
    model, data, options = linear_vae()
    one, two = (doctor(model, *data, **options, checks=["frozen parameters"]) for _ in range(2))
    assert one.course is not None and two.course is not None
    np.testing.assert_array_equal(one.course.losses, two.course.losses)


# --------------------------------------------------------------------------------------- what is refused


def test_what_the_checks_refuse_is_a_finding_and_the_rest_goes_on() -> None:
    grey = torch.rand(30, 12, generator=torch.Generator().manual_seed(0))
    found = doctor(VAE(12, 2, (8,)), grey, steps=20)
    assert found.names[0] == "refused" and found[0].harm == 3 and found[0].part == "data"
    assert "Bernoulli" in found[0].evidence and "binarize" in found[0].cure
    assert found.course is None and "refused" in found.skipped["learning rate"]
    assert "double link" in found.looked
    assert not [why for why in found.skipped.values() if why.startswith("it failed")], found.skipped


def test_a_damaged_column_and_a_program_that_raises_are_findings() -> None:
    x = rows()
    x[3, 1] = torch.nan
    assert doctor(Row(), x, steps=20).names == ["refused"]

    class Broken(Row):
        def loc(self, z: Tensor, x: Tensor) -> Tensor:
            raise RuntimeError("mat1 and mat2")

    found = doctor(Broken(), rows(), steps=20)
    assert found.names == ["refused"] and "mat1" in found[0].evidence


def test_options_are_refused_as_ever() -> None:
    with pytest.raises(OptionError, match="steps is 5"):
        doctor(Row(), rows(), steps=5)
    with pytest.raises(OptionError, match="posterior collapse"):
        doctor(Row(), rows(), steps=20, checks=["posterior colapse"])
    with pytest.raises(OptionError, match="maker"):
        doctor(Row, rows(), guide=Amortized(Row(), rows()), steps=20)


# --------------------------------------------------------------------------------------- the instruments


def conjugate(loc: float, x: Tensor) -> Pair:
    """q(w) = N(loc, 0.5^2) with loc alone trained: the gradient of a step is (N + 1) w - sum x, w ~ q."""

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(loc))

        def forward(self, x: Tensor) -> None:
            pyro.sample("w", dist.Normal(self.loc, 0.5))

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    pair = Pair(model, Guide())
    pair.check((x,))
    return pair


def test_signal_to_noise_is_that_of_a_known_gradient() -> None:
    x, draws = normals(9) + 1, 800
    off, best = 0.4, float(x.sum()) / 10
    (row,) = signal_to_noise(conjugate(best + off, x), (x,), draws=draws).to_dict("records")
    error = np.sqrt((1 + 0.5 * (off / 0.5) ** 2) / draws)
    assert row["part"] == "guide"
    assert abs(row["snr"] - off / 0.5) < 4.5 * error
    assert abs(row["snr"] - off) > 4.5 * error  # a mutant: the signal over the width of q is not the signal
    (row,) = signal_to_noise(conjugate(best, x), (x,), draws=draws).to_dict("records")
    assert row["snr"] < 4.5 / np.sqrt(draws)


def test_marginals_are_those_of_the_rows() -> None:
    x = normals(50, 2) * torch.tensor([1.0, 3.0]) + 1
    y = torch.tensor([0.0] * 40 + [1.0] * 10)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)
            pyro.sample("y", dist.Bernoulli(0.5), obs=y)

    found = marginals(latents(model, x, y).observed)
    assert found is not None
    own = dist.Normal(x.mean(0), x.std(0, correction=0)).log_prob(x).sum(1)
    expected = own + torch.where(y == 1, np.log(0.2), np.log(0.8))
    torch.testing.assert_close(found.float(), expected.float())
    x[:, 0] = 2.0
    assert marginals(latents(model, x, y).observed) is None


def test_the_worst_stands_first_and_the_list_says_all() -> None:
    small = Finding("slow", "training", 1, "it took 3 s", "time is lost", "less of it", 9.0)
    large = Finding("wrong", "data", 3, "2 of 3", "numbers are wrong", "mend it", 0.1)
    larger = Finding("worse", "data", 3, "3 of 3", "numbers are wrong", "mend it", 0.2)
    found = Diagnosis((small, large, larger), ("a", "b"), {"c": "no latents"}, ("so it is",), 1.0)
    assert found.names == ["worse", "wrong", "slow"] and len(found) == 3 and bool(found)
    text = str(found)
    assert re.search(r"^1\. +data +worse", text, re.M) and re.search(r"^3\. +training +slow", text, re.M)
    assert "not checked: c: no latents" in text and "2 checks" in text and "note: so it is" in text
    assert list(found.frame["harm"]) == [3, 3, 1] and max(map(len, text.splitlines())) <= 112
    nothing = Diagnosis(looked=("a",))
    assert not nothing and str(nothing).startswith("nothing found: 1 checks")
    with pytest.raises(OptionError, match="harm"):
        Finding("x", "data", 4, "", "", "")


def test_every_symptom_says_what_it_sees() -> None:
    for name, look in symptoms().items():
        first = (importlib.import_module(look.__module__).__doc__ or "").strip().splitlines()[0]
        assert len(first) > 20, name

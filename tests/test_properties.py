"""Properties over programs, data and guides drawn at random: a right result, or an error that names what is wrong."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from pyro.infer.autoguide import AutoNormal
from random_programs import CONTAINERS, FAMILIES, GUIDES, LOSSES, Latent, Program, Spec, contained, guide_maker, specs
from torch import Tensor

import dgm
from dgm.data import as_tensors
from dgm.errors import DGMError, GuideError, ModelError
from dgm.fit import fit
from dgm.guides.joint import Joint
from dgm.guides.point import Point
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.noise import recording
from dgm.pair import Pair
from dgm.programs import owner, preserved_rng
from dgm.sites import trace_once
from dgm.starting import start_pair
from dgm.store_run import load_run, save_run

QUICK: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],  # a failure is printed as it was found: to shrink it takes minutes
}
SLOW = QUICK | {"derandomize": False}


def numpy_state() -> str:
    return repr(np.random.get_state())


@contextmanager
def untouched() -> Iterator[None]:
    """The random streams, Pyro's parameter store and torch's modes are as before, also where an error is raised."""
    state, rng, keys = torch.get_rng_state(), numpy_state(), list(pyro.get_param_store().keys())
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        assert torch.equal(state, torch.get_rng_state()), "torch's random stream moved"
        assert rng == numpy_state(), "numpy's random stream moved"
        assert keys == list(pyro.get_param_store().keys()), "a parameter reached Pyro's store"
        assert grad == torch.is_grad_enabled()


def state_of(*programs: Any) -> dict[str, Any]:
    """Every parameter, buffer and training flag."""
    found: dict[str, Any] = {}
    for i, program in enumerate(programs):
        module = owner(program)
        if module is not None:
            found |= {f"{i}.{name}": t.clone() for name, t in module.state_dict().items()}
            found |= {f"{i}.{name} trains": part.training for name, part in module.named_modules()}
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    equal: Callable[[Any, Any], bool] = lambda x, y: torch.equal(x, y) if isinstance(x, Tensor) else x == y  # noqa: E731
    return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)


def double(spec: Spec, rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    return as_tensors(spec.data(rows, seed), dtype=torch.float64)


# --- a right result or a clear error ---------------------------------------------------------------------------------

CASES = st.fixed_dictionaries(
    {
        "spec": specs(),
        "rows": st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9]),
        "batch_size": st.sampled_from([None, None, None, 1, 2, 4, 8]),
        "kind": st.sampled_from(GUIDES),
        "family": st.sampled_from(FAMILIES),
        "container": st.sampled_from(CONTAINERS),
        "compile": st.sampled_from([False, "trace"]),
        "replicas": st.sampled_from([None, None, 1, 2, 3]),
        "validation": st.sampled_from([None, None, None, 0.3, 0.5]),
        "patience": st.sampled_from([None, 2]),
        "dtype": st.sampled_from([None, torch.float32, torch.float64]),
        "declared": st.booleans(),
        "loss": st.sampled_from(["default"] * 5 + list(LOSSES)),
    }
)


def holds(case: dict[str, Any]) -> None:
    """`fit`, `log_weights` and `evaluate` of a case give finite numbers of the right shapes, or a DGMError."""
    spec, rows = case["spec"], case["rows"]
    data = [contained(array, case["container"]) for array in spec.data(rows)]
    plates = spec.plates if case["declared"] and spec.plates else ("data",)
    maker = guide_maker(case["kind"], case["family"], plates)
    options = {name: case[name] for name in ("batch_size", "compile", "validation", "dtype")} | {"steps": 3}
    if case["validation"] and case["patience"]:
        options["patience"] = case["patience"]
    if case["declared"] and spec.plates and rows > 1:
        held = min(max(round(case["validation"] * rows), 1), rows - 1) if case["validation"] else 0
        options["sizes"] = dict.fromkeys(spec.plates, rows - held)
    loss = LOSSES[case["loss"]]
    if loss is not None:
        options["loss"] = loss()
    dtype = case["dtype"] or torch.get_default_dtype()
    try:
        if case["replicas"]:
            with untouched():
                fits = fit(lambda: Program(spec), maker, *data, replicas=case["replicas"], **options)
        else:
            model = Program(spec).to(dtype)
            guide = maker(model, *as_tensors(tuple(data), dtype=dtype))
            with untouched():
                fits = [fit(model, guide, *data, **options)]
    except DGMError as error:
        assert clear(error), str(error)
        return
    for one in fits:
        assert one.error is None or len(one.error) > 20
        assert one.error is not None or np.isfinite(one.history["elbo"]).all()
    one, tensors = fits[0], as_tensors(tuple(data), dtype=dtype)
    before = state_of(one.model, one.guide)
    try:
        with untouched():
            weights = dgm.log_weights(one.model, one.guide, *tensors, num_samples=3, plates=plates)
            result = dgm.evaluate(one.model, one.guide, *tensors, num_samples=20, plates=plates)
        assert weights.shape in ((3,), (3, rows)) and len(result.per_datum) == rows
    except DGMError as error:
        assert clear(error), str(error)
    assert same(before, state_of(one.model, one.guide)), "an evaluation changed the pair"


def clear(error: DGMError) -> bool:
    """One paragraph that names something and says more than a type of error."""
    text = str(error)
    return 25 < len(text) < 1500 and "Traceback" not in text and "Trace Shapes" not in text


@settings(**QUICK, max_examples=8)
@given(CASES)
def test_a_right_result_or_a_clear_error(case: dict[str, Any]) -> None:
    holds(case)


@pytest.mark.slow
@settings(**SLOW, max_examples=1000)
@given(CASES)
def test_a_right_result_or_a_clear_error_at_length(case: dict[str, Any]) -> None:
    holds(case)


# --- identities ------------------------------------------------------------------------------------------------------

WITH_ROWS = specs().filter(lambda spec: spec.plate is not None)


def as_it_is(in_features: int) -> torch.nn.Module:
    """A datum's numbers as they are."""
    return torch.nn.Identity()


def point_loss(pair: Pair, batch: Any, sizes: Any, rows: Tensor | None = None) -> float:
    return float(pair.loss(None, batch, sizes=sizes, rows=rows).detach())


@settings(**QUICK, max_examples=12)
@given(WITH_ROWS, st.integers(2, 9), st.integers(1, 9))
def test_minibatches_average_to_the_full_elbo_and_rows_have_no_order(spec: Spec, rows: int, size: int) -> None:
    """N/B times a batch's terms, averaged over batches with B/N, is the loss of all rows at a guide without noise."""
    model, batch = Program(spec).double(), double(spec, rows)
    guide = Joint(model, *batch, family=Point, plates=spec.plates, encoder=as_it_is)
    pair, sizes = Pair(model, guide), dict.fromkeys(spec.plates, rows)
    whole = point_loss(pair, batch, sizes)
    assert math.isfinite(whole)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(rows))
    parts = [order[a : a + size] for a in range(0, rows, size)]
    mean = sum(len(part) / rows * point_loss(pair, [t[part] for t in batch], sizes, part) for part in parts)
    assert mean == pytest.approx(whole, rel=1e-9, abs=1e-9)
    assert point_loss(pair, [t[order] for t in batch], sizes) == pytest.approx(whole, rel=1e-9, abs=1e-9)
    if size < rows:  # without the scale it is another number
        unscaled = sum(len(part) / rows * point_loss(pair, [t[part] for t in batch], {}, part) for part in parts)
        assert abs(unscaled - whole) > 1e-6 * (1 + abs(whole))


@settings(**QUICK, max_examples=10)
@given(WITH_ROWS, st.sampled_from(FAMILIES), st.integers(2, 6))
def test_single_and_double_precision_agree(spec: Spec, family: Any, rows: int) -> None:
    losses, state, noise = [], None, None
    for dtype in (torch.float32, torch.float64):
        batch = as_tensors(spec.data(rows), dtype=dtype)
        model = Program(spec).to(dtype)
        guide = Joint(model, *batch, family=family, plates=spec.plates, encoder=as_it_is)
        pair = Pair(model, guide)
        pair.check(batch, spec.plates)
        if state is None or noise is None:
            with recording() as draws:
                pair.loss(None, batch)
            assume(draws.complete)
            state, noise = pair.owners.state_dict(), draws.sample()
        pair.owners.load_state_dict(state)
        losses.append(float(pair.loss(None, batch, [t.to(dtype) for t in noise]).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-2)


@settings(**QUICK, max_examples=2)
@given(WITH_ROWS, st.sampled_from(FAMILIES[:7]), st.sampled_from([2, 3, None]), st.integers(0, 99))
def test_traced_is_eager_and_containers_do_not_matter(
    spec: Spec, family: Any, batch_size: int | None, seed: int
) -> None:
    assume(len(spec.plates) == 1)
    arrays = spec.data(5, seed)
    maker = guide_maker("joint", family, spec.plates)
    found = []
    for compile, kind in ((False, "tensor"), ("trace", "tensor"), (False, "list"), (False, "pandas")):
        data = [contained(array, kind) for array in arrays]
        with preserved_rng(seed):
            model = Program(spec)
            guide = maker(model, *as_tensors(tuple(data)))
        sizes = dict.fromkeys(spec.plates, 5)
        one = fit(model, guide, *data, steps=4, batch_size=batch_size, compile=compile, sizes=sizes, seed=seed)
        found.append(one.history["elbo"].to_numpy())
    eager, traced, *others = found
    assert traced == pytest.approx(eager, rel=1e-4, abs=1e-4)
    for other in others:
        assert (other == eager).all()


@settings(**QUICK, max_examples=2)
@given(WITH_ROWS, st.sampled_from(FAMILIES[:7]), st.integers(2, 3), st.sampled_from([None, 2]))
def test_replicas_are_single_fits(spec: Spec, family: Any, count: int, batch_size: int | None) -> None:
    data = as_tensors(spec.data(5))
    maker, sizes = guide_maker("joint", family, spec.plates), dict.fromkeys(spec.plates, 5)
    options: dict[str, Any] = {"steps": 3, "batch_size": batch_size, "sizes": sizes, "lr": 1e-2}
    together = fit(lambda: Program(spec), maker, *data, replicas=count, compile="trace", **options)
    for k, one in enumerate(together):
        model, guide = start_pair(lambda: Program(spec), maker, k, data)
        alone = fit(model, guide, *data, seed=k, compile=False, **options)
        assert one.history["elbo"].to_numpy() == pytest.approx(alone.history["elbo"].to_numpy(), rel=1e-4, abs=1e-4)


@settings(**QUICK, max_examples=15)
@given(specs(), st.integers(1, 5))
def test_latents_agree_with_a_trace(spec: Spec, rows: int) -> None:
    model, batch = Program(spec), as_tensors(spec.data(rows))
    with untouched():
        found = dgm.latents(model, *batch, plates=spec.plates)
    trace = trace_once(model, *batch)
    assert list(found) == [latent.name for latent in spec.latents if not latent.local] + [
        latent.name for latent in spec.latents if latent.local
    ]
    assert list(found.observed) == [site.name for site in spec.observed]
    for latent in spec.latents:
        site, value = found[latent.name], trace.nodes[latent.name]["value"]
        assert value is not None
        assert site.batch_shape + site.event_shape == value.shape
        assert site.plate == (spec.plate if latent.local else None)
        assert bool(torch.as_tensor(site.support.check(value)).all())


@settings(**QUICK, max_examples=6)
@given(specs(), st.sampled_from(GUIDES), st.sampled_from(FAMILIES), st.sampled_from([torch.float32, torch.float64]))
def test_a_saved_pair_comes_back_bit_for_bit(spec: Spec, kind: Any, family: Any, dtype: torch.dtype) -> None:
    data, plates = as_tensors(spec.data(4), dtype=dtype), spec.plates or ("data",)
    pairs = []
    for seed in (1, 2):
        with preserved_rng(seed):
            model = Program(spec).to(dtype)
            try:
                pairs.append((model, guide_maker(kind, family, plates)(model, *data)))
            except DGMError:
                assume(False)
    try:
        done = fit(*pairs[0], *data, steps=2, compile=False)
    except DGMError:
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        save_run(folder, {}, done)
        restored = load_run(folder).restore(*pairs[1], *data)
    assert same(state_of(done.model, done.guide), state_of(*restored))
    draws = []
    for pair in ((done.model, done.guide), restored):
        try:
            draws.append(dgm.log_weights(*pair, *data, num_samples=2, plates=plates))
        except DGMError as error:
            draws.append(torch.tensor(float(len(str(error)))))
    assert torch.equal(draws[0], draws[1])


@settings(**QUICK, max_examples=10)
@given(
    st.integers(1, 5), st.integers(1, 9), st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.booleans(), st.integers(0, 99)
)
def test_log_weights_at_an_exact_posterior_are_the_evidence(
    features: int, rows: int, prior: float, noise: float, intercept: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, generator=generator, dtype=torch.float64)
    model = BayesianLinearRegression(features, prior, noise, intercept)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", model.posterior(x, y))

    weights = dgm.log_weights(model, guide, x, y, num_samples=5)
    assert weights.shape == (5,)
    assert weights.numpy() == pytest.approx(np.full(5, float(model.log_evidence(x, y))), rel=1e-7, abs=1e-7)


# --- found by these searches, and mended -----------------------------------------------------------------------------


def group(count: int, **other: Any) -> Spec:
    return Spec((Latent("z0", shape=(2,), grouped=True),), groups=count, **other)


def test_a_plate_of_one_row_is_a_dimension_of_its_latents() -> None:
    for dim in (-1, -2):
        model, x = Program(group(1, dim=dim)), torch.randn(4)
        guide = Joint(model, x)
        assert trace_once(guide, x).nodes["z0"]["value"].shape == trace_once(model, x).nodes["z0"]["value"].shape  # type: ignore[union-attr]
        assert fit(model, guide, x, steps=2, compile=False).steps == 2


def test_a_parameter_asked_for_inside_of_an_autoguide() -> None:
    model, x = Program(Spec((Latent("z0"),), asked=True)), torch.randn(4)
    result = fit(model, AutoNormal(model), x, steps=2, compile=False)
    assert "pyro_parameters.asked" in dict(owner(result.model).named_parameters())  # type: ignore[union-attr]


def test_objectives_of_several_particles_where_nothing_is_drawn() -> None:
    model, x = Program(Spec((Latent("z0", local=True),))), torch.randn(4)
    guide = Joint(model, x, family=Point, encoder=as_it_is)
    losses = [
        float(Pair(model, guide, dgm.ImportanceELBO(3, estimator=how)).loss(None, (x,)).detach())
        for how in ("pathwise", "dreg")
    ]
    assert losses[0] == pytest.approx(losses[1])


def test_without_a_data_plate_there_is_no_bound_of_each_row() -> None:
    model, x = Program(Spec((Latent("z0"),), plate=None)), torch.randn(4)
    guide = Joint(model, x)
    with pytest.raises(ModelError, match="opens none of the data plates 'data'"):
        dgm.evaluate(model, guide, x, num_samples=20)
    with pytest.raises(ModelError, match="opens none of the data plates 'data'"):
        fit(model, guide, x, steps=2, validation=0.5)


def test_one_held_out_row_has_no_standard_error() -> None:
    model, x = Program(Spec((Latent("z0"),))), torch.randn(4)
    history = fit(model, Joint(model, x), x, steps=2, validation=0.25).history
    assert np.isfinite(history["valid_elbo"]).all() and history["valid_se"].isna().all()


def test_an_undeclared_plate_in_minibatches_is_named() -> None:
    model, x = Program(Spec((Latent("z0", local=True),), plate="rows")), torch.randn(9)
    with pytest.raises(GuideError, match="made for 9 rows of plate 'rows' and sees 3"):
        fit(model, Joint(model, x), x, steps=2, batch_size=3)

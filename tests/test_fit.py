"""Training: repeatable, independent of what ran before, the same from any kind of data, and safe to interrupt."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dgm import fit
from dgm.errors import DataError, GuideError, ModelError, OptionError, TrainingError
from dgm.fit import Fit, Interrupted
from dgm.guides.diagonal_normal import DiagonalNormal
from dgm.guides.encoders import mlp
from dgm.guides.free import Free
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.models import bayesian_linear_regression, linear_vae, vae
from dgm.programs import preserved_rng


def small_vae(seed: int = 0, family: Any = DiagonalNormal) -> tuple[Any, Any, Tensor]:
    model, (x,) = vae.example()
    with preserved_rng(seed):
        return model, Joint(model, x, family=family, encoder=mlp(8)), x


def regression() -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    model, (x, y) = bayesian_linear_regression.example()
    with preserved_rng(0):
        return model, Global(model, x, y, family=FullNormal), (x, y)


def parameters(result: Fit) -> list[Tensor]:
    return [p.detach().clone() for module in (result.model, result.guide) for p in module.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# --- the same again --------------------------------------------------------------------------------------------------


def fit_vae() -> list[Tensor]:
    model, guide, x = small_vae()
    return parameters(fit(model, guide, x, epochs=4, batch_size=8, lr=1e-2))


def fit_regression() -> list[Tensor]:
    model, (x, y) = bayesian_linear_regression.example()
    return parameters(fit(model, AutoNormal(model), x, y, epochs=4, batch_size=8, lr=1e-2))


def test_two_fits_in_either_order_are_bit_equal() -> None:
    one = (fit_vae(), fit_regression())
    assert not list(pyro.get_param_store().keys())
    two = (fit_regression(), fit_vae())
    assert not list(pyro.get_param_store().keys())
    assert same(one[0], two[1]) and same(one[1], two[0])


def test_function_guides_do_not_meet_either() -> None:
    """Two functions with one parameter name: in Pyro's store the second would start where the first ended."""
    model, (x, y) = bayesian_linear_regression.example()

    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))

    first, second = (fit(model, guide, x, y, steps=20, lr=0.1) for _ in range(2))
    assert first.history.equals(second.history.assign(seconds=first.history["seconds"]))
    assert same(parameters(first), parameters(second))
    assert not torch.equal(parameters(first)[0], torch.zeros(3))


def test_the_seed_decides_and_the_stream_outside_is_left_alone() -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model, guide, x = small_vae()
        runs.append(parameters(fit(model, guide, x, epochs=2, batch_size=8, seed=seed)))
        assert torch.equal(state, torch.get_rng_state())
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_traced_and_eager_fits_agree() -> None:
    results = []
    for compile in ("trace", False):
        model, guide, x = small_vae(family=FullNormal)
        schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.95)
        results.append(
            fit(
                model,
                guide,
                x,
                epochs=16,
                batch_size=8,
                lr=1e-2,
                clip=20.0,
                schedule=schedule,
                kl_warmup=5,
                compile=compile,
            )
        )
    a, b = (result.history for result in results)
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), rtol=1e-3)
    for p, q in zip(*map(parameters, results), strict=True):
        assert torch.allclose(p, q, atol=1e-3)


# --- data ------------------------------------------------------------------------------------------------------------


def test_any_kind_of_data_gives_the_same_fit() -> None:
    kinds: list[tuple[Any, ...]] = []
    _, _, (x, y) = regression()
    kinds.append((x, y))
    kinds.append((x.numpy(), y.numpy()))
    kinds.append((x.numpy().astype(np.float64), y.tolist()))
    kinds.append((pd.DataFrame(x.numpy(), columns=["a", "b"]), pd.Series(y.numpy(), name="y")))
    kinds.append(((x, y),))
    runs = []
    for data in kinds:
        model, guide, _ = regression()
        runs.append(parameters(fit(model, guide, *data, epochs=3, batch_size=8)))
    assert all(same(runs[0], run) for run in runs)


def test_data_loader() -> None:
    model, guide, (x, y) = regression()
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    result = fit(model, guide, loader, epochs=3)
    assert result.steps == 9 and len(result.history) == 3 and result.evaluations == 60
    runs = []
    for _ in range(2):
        model, guide, _ = regression()
        runs.append(fit(model, guide, DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), epochs=3))
    assert same(*map(parameters, runs))
    with pytest.raises(OptionError, match="the DataLoader has its own"):
        fit(model, guide, loader, batch_size=3)
    with pytest.raises(OptionError, match="cannot be split"):
        fit(model, guide, loader, validation=0.1)
    with pytest.raises(DataError, match=r"0 batches .* drop_last"):
        fit(model, guide, DataLoader(TensorDataset(x, y), batch_size=30, drop_last=True))


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (7, 1), (8, 1), (9, 1), (10, 2), (20, 3)])
def test_rows_around_the_batch_size_and_a_tail_of_one_row_is_no_batch(rows: int, steps: int) -> None:
    model, guide, (x, y) = regression()
    result = fit(model, guide, x[:rows], y[:rows], epochs=2, batch_size=min(8, rows))
    assert result.steps == 2 * steps and result.evaluations == 2 * rows
    assert np.isfinite(result.history["elbo"]).all()


def test_batch_larger_than_the_data() -> None:
    model, guide, (x, y) = regression()
    with pytest.raises((DataError, OptionError), match="batch_size"):
        fit(model, guide, x, y, batch_size=21, epochs=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((), "no data"),
        ((torch.zeros(0, 2), torch.zeros(0)), "x is empty"),
        ((torch.zeros(5, 2), torch.zeros(4)), "x has 5 rows, y has 4"),
        ((torch.tensor([[0.0, math.nan], [0.0, 0.0]]), torch.zeros(2)), "x"),
        ((torch.zeros(5, 2), torch.zeros(5, 1)), r"expected targets of shape \(5,\), got \(5, 1\)"),
        ((torch.zeros(5, 3), torch.zeros(5)), r"expected x of shape \(N, 2\)"),
    ],
)
def test_bad_data(data: tuple[Any, ...], message: str) -> None:
    model, guide, _ = regression()
    with pytest.raises((DataError, ModelError), match=message):
        fit(model, guide, *data, epochs=1)


def test_dtype_and_transform() -> None:
    model, guide, x = small_vae()
    result = fit(model, guide, x.double(), steps=12, dtype=torch.float64)
    assert all(p.dtype == torch.float64 for p in parameters(result))

    def binarize(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.bernoulli(batch[0], generator=generator),)

    runs = []
    for seed in (0, 0, 1):
        model, guide, x = small_vae()
        runs.append(parameters(fit(model, guide, 0.3 + 0.4 * x, steps=5, batch_size=8, transform=binarize, seed=seed)))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_free_guides_learn_their_own_rows_in_minibatches() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.linspace(-2, 2, 11)
    guide = Free(model, x)
    fit(model, guide, x, steps=600, batch_size=4, lr=0.03)
    assert torch.allclose(guide.members["loc|bias"].detach().flatten(), x / 1.25, atol=0.25)


# --- options ---------------------------------------------------------------------------------------------------------


def test_epochs_steps_and_history() -> None:
    model, guide, x = small_vae()
    result = fit(model, guide, x, epochs=3, batch_size=8)
    columns = ["epoch", "step", "evaluations", "elbo", "kl_weight", "lr", "valid_elbo", "valid_se", "seconds"]
    assert list(result.history) == columns
    assert result.history["step"].tolist() == [3, 6, 9] and result.history["evaluations"].tolist() == [20, 40, 60]
    assert result.history["valid_elbo"].isna().all() and result.stopped == "3 epochs"
    assert result.cpu_seconds > 0 and repr(result).startswith("Fit(9 steps in")
    by_steps = fit(model, guide, x, steps=4, batch_size=8)
    assert by_steps.steps == 4 and by_steps.history["step"].tolist() == [3, 4] and by_steps.stopped == "4 steps"
    again, guide, x = small_vae()
    assert fit(again, guide, x, batch_size=20, steps=1).evaluations == 20


def test_kl_warm_up_and_schedule() -> None:
    model, guide, x = small_vae()
    halve = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    result = fit(model, guide, x, epochs=4, batch_size=10, lr=0.1, kl_warmup=2, schedule=halve)
    assert result.history["kl_weight"].tolist() == [0.5, 1.0, 1.0, 1.0]
    assert result.history["lr"].tolist() == pytest.approx([0.05, 0.025, 0.0125, 0.00625])
    result = fit(model, guide, x, steps=4, batch_size=10, lr=0.1, kl_warmup=4, schedule=halve)
    assert result.history["kl_weight"].tolist() == [0.5, 1.0]
    assert result.history["lr"].tolist() == pytest.approx([0.025, 0.00625])


def test_the_elbo_in_the_history_is_a_datum_s() -> None:
    model, guide, x = small_vae()
    result = fit(model, guide, x, steps=1, optim=partial(torch.optim.SGD, lr=1e-12))
    model, guide, x = small_vae()
    batched = fit(model, guide, x, epochs=30, batch_size=5, optim=partial(torch.optim.SGD, lr=1e-12))
    assert batched.history["elbo"].mean() == pytest.approx(result.history["elbo"].mean(), abs=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": True}, "epochs is True"),
        ({"steps": -1}, "steps is -1"),
        ({"epochs": 1, "steps": 1}, "epochs or steps"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": "0.1"}, "lr is '0.1'"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"kl_warmup": -1}, "kl_warmup is -1"),
        ({"kl_warmup": math.nan}, "kl_warmup is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"seed": True}, "seed is True"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"patience": 3}, "patience needs held-out data"),
        ({"patience": 0, "validation": 0.2}, "patience"),
        ({"validation": 0.0}, "0.0"),
        ({"validation": 1.0}, "1.0"),
        ({"validation": math.nan}, "nan"),
        ({"validate_every": 0, "validation": 0.2}, "validate_every is 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"compile": "jit"}, "compile is 'jit'"),
        ({"sizes": {"rows": 3}}, "sizes names the plate 'rows'"),
        ({"dtype": torch.int64}, "dtype"),
        ({"optim": "adam"}, "optim is 'adam'"),
    ],
)
def test_options(options: dict[str, Any], message: str) -> None:
    model, guide, (x, y) = regression()
    before = [p.detach().clone() for p in guide.parameters()]
    with pytest.raises((OptionError, DataError, ModelError), match=message):
        fit(model, guide, x, y, **options)
    assert same(before, list(guide.parameters()))


def test_numpy_seed_is_a_seed() -> None:
    model, guide, x = small_vae()
    assert fit(model, guide, x, steps=1, seed=np.int64(3)).seed == 3


def test_class_instead_of_object_and_misfits() -> None:
    model, _, x = small_vae()
    with pytest.raises(OptionError, match="is a class"):
        fit(model, Joint, x)
    with pytest.raises(GuideError, match="does not sample the latent 'z'"):
        fit(model, lambda x: None, x, epochs=1)


# --- validation and stopping -----------------------------------------------------------------------------------------


def test_a_converged_model_stops_and_keeps_its_best_parameters() -> None:
    model, guide, (x, y) = regression()
    result = fit(model, guide, x, y, epochs=2000, lr=0.05, validation=0.25, patience=4)
    assert result.stopped.startswith("stopped at check") and "best validated parameters are kept" in result.stopped
    assert 8 <= len(result.history) < 1000
    assert result.history["valid_elbo"].notna().all() and (result.history["valid_se"] > 0).all()
    best = result.history["valid_elbo"].max()
    from dgm.data import split
    from dgm.heldout import HeldOut

    _, held_out = split((x, y), 0.25, torch.Generator().manual_seed(0))
    bound = HeldOut(model, guide, held_out).bound(seed=0)
    assert float(bound.mean()) == pytest.approx(best, rel=1e-5)


def test_validation_every_few_epochs_and_by_given_arrays() -> None:
    model, guide, x = small_vae()
    result = fit(model, guide, x[:15], epochs=5, validation=x[15:], validate_every=2)
    assert result.history["valid_elbo"].notna().tolist() == [False, True, False, True, True]
    assert result.evaluations == 75


def test_validation_changes_nothing_of_the_training() -> None:
    model, guide, x = small_vae()
    plain = parameters(fit(model, guide, x[:15], epochs=4, batch_size=8))
    model, guide, x = small_vae()
    assert same(plain, parameters(fit(model, guide, x[:15], epochs=4, batch_size=8, validation=x[15:])))


def test_training_goes_up_to_the_evidence() -> None:
    model, guide, (x, y) = regression()
    fit(model, guide, x, y, steps=400, lr=0.05, schedule=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=400))
    exact, q = model.posterior(x, y), guide.family()
    assert torch.allclose(q.mean, exact.mean, atol=0.03)
    assert torch.allclose(q.covariance_matrix, exact.covariance_matrix, atol=0.01)


# --- when it ends early ----------------------------------------------------------------------------------------------


def test_ctrl_c_gives_what_was_finished() -> None:
    model, guide, x = small_vae()
    calls = 0

    def press(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        if calls == 9:  # the first is the check of all rows
            raise KeyboardInterrupt
        return batch

    state = torch.get_rng_state()
    with pytest.raises(Interrupted) as caught:
        fit(model, guide, x, epochs=10, batch_size=10, transform=press)
    result = caught.value.fit
    assert (result.stopped, result.steps, len(result.history)) == ("interrupted", 7, 3)
    assert isinstance(caught.value, KeyboardInterrupt) and "interrupted after" in str(caught.value)
    assert all(bool(p.isfinite().all()) for p in parameters(result))
    assert torch.equal(state, torch.get_rng_state()) and not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("compile", ["trace", False])
def test_nan_in_training_keeps_the_last_good_parameters_and_the_history(compile: Any) -> None:
    model, (x,) = linear_vae.example()
    with preserved_rng(0):
        guide = Joint(model, x)
    calls = 0

    def poison(batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        return (batch[0] * math.nan,) if calls > 31 else batch  # one call is the check of all rows

    with pytest.raises(TrainingError, match=r"step 31: the loss is nan; first site .*rows \[\d") as caught:
        fit(model, guide, x, epochs=50, batch_size=10, transform=poison, compile=compile)
    result = caught.value.fit  # type: ignore[attr-defined]
    assert result.stopped == "a value was not finite" and len(result.history) >= 10
    assert all(bool(p.isfinite().all()) for p in parameters(result))


def test_learning_rate_too_large() -> None:
    model, guide, (x, y) = regression()
    with pytest.raises(TrainingError, match="try a smaller learning rate"):
        fit(model, guide, x, y, epochs=200, optim=partial(torch.optim.SGD, lr=1e6))
    assert all(bool(p.isfinite().all()) for p in guide.parameters())


def test_frozen_parts_stay() -> None:
    model, guide, x = small_vae()
    model.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    fit(model, guide, x, epochs=2)
    assert same(before, list(model.parameters()))


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model, guide, x = small_vae()
    fit(model, guide, x, epochs=2, progress=True)
    assert "2/2" in capsys.readouterr().err
    fit(model, guide, x, epochs=2)
    assert capsys.readouterr().err == ""


def test_dropout_trains_eagerly_and_repeats() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))

        def forward(self, x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.net(x).squeeze(-1) + w, 1.0), obs=y)

    runs = []
    for _ in range(2):
        _, _, (x, y) = regression()
        with preserved_rng(0):
            model = Dropping()
        runs.append(parameters(fit(model, AutoNormal(model), x, y, epochs=12)))
    assert same(runs[0], runs[1])


def test_a_row_outside_the_support_is_found_in_any_batch() -> None:
    model, (x,) = vae.example()
    x = x.clone()
    x[-1, 0] = 0.5
    guide = Joint(model, x, encoder=mlp(8))
    for data, held_out in ((x, None), (x[:-1], x[-3:])):
        with pytest.raises(DataError, match="grey pixels"):
            fit(model, guide, data, epochs=1, batch_size=2, validation=held_out)

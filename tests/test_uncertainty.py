"""Parts of uncertainty, abstaining, and foreign data: closed forms, scikit-learn, and measures that know nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from dgm.detection import Detection, detection
from dgm.errors import DataError, OptionError
from dgm.metrics import CategoricalPrediction, GaussianPrediction
from dgm.uncertainty import decompose, ood, risk_coverage, selective


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- parts


def test_total_variance_is_that_of_the_mixture() -> None:
    loc, scale = draws(4, 6), draws(4, 6, seed=1).exp()
    parts = decompose(GaussianPrediction(loc, scale, torch.zeros(6), y_std=3.0))
    second = (loc.square() + scale.square()).mean(0)
    assert parts["total"].tolist() == pytest.approx((9 * (second - loc.mean(0).square())).tolist())
    assert (parts["aleatoric"] + parts["epistemic"]).tolist() == pytest.approx(parts["total"].tolist())


def test_parts_of_the_entropy() -> None:
    p = CategoricalPrediction(3 * draws(5, 8, 4), torch.arange(8) % 4)
    parts = decompose(p)
    expected = torch.distributions.Categorical(logits=p.logits).entropy().mean(0)
    assert parts["aleatoric"].tolist() == pytest.approx(expected.tolist())
    assert (parts["epistemic"] > 0).all() and (parts["total"] <= math.log(4)).all()


@pytest.mark.parametrize("draws_", [1, 7])
def test_draws_that_agree_know_nothing_they_do_not_know(draws_: int) -> None:
    same = draws(1, 30, 5).expand(draws_, 30, 5)
    assert (decompose(CategoricalPrediction(same, torch.zeros(30)))["epistemic"] == 0).all()
    point = GaussianPrediction(same[..., 0] + 1e3, torch.tensor(0.1), torch.zeros(30))
    assert (decompose(point)["epistemic"] == 0).all()


# ---------------------------------------------------------------- abstaining


def test_risk_and_coverage_by_hand() -> None:
    curve = risk_coverage(torch.tensor([0.3, 0.1, 0.2, 0.9]), torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert curve.frame["risk"].tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 2])
    assert curve.aurc == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert curve.excess == pytest.approx(curve.aurc - (0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert curve.at(0.75) == pytest.approx(1 / 3) and curve.at(0.76) == curve.at(1.0) == 0.5


def test_the_oracle_has_no_excess_and_an_order_of_chance_the_plain_risk() -> None:
    loss = draws(500).square()
    assert risk_coverage(loss, loss).excess == pytest.approx(0.0, abs=1e-12)
    assert risk_coverage(-loss, loss).excess > 0.5  # the mutant: the wrong sign
    same = risk_coverage(torch.ones(500), loss)
    assert same.frame["risk"].tolist() == pytest.approx([loss.mean().item()] * 500)


def test_the_curve_knows_no_order_of_ties() -> None:
    u, loss = torch.arange(60.0) // 7, draws(60).square()
    turn = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert risk_coverage(u[turn], loss[turn]).frame.to_numpy() == pytest.approx(risk_coverage(u, loss).frame.to_numpy())


def test_aurc_in_closed_form_with_errors_that_cover_it() -> None:
    """Risk u at uncertainty u ~ U(0, 1): the risk at coverage c is c / 2 and the area 1 / 4, less O(1/N)."""
    rng, times, n, inside = np.random.default_rng(0), 40, 300, 0
    for _ in range(times):
        u = rng.random(n)
        curve = risk_coverage(torch.tensor(u), torch.tensor((rng.random(n) < u).astype(float)))
        inside += abs(curve.aurc - 0.25) < 2 * curve.aurc_se
    assert inside >= 32  # of 38 expected: 4.4 standard errors


def logistic(n: int, factor: float = 1.0, seed: int = 0) -> CategoricalPrediction:
    """y is drawn from its own prediction, which is then sharpened by a factor."""
    logits = 1.5 * draws(1, n, 3, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    return CategoricalPrediction(factor * logits, logits[0].softmax(-1).multinomial(1, generator=rng)[:, 0])


def test_abstaining_raises_accuracy_as_much_as_calibration_says() -> None:
    p = logistic(4000)
    curve = selective(p)
    everything = p.accuracy()
    for coverage in (0.8, 0.9):
        kept, low, high = curve.accuracy_at(coverage)
        confidence = p.scores()["confidence"].nlargest(math.ceil(4000 * coverage))
        assert low < kept < high and kept > everything
        assert abs(kept - confidence.mean()) < 4.5 * math.sqrt(kept * (1 - kept) / len(confidence))
    assert curve.accuracy_at(1.0)[0] == pytest.approx(everything)
    sharp = logistic(4000, factor=2.0)  # over-confident: the order, and so the curve, is hardly worse; its claim is
    kept = selective(sharp).accuracy_at(0.8)[0]
    claim = sharp.scores()["confidence"].nlargest(3200).mean()
    assert claim - kept > 4.5 * math.sqrt(kept * (1 - kept) / 3200)


def test_abstaining_with_a_normal_target() -> None:
    scale = torch.linspace(0.1, 2, 600, dtype=torch.float64)
    p = GaussianPrediction(torch.zeros(1, 600), scale[None], scale * draws(600), y_std=2.0)
    curve = selective(p)
    assert curve.at(1.0) == pytest.approx(p.rmse() ** 2) and curve.at(0.5) < 0.5 * curve.at(1.0)
    assert selective(p, by="epistemic").at(0.5) == pytest.approx(curve.at(1.0))  # one draw: nothing to order by
    with pytest.raises(DataError, match="losses of 0 and 1"):
        curve.accuracy_at(1.0)


def test_abstaining_refusals() -> None:
    u = torch.tensor([0.1, 0.2])
    for bad, message in (
        ((u, u[:1]), "shape"),
        ((u[:0], u[:0]), "shape"),
        ((u * math.nan, u), "uncertainty: .*2 of 2"),
    ):
        with pytest.raises(DataError, match=message):
            risk_coverage(*bad)
    with pytest.raises(OptionError, match="coverage"):
        risk_coverage(u, u).at(80)
    with pytest.raises(OptionError, match="by is 'entropy'"):
        selective(logistic(5), by="entropy")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="only classes have"):
        selective(GaussianPrediction(torch.zeros(1, 2), torch.ones(()), torch.zeros(2)), by="confidence")
    with pytest.raises(DataError, match="is a dict"):
        decompose({})  # type: ignore[arg-type]
    assert math.isnan(risk_coverage(u[:1], u[:1]).aurc_se)


# ---------------------------------------------------------------- foreign data


def test_two_gaussians_have_the_area_of_theory() -> None:
    """s ~ N(0, 1) and N(d, 1): AUROC = Phi(d / sqrt 2)."""
    for d in (0.0, 0.5, 2.0):
        found = detection(draws(4000), d + draws(3000, seed=1))
        assert abs(found.auroc - norm.cdf(d / math.sqrt(2))) < 4.5 * found.auroc_se
        missed = norm.cdf(norm.ppf(0.95) - d)  # own data above the foreign 5 % quantile
        assert found.fpr95 == pytest.approx(missed, abs=4.5 * math.sqrt(0.25 / 3000) * 2)
    assert found.base == pytest.approx(3 / 7) and (found.n_in, found.n_out) == (4000, 3000)
    mutant = detection(draws(4000), 2 * 2.0 + draws(3000, seed=1))
    assert abs(mutant.auroc - norm.cdf(2.0 / math.sqrt(2))) > 4.5 * mutant.auroc_se


def test_areas_are_scikit_learns_with_ties() -> None:
    own, foreign = (4 * draws(70)).round(), (4 * draws(50, seed=1) + 2).round()
    y, s = np.r_[np.zeros(70), np.ones(50)], np.r_[own.numpy(), foreign.numpy()]
    found = detection(own, foreign)
    assert found.auroc == pytest.approx(roc_auc_score(y, s))
    assert found.aupr == pytest.approx(average_precision_score(y, s))
    pairs = foreign[:, None] - own
    by_hand = (pairs > 0).double() + 0.5 * (pairs == 0).double()
    assert found.auroc == pytest.approx(by_hand.mean().item())
    variance = by_hand.mean(1).var() / 50 + by_hand.mean(0).var() / 70
    assert found.auroc_se == pytest.approx(math.sqrt(variance.item()))


@pytest.mark.parametrize(("d", "own", "foreign"), [(0.0, 40, 60), (1.0, 40, 60), (2.5, 30, 25)])
def test_intervals_of_the_area_cover_the_truth(d: float, own: int, foreign: int) -> None:
    truth, times = norm.cdf(d / math.sqrt(2)), 400
    x, y = draws(times, own), d + draws(times, foreign, seed=1)
    inside = 0
    for a, b in zip(x, y, strict=True):
        area = ((b[:, None] > a).double().mean()).item()
        low, high = Detection(area, 0.0, 0.0, 0.0, 0.0, own, foreign).interval()
        inside += low <= truth <= high
    assert 0.90 <= inside / times <= 0.99


def test_separated_sets_leave_a_width() -> None:
    found = detection(torch.zeros(10) + torch.arange(10), 100.0 + torch.arange(5.0))
    assert found.auroc == 1.0 and found.auroc_se == 0.0 and found.fpr95 == 0.0
    low, high = found.interval()
    assert 0.5 < low < 0.9 and high == 1.0
    turned = detection(100.0 + torch.arange(5.0), torch.arange(10.0))
    assert turned.auroc == 0.0 and turned.interval()[0] == 0.0 and turned.interval()[1] == pytest.approx(1 - low)


def test_foreign_data_are_known_by_disagreement_where_noise_hides_them() -> None:
    """Own data: noisy classes on which all draws agree. Foreign: draws each sure of a class of their own."""
    own = CategoricalPrediction(torch.zeros(20, 100, 2) + 0.1 * draws(20, 100, 2), torch.zeros(100))
    foreign = CategoricalPrediction(4 * draws(20, 80, 2, seed=1), torch.zeros(80))
    found = ood(own, foreign)
    assert found["mutual_information"].auroc == 1.0 and found["predictive_entropy"].auroc < 0.2
    same = ood(own, CategoricalPrediction(own.logits.flip(1), own.y))
    assert same["mutual_information"].auroc == pytest.approx(0.5)


def test_foreign_data_of_a_normal_target() -> None:
    spread = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    own = GaussianPrediction(spread * draws(30, 50), torch.tensor(1.0), torch.zeros(50))
    foreign = GaussianPrediction(3 * draws(30, 50, seed=1), torch.tensor(1.0), torch.zeros(50))
    found = ood(own, foreign)
    assert found["total_variance"].auroc == found["epistemic_variance"].auroc > 0.95
    point = ood(*(GaussianPrediction(p.loc[:1], p.scale[:1], p.y) for p in (own, foreign)))
    assert point["epistemic_variance"].auroc == 0.5  # one draw: nothing is known, and rounding is no knowledge


def test_foreign_refusals() -> None:
    s = torch.arange(3.0)
    bad: list[tuple[Any, str]] = [
        (lambda: detection(s[:0], s), "own: expected scores .* both needed"),
        (lambda: detection(s, s[:0]), "foreign: expected scores"),
        (lambda: detection(s, s[:, None]), "foreign: expected scores"),
        (lambda: detection(s * math.nan, s), "own: expected finite values, got 3 of 3"),
        (lambda: ood(logistic(3), CategoricalPrediction(draws(1, 3, 4), torch.zeros(3))), "3 and 4 classes"),
        (lambda: ood(logistic(3), GaussianPrediction(s[None], torch.ones(()), s)), "expected one kind"),
        (
            lambda: ood(*(GaussianPrediction(s[None], torch.ones(()), s, k) for k in (1.0, 2.0))),
            "y_std 1 and 2",
        ),
    ]
    for run, message in bad:
        with pytest.raises(DataError, match=message):
            run()
    with pytest.raises(OptionError, match="level"):
        detection(s, s).interval(95)
    assert math.isnan(detection(s, s[:1]).auroc_se)

"""Verdicts say what they rest on and change with the evidence; the page holds them and loads nothing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from dgm import evaluate
from dgm.errors import OptionError
from dgm.estimate import Estimate
from dgm.evaluation import Evaluation
from dgm.evaluation_page import render
from dgm.evaluation_plots import calibration_curve
from dgm.guides.amortized import Amortized
from dgm.guides.global_ import Global
from dgm.metrics import CategoricalPrediction, VectorPrediction
from dgm.models import bnn
from dgm.models.linear_vae import LinearVAE

DOUBLE = torch.float64


def evaluated(scale: float = 1.0, rows: int = 60, **options: Any) -> Evaluation:
    """A linear VAE with its exact posterior as the guide, or that of another width."""
    model, x = LinearVAE.simulate(rows, 4, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            exact = model.posterior(x)
            pyro.sample("z", dist.MultivariateNormal(exact.mean, exact.covariance_matrix * scale**2))

    return evaluate(model, guide, x, **options)


def about(result: Evaluation, what: str) -> Any:
    return next(v for v in result.verdicts if v.about == what)


def predicted(width: float, count: int = 400) -> Evaluation:
    """A regression whose predictive scale is off by a factor."""

    def model(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        loc, scale = w * 0.0 + x, torch.as_tensor(width)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)
        return {"loc": loc, "scale": scale}

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))

    x = torch.linspace(-1, 1, count)
    y = x + torch.randn(count, generator=torch.Generator().manual_seed(0))
    return evaluate(model, guide, x, y, num_samples=200)


def test_verdicts_on_weights_follow_the_guide() -> None:
    assert "as at the exact posterior" in about(evaluated(), "weights").says
    good, bad = (about(evaluated(scale, num_samples=1000), "weights") for scale in (1.2, 0.3))
    assert good.level == "good" and good.says == "The importance weights can be trusted for every row."
    assert bad.level == "bad" and re.search(r"cannot be trusted for \d+ % of the rows.*Look at rows \d+", bad.says)
    assert "threshold 0.67" in bad.rests and "from 1000 draws each" in bad.rests


def test_verdict_on_the_evidence_names_the_better_bound() -> None:
    result = evaluated(0.7, num_samples=200)
    said = about(result, "evidence")
    assert said.level == "good" and "log p(x) is at least −" in said.says and "K = 200, 60 rows" in said.rests
    assert result.bound is not None
    rows = torch.arange(0, 60, 2)
    for gain, level, name in ((0.5, "caution", "annealed bound"), (-0.5, "good", "importance bound")):
        result.annealed_rows = rows
        result.annealed = Estimate(
            "annealed bound", "lower", result.bound.values[rows] + gain, torch.zeros(30), torch.full((30,), 16.0), 16
        )
        said = about(result, "evidence")
        assert said.level == level and f"the {name} is the better, by 0.500" in said.says
        assert "no clear difference" not in said.says
        best = result.best
        assert best is not None and best.method == name


def test_lost_rows_are_bad_news() -> None:
    result = evaluated(num_samples=200)
    assert result.bound is not None
    values = result.bound.values.clone()
    values[3] = -math.inf
    result.bound = result.bound.replace(values=values)
    said = about(result, "evidence")
    assert said.level == "bad" and "For 1 of 60 rows no draw" in said.says


def test_verdict_on_coverage_catches_wrong_scales() -> None:
    assert about(predicted(1.0), "calibration").level == "good"
    narrow, wide = (about(predicted(width), "calibration") for width in (0.5, 2.0))
    assert narrow.level == wide.level == "bad"
    assert "over-confident" in narrow.says and "too cautious" in wide.says


def test_verdict_on_classes_catches_over_confidence() -> None:
    y = (torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.7).long()

    def evaluated(logit: float) -> Evaluation:
        def model(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            logits = torch.stack([torch.zeros(len(x)), torch.full((len(x),), logit)], -1) + 0.0 * w
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Categorical(logits=logits), obs=y)
            return {"logits": logits}

        return evaluate(model, lambda x, y: pyro.sample("w", dist.Normal(0.0, 1.0)), torch.zeros(500), y)

    assert about(evaluated(math.log(0.7 / 0.3)), "calibration").level == "good"
    over = about(evaluated(4.0), "calibration")
    assert over.level == "bad" and "larger than its accuracy" in over.says
    assert about(evaluated(4.0), "abstaining").says.endswith("no clear gain.")  # it is as certain of every row


def test_bars_of_accuracy_do_not_vanish_where_all_are_right() -> None:
    logits = torch.linspace(0.5, 5.0, 40).expand(1, 40)
    (bars,) = calibration_curve(CategoricalPrediction(logits, torch.ones(40))).axes[0].containers
    lengths = [abs(float(line[1, 1] - line[0, 1])) for line in bars.lines[2][0].get_segments()]
    assert len(lengths) == 10 and min(lengths) > 0.3  # Wilson's interval of four of four begins at a half


def test_targets_of_several_columns_have_scores() -> None:
    def model(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc, scale = x[..., None] * w, torch.tensor([0.5, 1.0])
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y)
        return {"loc": loc, "scale": scale}

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(torch.ones(2), 0.01).to_event(1))

    x = torch.linspace(-1, 1, 200)
    y = x[:, None] + torch.tensor([0.5, 1.0]) * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    result = evaluate(model, guide, x, y, num_samples=200)
    assert isinstance(result.prediction, VectorPrediction)
    assert result.summary["log_likelihood"] == pytest.approx(result.summary["bound"], abs=0.01)
    assert result.summary["energy_score"] > 0 and [v.about for v in result.verdicts] == ["evidence"]
    assert "energy score" in render(result)


def test_posterior_of_a_network_is_judged_on_the_training_rows() -> None:
    model, batch = bnn.example()
    result = evaluate(model, Global(model, *batch), *batch, num_samples=200, train=batch)
    assert math.isfinite(result.summary["khat_posterior"]) and about(result, "posterior").level == "bad"
    assert not [v for v in evaluate(model, Global(model, *batch), *batch).verdicts if v.about == "posterior"]


def test_page_stands_alone_and_escapes_names(tmp_path: Path) -> None:
    result = evaluated(0.3, num_samples=1000)
    result.meta["title"] = "<script>alert(1)</script>"
    result.meta["images"] = np.zeros((60, 8, 8))
    path = result.report(tmp_path / "deep" / "page.html")
    page = path.read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page) and "{{" not in page
    for verdict in result.verdicts:
        assert f'<li class="{verdict.level}">' in page
    assert page.count("<figure") == 3 and "The rows to look at first" in page
    assert str(result.worst(1).index[0]) in page and "how" in page.lower()


def test_page_of_predictions_and_of_points(tmp_path: Path) -> None:
    page = render(predicted(1.0))
    assert "Calibration of predictions" in page and "Bound and ELBO" not in page
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OptionError, match="cannot write"):
        predicted(1.0).report(blocked / "page.html")


def test_thorough_parts_make_their_verdicts_and_pictures() -> None:
    model, x = LinearVAE.simulate(40, 4, 2, generator=torch.Generator().manual_seed(0))
    model.requires_grad_(False)
    options: dict[str, dict[str, Any]] = {
        "latents": {"num_samples": 16},
        "annealed": {"chains": 4, "steps": 30, "leapfrogs": 4},
        "gaps": {"max_steps": 100, "num_samples": 100},
    }
    result = evaluate(model, Amortized(model, x), x, num_samples=200, thorough=options, train=x)
    assert result.notes == []
    assert [v.about for v in result.verdicts] == ["evidence", "weights", "gap", "latents"]
    assert result.annealed is not None and result.annealed_rows is not None and result.gaps is not None
    exact = model.log_evidence(x).mean().item()
    annealed = result.annealed  # four short chains: from below
    assert result.summary["elbo"] < annealed.mean < exact + 4.5 * annealed.mc_se
    gap = about(result, "gap")
    assert "fixed decoder" in gap.rests and "due to q's family" in gap.says
    assert result.summary["approximation_gap"] + result.summary["amortization_gap"] == pytest.approx(
        result.gaps.summary["total"]
    )
    page = render(result)
    for title in ("Where the gap is", "Latent dimensions", "training rows", "annealed importance sampling"):
        assert title in page


def test_parts_that_do_not_go_with_a_pair_are_noted() -> None:
    model, batch = bnn.example()
    result = evaluate(model, Global(model, *batch), *batch, num_samples=100, thorough=True)
    assert result.gaps is None and result.notes[-1].startswith(
        "latents, annealed, gaps: they are of latents of each row"
    )

"""`dgm.compare`: bad data, models and options are refused before anything is trained; all guides start alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm import Comparison, cells, compare, pictures
from dgm.errors import DataError, DGMError, ModelError, OptionError
from dgm.guides import attached
from dgm.guides.amortized import Amortized
from dgm.guides.encoders import mlp
from dgm.guides.global_ import Global
from dgm.models.bnn import BNN
from dgm.models.likelihoods import Categorical
from dgm.starting import maker

X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
SHORT: dict[str, Any] = {"epochs": 2, "seeds": 1, "num_samples": 100, "batch_size": 12}
GUIDES = attached(["diagonal-normal", "full-normal"], encoder=mlp(8))


class Local(PyroModule):
    """z ~ N(0, I_2), x | z ~ N(W z, I), or Bernoulli bits of the same logits."""

    def __init__(self, bits: bool = False):
        super().__init__()
        self.bits, self.decoder = bits, nn.Linear(2, 4)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = self.decoder(z)
            pyro.sample("x", (dist.Bernoulli(logits=loc) if self.bits else dist.Normal(loc, 1.0)).to_event(1), obs=x)


def program(x: Tensor = X[:, 0]) -> None:
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def broken(x: Tensor) -> None:
    raise ZeroDivisionError("half\nway")


def mixture(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(k.float()[:, None], 1.0).expand([len(x), 4]).to_event(1), obs=x)


def short(model: Any = Local, data: Any = X, guides: Any = GUIDES, **options: Any) -> Comparison:
    return compare(model, guides, data, **{**SHORT, **options})


BITS = X.gt(0).float()
BAD: list[tuple[Callable[[], Any], type[DGMError], str]] = [
    (lambda: short(lambda: Local(bits=True), X.sigmoid()), DataError, "grey pixels"),
    (lambda: short(lambda: Local(bits=True), BITS, test=X.sigmoid()), DataError, "grey pixels"),
    (lambda: short(data=X[:, :3]), DataError, "shape"),
    (lambda: short(test=X[:, :3]), DataError, "shape"),
    (lambda: short(data=(X, X)), ModelError, "could not be run on these data: TypeError"),
    (lambda: short(broken), ModelError, r"ZeroDivisionError: half way \(line \d+ of its file\)$"),
    (lambda: short(mixture, guides={"normal": Amortized}), ModelError, "'k' is discrete"),
    (lambda: short(lambda: None), ModelError, "gave a NoneType"),
    (lambda: short(batch_size=500), DataError, "larger than the data"),
    (lambda: short(epochs=0), OptionError, "epochs is 0"),
    (lambda: short(epochs="3"), OptionError, "epochs is '3'"),
    (lambda: short(lr=-1.0), OptionError, "lr is -1"),
    (lambda: short(search_lr=[1e-3, -1.0]), OptionError, "lr is -1"),
    (lambda: short(seeds=2.0), OptionError, "seeds is 2.0"),
    (lambda: short(seeds=[1, 1]), OptionError, "each once"),
    (lambda: short(num_samples=100.5), OptionError, "num_samples is 100.5"),
    (lambda: short(pateince=3), OptionError, "did you mean 'patience'"),
    (lambda: short(checkpoint="x"), OptionError, "keeps its finished runs by folder"),
    (lambda: short(guides=["full-normal"]), OptionError, r"expected \{name"),
]


@pytest.mark.parametrize(("run", "kind", "message"), BAD)
def test_what_no_guide_could_cure_is_refused_before_training(
    run: Callable[[], Any], kind: type[DGMError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_discrete_latents_are_served_by_joint() -> None:
    rows = short(mixture).rows
    assert list(rows["status"]) == ["ok", "ok"] and np.isfinite(rows["bound"]).all()


def test_a_plane_of_classes_is_drawn_and_no_picture_loses_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    x = X[:, :2]
    y = (x[:, 0] > 0).long()
    net = BNN(nn.Linear(2, 2), Categorical())
    result = short(net, (x, y), {"normal": Global})
    assert result.pictures["normal"]["mean"].shape == (1600,)
    assert 0 <= result.pictures["normal"]["mean"].min() <= result.pictures["normal"]["mean"].max() <= 1
    monkeypatch.setattr(pictures, "predict", lambda *_, **__: [][0])
    result = short(net, (x, y), {"normal": Global})
    assert list(result.rows["status"]) == ["ok"] and not result.pictures


def test_one_weight_that_dominates_is_a_bad_khat_not_a_missing_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "global_khat", lambda *_, **__: np.inf)
    result = short(program, X[:, 0], {"normal": lambda model, x: AutoNormal(model)}, batch_size=100)
    assert list(result.rows["khat_bad"]) == [1.0] and "100 %" in repr(result)


def test_a_guide_that_fails_is_a_row() -> None:
    result = short(guides={"good": GUIDES["full-normal"], "bad": lambda model, x: AutoNormal(model)})
    status = result.rows.set_index("guide")["status"]
    assert status["good"] == "ok" and "AutoNormal holds parameters for 12 rows of 24" in status["bad"]
    assert "Trace Shapes" not in status["bad"]
    assert result.statement() == "Only good finished with a score, so that there is nothing to compare. " + (
        "Without a finite score: bad."
    )
    assert list(result.table["rank_low"].fillna(0)) == [1, 0] and "rank" in repr(result).splitlines()[1]


def test_guides_meet_the_same_start_and_the_same_rows() -> None:
    seen: dict[int, list[Any]] = {}

    class Watched(Local):
        def forward(self, x: Tensor) -> None:
            if len(x) == 12 and self.training:
                seen.setdefault(id(self), [self.decoder.weight.detach().clone()]).append(x.clone())
            super().forward(x)

    models: list[Watched] = []  # kept, so that no id is used twice

    def make() -> Watched:
        models.append(Watched())
        return models[-1]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    result = short(make, compile=False)
    assert torch.equal(before, torch.get_rng_state()) and len(pyro.get_param_store()) == 0
    assert (result.rows["status"] == "ok").all()
    first, second = [log for log in seen.values() if len(log) > 5]
    assert len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_program_whose_data_have_a_default_is_no_maker() -> None:
    assert maker(program)() is program
    assert isinstance(maker(lambda bits=True: Local(bits))(), Local)
    result = short(program, X[:, 0], {"normal": lambda model, x: AutoNormal(model)}, batch_size=100)
    assert list(result.rows["status"]) == ["ok"]


def test_search_counts_its_cost_beside_other_validation() -> None:
    result = short(search_lr=[1e-3, 1e-2], validation=0.25, seeds=np.arange(1))
    assert (result.rows["search_evaluations"] > 0).all() and set(result.rows["lr"]) <= {1e-3, 1e-2}

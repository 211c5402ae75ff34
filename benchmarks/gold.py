"""Against the gold standard: predictions of eight families beside those of long Hamiltonian Monte Carlo.

A 1 x 50 ReLU network on UCI sets, split 0 of the PBP protocol, priors and noise as in the UCI suite. HMC: chains on all
training rows, from starts 0.5 about the network's own initial weights, R-hat of the predictive means of the test
rows; its draws are cached with their protocol. Families are trained as in the UCI suite. Each prediction is held
against HMC's by Wasserstein-2 and total variation of the predictive densities, means over the test rows, and by its
RMSE and log-likelihood (Wilson et al., "Evaluating approximate inference in Bayesian deep learning", 2022). "floor" is
the same between two halves of HMC's chains: differences below it, or any where R-hat is far from 1, mean nothing.
W2 and RMSE are in the units of y.

    python -m dgm.benchmarks.gold --datasets yacht,boston --out benchmarks/results/gold.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import dgm
from dgm.agreement import compare_to_reference
from dgm.drawn import Chains
from dgm.errors import DGMError, OptionError, did_you_mean
from dgm.files import Dataset
from dgm.guides.dropout import Dropout
from dgm.guides.ensemble import Ensemble
from dgm.guides.full_normal import FullNormal
from dgm.guides.global_ import Global
from dgm.guides.laplace import Laplace
from dgm.guides.low_rank_normal import LowRankNormal
from dgm.guides.matrix_normal import MatrixNormal
from dgm.guides.multiplicative_flow import MultiplicativeFlow
from dgm.guides.per_layer import PerLayer
from dgm.guides.point import Point
from dgm.guides.stein import Stein
from dgm.guides.swag import SWAG
from dgm.metrics import GaussianPrediction
from dgm.predictive import predict
from dgm.programs import preserved_rng
from dgm.provenance import provenance
from dgm.reference import reference
from dgm.store import write_whole

from .uci import make_bnn

HMC: dict[str, dict[str, int]] = {  # 11 and 2.9 million gradients of each chain
    "yacht": {"chains": 8, "warmup": 1000, "draws": 200, "leapfrogs": 4000, "thin": 10},
    "boston": {"chains": 8, "warmup": 800, "draws": 300, "leapfrogs": 800, "thin": 10},
}
ELSE = {"chains": 16, "warmup": 800, "draws": 200, "leapfrogs": 500, "thin": 5}
QUICK = {"chains": 4, "warmup": 40, "draws": 20, "leapfrogs": 10, "thin": 1}

GUIDES: dict[str, Callable[..., Any]] = {
    "point": partial(Global, family=Point),
    "diagonal-normal": Global,
    "low-rank-normal": partial(Global, family=LowRankNormal),
    "matrix-normal": partial(PerLayer, family={"network*": MatrixNormal, "*": FullNormal}),
    "dropout": Dropout,
    "ensemble of 5": partial(Ensemble, members=5),
    "stein": Stein,
    "laplace-kronecker": partial(Laplace, structure="kronecker"),
}
MORE: dict[str, Callable[..., Any]] = {"swag": SWAG, "multiplicative-flow": MultiplicativeFlow}

KEPT = 800
"""Draws of the reference's predictions that are published: with 50 rows 160 kB."""


def hmc_rows(
    name: str, data: Dataset, protocol: dict[str, Any], cache: Path, stale: Any
) -> tuple[Chains, GaussianPrediction, dict[str, Any]]:
    """The reference, its prediction of the test rows, and its row."""
    with preserved_rng(0):
        model = make_bnn(data.train[0].shape[1])
    last = [time.monotonic()]

    def progress(done: int, total: int) -> None:
        if time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(f"{name}: HMC transition {done} of {total}", flush=True)

    chains = reference(model, *data.train, folder=cache, name=name, stale=stale, progress=progress, **protocol)
    prediction = gaussian(chains.predict(*data.test, most=4000, y_std=data.y_std))
    rhat, ess = chains.prediction_mixing(*data.test)
    row = {
        "data": name, "guide": "HMC", "status": "ok", "rhat_max": float(rhat.max()),
        "rhat_median": float(rhat.median()), "ess_min": float(ess.min()), "rhat_log_p": chains.log_density_rhat,
        "acceptance": float(chains.acceptance.mean()), "divergences": chains.divergences,
        "gradients": chains.gradients, "seconds": chains.seconds, "rmse": prediction.rmse(),
        "log_likelihood": prediction.log_likelihood(), "verdict": chains.verdict, "protocol": protocol,
        **compare_to_reference(prediction, prediction),
    }  # fmt: skip
    return chains, prediction, row


def gaussian(prediction: Any) -> GaussianPrediction:
    """The prediction of a regression.

    Raises:
        OptionError: it is none.
    """
    if not isinstance(prediction, GaussianPrediction):
        raise OptionError("the data sets of this suite are regressions")
    return prediction


def family_row(
    name: str, guide: str, make: Callable[..., Any], data: Dataset, gold: GaussianPrediction, options: Any
) -> dict[str, Any]:
    """Train one family, and hold its predictions against the reference's."""
    row: dict[str, Any] = {"data": name, "guide": guide, "status": "ok"}
    try:
        with preserved_rng(options.seed):
            model = make_bnn(data.train[0].shape[1])
            pair = model, make(model, *data.train)
        decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=10 ** (-1.5 / options.epochs))
        fit = dgm.fit(
            *pair, *data.train, epochs=options.epochs, batch_size=100, lr=options.lr, schedule=decay, seed=options.seed
        )  # fmt: skip
        with preserved_rng(options.seed):
            drawn = predict(fit.model, fit.guide, *data.test, num_samples=options.samples, y_std=data.y_std)
        found = gaussian(drawn)
        row |= {"rmse": found.rmse(), "log_likelihood": found.log_likelihood(), "seconds": fit.seconds}
        row |= compare_to_reference(found, gold)
    except DGMError as error:
        row["status"] = f"{type(error).__name__}: {error}"
    return row


def report(rows: Sequence[dict[str, Any]]) -> str:
    """One table for each set, HMC first with its noise."""
    lines = [
        "| data | guide | W2 to HMC (floor) | TV to HMC (floor) | RMSE | log-likelihood | minus HMC's | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| {row['data']} | {row['guide']} | {row['status']} | | | | | |")
            continue
        cells = [f"{row[k]:.3f} ({row[k + '_floor']:.3f})" for k in ("wasserstein2", "total_variation")]
        lines.append(
            f"| {row['data']} | {row['guide']} | {cells[0]} | {cells[1]} | {row['rmse']:.3f} | "
            f"{row['log_likelihood']:.3f} | {row['log_likelihood_difference']:+.3f} | {row['seconds']:.0f} |"
        )
    lines += [f"\nHMC on {row['data']}: {row['verdict']}" for row in rows if row["guide"] == "HMC"]
    lines += [
        f"Test rows of {row['data']}: R-hat of predictive means at most {row['rhat_max']:.3f}, median "
        f"{row['rhat_median']:.3f}, effective sample size at least {row['ess_min']:.0f}."
        for row in rows if row["guide"] == "HMC"
    ]  # fmt: skip
    return "\n".join(lines)


def publish(path: Path, gold: GaussianPrediction) -> None:
    """The reference's predictions of the test rows, to compare other methods with: no weights, and little space."""
    keep = torch.linspace(0, len(gold.loc) - 1, min(KEPT, len(gold.loc))).round().long()
    held = {"loc": gold.loc[keep].float(), "scale": gold.scale[keep, :1].float(), "y": gold.y.float()}
    held["y_std"] = torch.tensor(gold.y_std, dtype=torch.float64)
    write_whole(path, lambda part: save_file({k: v.contiguous() for k, v in held.items()}, part))


def _write(text: str, part: Path) -> None:
    part.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", default="yacht,boston")
    parser.add_argument("--guides", default=",".join(GUIDES), help=f"also: {', '.join(MORE)}; or none")
    for name in ("chains", "warmup", "draws", "leapfrogs", "thin"):
        parser.add_argument(f"--{name}", type=int, default=None, help="of HMC, instead of the set's own")
    parser.add_argument("--epochs", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--samples", type=int, default=1000, help="draws of each family's prediction")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("dgm-runs/gold"), help="folder of HMC's draws")
    parser.add_argument("--recompute", action="store_true", help="replace draws of another protocol")
    parser.add_argument("--quick", action="store_true", help="a smoke run: its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=None, help="JSON to write; predictions of HMC go beside it")
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.samples = min(options.epochs, 20), min(options.samples, 50)
    known = {**GUIDES, **MORE}
    names = [name for name in options.guides.split(",") if name and name != "none"]
    for name in names:
        if name not in known:
            raise SystemExit(f"no guide {name!r}: {did_you_mean(name, known)}")
    made_by = provenance()
    rows: list[dict[str, Any]] = []
    for name in options.datasets.split(","):
        data = dgm.load(f"uci-{name}", split=0)
        protocol = dict(QUICK if options.quick else HMC.get(name, ELSE)) | {"seed": options.seed}
        protocol |= {k: getattr(options, k) for k in protocol if getattr(options, k) is not None}
        stale = "recompute" if options.recompute else "refuse"
        cache = options.cache / "quick" if options.quick else options.cache
        _, gold, row = hmc_rows(name, data, protocol, cache, stale)
        rows.append(row)
        print(report(rows[-1:]), flush=True)
        for guide in names:
            rows.append(family_row(name, guide, known[guide], data, gold, options))
            print(report(rows[-1:]).splitlines()[2], flush=True)
        if options.out is not None:
            publish(options.out.with_name(f"{options.out.stem}-{name}.safetensors"), gold)
            settings = {key: getattr(options, key) for key in ("epochs", "lr", "samples", "seed", "quick")}
            content = {"protocol": __doc__, **settings, **made_by, "rows": rows}
            text = json.dumps(content, indent=1)
            write_whole(options.out, partial(_write, text))
    print("\n" + report(rows))


if __name__ == "__main__":
    main()

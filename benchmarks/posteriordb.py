"""Families on posteriordb's reference posteriors: moments, discrepancy, k-hat, and NUTS against the reference draws.

Magnusson, Buerkner and Vehtari, "posteriordb: a set of posteriors for Bayesian inference and probabilistic
programming", 2022. Sixteen posteriors with programs in `posteriordb_models` and `posteriordb_series`; --folder is any
checkout of posteriordb.

Protocol. Raw scales differ by factors of thousands, so every guide lives in v, u = mode + s v, with s the marginal
standard deviations of the Laplace approximation (`posteriordb_start`): a diagonal scale leaves a mean-field guide what
it is. Each starts from that approximation by `dgm.ladder_families.start_family`: as the same density where the family
contains it, else with its location and marginal scale; a posterior without a mode starts at the prior's median and
says so. Then all have the same steps of Adam, the step size falling to 0 by a cosine, and gradients of 16 Sobol draws.
NUTS runs in fully whitened coordinates, which change its speed and not its target. Seconds are CPU seconds, one thread.

    dgm bench run posteriordb --budget short
    python -m dgm.benchmarks.posteriordb --quick
    python -m dgm.benchmarks.posteriordb --posteriors kidiq-kidscore_interaction --guides "full-normal;NUTS"
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dgm.bench_cells import Cell, Metric, Suite
from dgm.bench_results import Results
from dgm.discrepancy import mmd, noise_floor
from dgm.errors import DGMError, OptionError, did_you_mean
from dgm.provenance import provenance
from dgm.store import write_whole

from .posteriordb_data import Posterior, load, names
from .posteriordb_rows import LARGEST_Z, Settings, guide_names, rows_of
from .posteriordb_start import Start, find_start

QUICK = ("kidiq-kidscore_momiq", "kidiq-kidscore_interaction", "eight_schools-eight_schools_noncentered")
QUICK_BUDGET = {"steps": 500, "samples": 250, "warmup": 200, "chains": 2, "mmd_draws": 1000}
QUICK_GUIDES = ("diagonal-normal", "full-normal", "inverse-autoregressive-flow", "NUTS")


def table_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, those of the least discrepancy first."""
    wanted = (
        "mean_error", "mean_error_average", "sd_ratio_least", "sd_ratio_most", "mmd2", "khat", "elbo",
        "parameters", "seconds", "worst_z",
    )  # fmt: skip
    good = rows[rows.status == "ok"]
    table = good.groupby(["posterior", "guide"])[[c for c in wanted if c in good]].mean()
    return table.sort_values(["posterior", "mmd2"]) if "mmd2" in table else table


def verdicts(rows: pd.DataFrame) -> dict[str, bool]:
    """What theory says of the rows that are there."""
    good = rows[rows.status == "ok"]
    found: dict[str, bool] = {}
    if "worst_z" in good:
        runs = good[good.guide == "NUTS"]
        total, beyond = int(runs.count_z.sum()), int(runs.beyond_z.sum())
        by_chance = 0.0027 * total
        found[
            f"NUTS: {beyond} of {total} means over {len(runs)} posteriors beyond {LARGEST_Z:g} standard errors "
            f"({by_chance:.1f} by chance)"
        ] = beyond == 0
    if "mean_error" not in good:
        return found
    error = good.groupby(["posterior", "guide"])["mean_error"].mean()
    ratio = good.groupby(["posterior", "guide"])["sd_ratio_least"].mean()
    name = "kidiq-kidscore_interaction"
    if (name, "full-normal") in error.index:
        found[f"{name}: the full normal's means are right within 0.1 sd"] = float(error[name, "full-normal"]) < 0.1
    if (name, "diagonal-normal") in ratio.index:
        found[f"{name}: mean field is too narrow by more than 5"] = float(ratio[name, "diagonal-normal"]) < 0.2
    return found


def chosen(asked: str | None, known: Sequence[str], what: str, separator: str) -> list[str]:
    """The names asked for.

    Raises:
        OptionError: an unknown one.
    """
    if asked is None:
        return list(known)
    wanted = [name.strip() for name in asked.split(separator) if name.strip()]
    for name in wanted:
        if name not in known:
            raise OptionError(f"no {what} {name!r}: {did_you_mean(name, known)}")
    return wanted


def run(
    posteriors: Sequence[str],
    guides: Sequence[str],
    settings: Settings,
    folder: Path | None = None,
    keep: Callable[[list[Any]], None] = lambda rows: None,
) -> list[Any]:
    """All rows, printed as they come, and handed to `keep` whenever a posterior is done."""
    rows: list[dict[str, Any]] = []
    for name in posteriors:
        posterior = load(name, folder)
        began = time.process_time()
        start = find_start(posterior.model)
        floor = noise_floor(
            posterior.reference, lambda a, b: mmd(a, b, max_draws=settings.mmd_draws).squared, repeats=3
        )
        print(
            f"{name}: {len(posterior.names)} parameters, {'mode' if start.found else 'NO MODE, prior median'} in "
            f"{time.process_time() - began:.1f} s, floor of MMD^2 {floor.mean:.5f} +- {floor.sd:.5f}",
            flush=True,
        )
        for guide in guides:
            new = rows_of(posterior, start, guide, settings)
            rows += [row | {"mmd2_floor": floor.mean, "mmd2_floor_sd": floor.sd} for row in new]
            print(f"  {guide:28s} {_line(new[-1])}", flush=True)
        keep(rows)
    return rows


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return str(row["status"])[:110]
    told = (
        f"mean {row['mean_error']:.3f}  sd {row['sd_ratio_least']:.2f}..{row['sd_ratio_most']:.2f}  "
        f"MMD^2 {row['mmd2']:.4f}  {row['seconds']:.1f} s"
    )
    if "worst_z" in row:
        return told + (
            f"  worst z {row['worst_z']:.2f} ({row['worst_z_of']}) of {row['count_z']}, R-hat {row['rhat']:.3f}, "
            f"ESS {row['ess']:.0f}, {row['divergences']} divergences"
        )
    return told + f"  k-hat {row['khat']:.2f}  ELBO {row['elbo']:.2f}"


# ------------------------------------------------------------------------------------------- as a suite of the runner

POSTERIORS = (
    "arK-arK", "arma-arma11", "bball_drive_event_0-hmm_drive_0", "earnings-logearn_interaction",
    "eight_schools-eight_schools_centered", "eight_schools-eight_schools_noncentered", "garch-garch11",
    "gp_pois_regr-gp_pois_regr", "hudson_lynx_hare-lotka_volterra", "kidiq-kidscore_interaction",
    "kidiq-kidscore_momiq", "kilpisjarvi_mod-kilpisjarvi", "low_dim_gauss_mix-low_dim_gauss_mix",
    "mesquite-logmesquite_logvas", "nes1972-nes", "sblrc-blr",
)  # fmt: skip
ONCE = ("Laplace", "NUTS")
"""Guides that have one row however many seeds there are: nothing in them is drawn, or they mix over chains."""
BUDGET: dict[str, tuple[Sequence[str], Sequence[str] | None, Mapping[str, Any]]] = {
    "smoke": (QUICK[::2], ("full-normal", "Laplace", "NUTS"), {**QUICK_BUDGET, "steps": 150, "depth": 5}),
    "short": (POSTERIORS, None, {"steps": 700}),
    "full": (POSTERIORS, None, {"steps": 3000, "seeds": 3, "samples": 2000, "warmup": 1000, "depth": 10}),
}


def cells(budget: str) -> list[Cell]:
    """Every global family on every posterior."""
    posteriors, guides, given = BUDGET[budget]
    settings = vars(Settings(**given))
    return [
        Cell(name, guide, seed, settings)
        for name in posteriors
        for guide in guides or guide_names()
        for seed in range(1 if guide in ONCE else settings["seeds"])
    ]


@cache
def _started(name: str, draws: int) -> tuple[Posterior, Start, Any]:
    """What all guides of a posterior share: it, its mode, and the discrepancy of two halves of its reference."""
    posterior = load(name)
    floor = noise_floor(posterior.reference, lambda a, b: mmd(a, b, max_draws=draws).squared, repeats=3)
    return posterior, find_start(posterior.model), floor


def run_cells(cells: Sequence[Cell]) -> list[Any]:
    """All seeds of a guide on a posterior at once."""
    settings = Settings(**cells[0].settings)
    posterior, start, floor = _started(cells[0].task, settings.mmd_draws)
    found: list[Any] = []
    for row in rows_of(posterior, start, cells[0].guide, settings):
        if row["status"] != "ok":
            found.append(RuntimeError(row["status"]))
            continue
        own = {k: v for k, v in row.items() if k not in ("posterior", "guide", "seed", "status")}
        found.append({**own, "mmd2_floor": floor.mean, "mmd2_floor_sd": floor.sd})
    return found + found[-1:] * (len(cells) - len(found))  # an error that is common to all seeds comes once


def checks(results: Results) -> pd.DataFrame:
    """NUTS against the reference, and what theory says of two normals on a regression."""
    found = []
    for row in results.good.to_dict("records"):
        if row["guide"] == "NUTS":
            found.append(_check(row, "worst_z", "at most", 4.5))
        elif row["task"] == "kidiq-kidscore_interaction" and row["steps"] >= QUICK_BUDGET["steps"]:
            if row["guide"] == "full-normal":
                found.append(_check(row, "mean_error", "at most", 0.1))
            if row["guide"] == "diagonal-normal":
                found.append(_check(row, "sd_ratio_least", "at most", 0.2))
    return pd.DataFrame(found)


def _check(row: Any, metric: str, said: str, limit: float) -> dict[str, Any]:
    verdict = "agree" if row[metric] <= limit else "miss"
    return {
        "task": row["task"], "guide": row["guide"], "metric": metric, "value": row[metric],
        "expected": f"{said} {limit:g}", "tolerance": 0.0, "verdict": verdict,
    }  # fmt: skip


def overview(results: Results) -> dict[str, pd.DataFrame]:
    """Each guide over all posteriors: medians, with the worst."""
    rows = results.good
    bad = rows.assign(bad=rows["khat"] > 0.7) if "khat" in rows else rows.assign(bad=False)
    by = bad.groupby("guide")
    columns = {
        "posteriors": by["task"].nunique(), "mean error, median": by["mean_error"].median(),
        "largest": by["mean_error"].max(), "least sd ratio, median": by["sd_ratio_least"].median(),
        "least": by["sd_ratio_least"].min(), "MMD^2, median": by["mmd2"].median(),
        "largest MMD^2": by["mmd2"].max(), "k-hat above 0.7": by["bad"].sum(),
    }  # fmt: skip
    table = pd.DataFrame(columns)
    return {"Over all posteriors": table.sort_values("MMD^2, median").reset_index()}


SUITE = Suite(
    "posteriordb",
    cells,
    run_cells,
    [
        Metric("mmd2", "lower", "MMD^2", "squared maximum mean discrepancy from the reference draws"),
        Metric("mean_error", "lower", "mean", "largest error of a posterior mean, reference standard deviations"),
        Metric("sd_ratio_least", None, "least sd ratio", "smallest ratio of a standard deviation to the reference's"),
        Metric("khat", None, "k-hat", "of 4000 importance weights; above 0.7 they cannot be trusted"),
        Metric("elbo", "higher", "ELBO", "nats"),
        Metric("worst_z", None, "worst z", "of NUTS: difference of a mean from the reference's in standard errors"),
    ],
    summary="Global families against the reference draws of posteriordb",
    group_by=("task", "guide"),
    ready=lambda task: (load(task), None)[1],
    seconds=lambda cell: 15.0 if cell.guide == "NUTS" else 4.0,
    checks=checks,
    tables=overview,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dgm.benchmarks.posteriordb", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--folder", type=Path, default=None, help="a checkout of posteriordb; default DGM_DATA/posteriordb"
    )
    parser.add_argument("--posteriors", default=None, help="comma-separated; default all that have a program")
    parser.add_argument("--guides", default=None, help="names with ; between them; default all")
    parser.add_argument("--seeds", type=int, default=None, help="trainings of each guide; default 1")
    parser.add_argument("--steps", type=int, default=None, help="of Adam; default 1000")
    parser.add_argument("--depth", type=int, default=None, help="largest depth of a trajectory of NUTS; default 8")
    parser.add_argument("--quick", action="store_true", help="three posteriors, four guides, fewer steps: a minute")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    about = provenance()
    given = {k: v for k in ("seeds", "steps", "depth") if (v := getattr(options, k)) is not None}
    settings = Settings(**(QUICK_BUDGET if options.quick else {}) | given)
    try:
        for name, value in given.items():
            if value < 1:
                raise OptionError(f"--{name} is {value}, expected a whole number of at least 1")
        known = names(options.folder)
        default = [n for n in known if not options.quick or n in QUICK]
        posteriors = chosen(options.posteriors, known, "posterior", ",") if options.posteriors else default
        default = list(QUICK_GUIDES) if options.quick else guide_names()
        guides = chosen(options.guides, guide_names(), "guide", ";") if options.guides else default

        def keep(rows: list[Any]) -> None:
            if options.out is not None:
                found = verdicts(pd.DataFrame(rows))
                record = {"rows": rows, "checks": found, "settings": vars(settings), "provenance": about}
                write_whole(options.out, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))

        rows = run(posteriors, guides, settings, options.folder, keep)
    except DGMError as error:
        parser.error(str(error))
    frame = pd.DataFrame(rows)
    print(table_of(frame).round(3).to_string())
    found = verdicts(frame)
    for text, holds in found.items():
        print(f"{'yes' if holds else 'NO '}  {text}")


if __name__ == "__main__":
    main()

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

    python -m dgm.benchmarks.posteriordb --quick
    python -m dgm.benchmarks.posteriordb --posteriors kidiq-kidscore_interaction --guides "full-normal;NUTS"
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from dgm.discrepancy import mmd, noise_floor
from dgm.errors import DGMError, OptionError, did_you_mean
from dgm.provenance import provenance
from dgm.store import write_whole

from .posteriordb_data import load, names
from .posteriordb_rows import LARGEST_Z, Settings, guide_names, rows_of
from .posteriordb_start import find_start

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

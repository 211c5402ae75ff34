"""Simulation-based calibration: does a guide's posterior hold the truth as often as it says?"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from pyro import poutine

from .calibration_verdict import table_of, verdict_of
from .errors import GuideError, ModelError, OptionError, TrainingError
from .pair import Pair
from .posterior_ranks import PosteriorRanks
from .programs import Program, evaluating, owner, preserved_rng, program_name
from .rank_tests import number_of_bins
from .refits import fitted
from .simulate import Simulation, as_template, simulate_sets
from .sites import DATA_PLATE, latents
from .verdicts import Verdict
from .weights import refuse_untrained

__all__ = ["Calibration", "calibrate"]

FEWEST = 50
"""Sets: with fewer the 95 % interval of a 90 % coverage is wider than 0.17, and nothing but gross faults shows."""

FEWEST_DRAWS = 50


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of the truth among a guide's draws, over data sets that the model itself made.

    Attributes:
        frame: one row for each case and coordinate: set, row (of the set; 0 where a set is one case), site,
            coordinate, rank in 0..L, u (position in (0, 1), uniform where calibrated), z ((truth - mean) / sd).
        cases: data (local latents) or data sets that count. draws: L for each. bins: of the chi-square test.
        failed: why a data set has no ranks, by its number: its fit diverged, or its draws are not finite.
        refitted: whether the guide was fitted to each set.
        level: of the verdict, after correction for the number of coordinates.
        notes: what a reader must know.
    """

    frame: pd.DataFrame
    cases: int
    draws: int
    failed: dict[int, str] = field(default_factory=dict)
    refitted: bool = False
    level: float = 0.05
    notes: list[str] = field(default_factory=list)

    @property
    def bins(self) -> int:
        return number_of_bins(self.cases)

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """One row for each coordinate.

        Columns: p_bins (chi-square), p_ks, p_symmetry; cover_50, _80, _90, _95 with their exact 95 % intervals _low and
        _high; p_cover (of the 90 %); bias (mean z) and bias_se, spread (root mean square of z about its mean; above 1
        where the guide is too narrow); p_holm: three times the smallest of p_bins, p_ks, p_cover, by Holm over the
        coordinates.
        """
        return table_of(self.frame)

    @property
    def calibrated(self) -> bool:
        """Whether nothing speaks against the guide at this level; what that is worth, `verdict` says."""
        return self.verdict.level != "bad"

    @property
    def verdict(self) -> Verdict:
        """A sentence, and what it rests on."""
        return verdict_of(self)

    def plot(self, most: int = 6) -> Figure:
        """Rank histograms and ECDF differences with 95 % bands, of the `most` coordinates that fit worst."""
        from .calibration_plots import calibration_plot

        return calibration_plot(self, most)

    def __repr__(self) -> str:
        return repr(self.verdict)


def calibrate(
    model: Program,
    guide: Any,
    *template: Any,
    trained: bool,
    sets: int = 200,
    draws: int = 199,
    seed: int = 0,
    level: float = 0.05,
    plates: Iterable[str] = (DATA_PLATE,),
    **fit_options: Any,
) -> Calibration:
    r"""Simulate data sets from the model, and rank what made them among the guide's draws.

    .. math:: z \sim p(z), \; x \sim p(x \mid z), \; z_1, \dots, z_L \sim q(z \mid x)
              \;\Longrightarrow\; \#\{l : f(z_l, x) < f(z, x)\} \sim \mathrm{Uniform}\{0, \dots, L\}
              \quad \text{if } q = p(z \mid x)

    for every f: each coordinate of each latent, and the log likelihood and log joint density, which see what a guide
    that ignores the data does wrong. Ranks and coverage see a wrong scale, which the symmetry test never does.

    Two modes. `trained=True`: the guide takes any data (amortized, or a formula) and is used as it is; where all
    latents are local each row of data is a case. `trained=False`: `guide` makes a guide `(model, *batch) -> guide`
    that is fitted to every data set, all in one computation (`dgm.fit(..., replicas=...)`), the model held as it is; a
    data set is a case, and local latents are those of its first row.

    Reference: Talts, Betancourt, Simpson, Vehtari, Gelman, "Validating Bayesian inference algorithms with
    simulation-based calibration", 2018; Yao, Vehtari, Simpson, Gelman, "Yes, but did it work? Evaluating variational
    inference", 2018; Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari, "Simulation-based calibration
    checking for Bayesian computation: the choice of test quantities shapes sensitivity", 2023.

    Args:
        model: a program that can be simulated from (`dgm.simulate`), with parameters as they are.
        guide: a trained guide, or what makes one.
        template: a batch, rows first: inputs and sizes; what it observes is not used.
        trained: which of the two modes.
        sets: cases, at least 50: data sets, or rows of data in the first mode with local latents alone.
        draws: L for each case, at least 50. They are independent draws of the guide.
        seed: of data, fits and draws; the random stream outside is left as it was.
        level: probability, at most, that an exact guide fails the verdict, over all coordinates.
        plates: names of the data plates.
        fit_options: for `dgm.fit` (steps, lr, schedule, ...), in the second mode.

    Raises:
        OptionError: too few sets or draws; fit options for a trained guide.
        GuideError: the guide does not fit the model, is a point, is an object where a maker is asked for (or the
            reverse), or was fitted to one data set and gives the same draws for all others.
        ModelError: the model cannot be simulated from; the message names the site.
        TrainingError: fewer than 50 of the fits came to an end.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x, scale=0.5**0.5):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, scale))
    >>> calibrate(model, guide, torch.zeros(50), trained=True, draws=99).calibrated
    True
    >>> narrow = lambda x: guide(x, 0.5 * 0.5**0.5)
    >>> calibrate(model, narrow, torch.zeros(50), trained=True, draws=99).calibrated
    False
    """
    _check(sets, draws, level)
    plates, template = set(plates), as_template(template)
    found = latents(model, *template, plates=plates)
    if not len(found):
        raise ModelError(f"{program_name(model)} has no latent: there is no posterior to calibrate")
    per_row = trained and not found.global_
    if per_row:
        counts = {site.plate: site.plate_frame.size for site in found.local}
        if len(set(counts.values())) > 1:
            raise ModelError(f"the data plates differ in rows ({counts}): calibrate on a template with as many in each")
        rows = max(1, *counts.values())
        data = simulate_sets(model, *template, sets=max(2, math.ceil(sets / rows)), seed=seed)
    else:
        data = simulate_sets(model, *template, sets=sets, seed=seed)
    notes: list[str] = []
    failed: dict[int, str] = {}
    if trained:
        if fit_options:
            raise OptionError(
                f"trained=True and fit options {sorted(fit_options)}: a trained guide is not fitted again"
            )
        pairs, used = [_ready(model, guide, data, plates, notes)], list(range(len(data)))
    else:
        pairs, failed = fitted(model, guide, data, plates, seed, fit_options)
        used = [r for r in range(len(data)) if r not in failed]
        _enough(len(used), failed)
    ranks = PosteriorRanks(pairs, data, used, list(found.values()), plates, per_row)
    frame = _frame(ranks, draws, sets if per_row else None, seed, failed)
    cases = len(frame) // len(ranks.names())
    _enough(cases, failed)
    return Calibration(frame, cases, draws, failed, not trained, level, notes)


def _check(sets: int, draws: int, level: float) -> None:
    for name, value, least in (("sets", sets, FEWEST), ("draws", draws, FEWEST_DRAWS)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(
                f"{name} is {value!r}, expected a whole number, at least {least}: with fewer even a bad guide passes"
            )
    if not 0.0 < level < 1.0:
        raise OptionError(f"level is {level!r}, expected a number in (0, 1): 0.05 is usual")


def _enough(cases: int, failed: dict[int, str]) -> None:
    if cases < FEWEST:
        first, why = next(iter(failed.items()))
        raise TrainingError(
            f"{len(failed)} data sets have no ranks (set {first}: {why}); {cases} cases are left, and a verdict needs "
            f"{FEWEST}: mend the fit first (lr, clip, steps)"
        )


def _ready(model: Program, guide: Any, data: Simulation, plates: set[str], notes: list[str]) -> Pair:
    """The trained pair, if its guide takes any data."""
    if isinstance(guide, type | functools.partial):
        raise GuideError(
            "trained=True and the guide is what makes one: give the trained guide, or trained=False to fit it to every "
            "data set"
        )
    pair = Pair(model, guide)
    sites = pair.check(data.template, plates)
    refuse_untrained(pair, model, guide)
    values = []
    for batch in (data.batch(0), data.batch(1)):
        with evaluating(model, guide), pair.running(), preserved_rng(0):
            nodes = poutine.trace(pair.run_guide).get_trace(*batch).nodes
        values.append([nodes[name]["value"] for name in sites])
    if all(torch.equal(a, b) for a, b in zip(*values, strict=True)):
        module = owner(guide)
        if module is not None and any(True for _ in module.parameters()):
            raise GuideError(
                f"{program_name(guide)} gives the same draws whatever the data are: it holds the posterior of the one "
                "data set that it was fitted to; give its maker and trained=False, and it is fitted to each"
            )
        notes.append("the guide does not look at the data: its draws are the same for every data set")
    return pair


def _frame(ranks: PosteriorRanks, draws: int, most: int | None, seed: int, failed: dict[int, str]) -> pd.DataFrame:
    """The tidy ranks; `most` cases at most."""
    generator = np.random.default_rng(seed)
    names = ranks.names()
    parts: dict[str, list[np.ndarray]] = {"set": [], "row": [], "rank": [], "z": []}
    left = most if most is not None else math.inf
    with preserved_rng(seed + 1):
        for i, rank, z in ranks.ranks(draws, generator):
            keep = int(min(len(rank), left))
            left -= keep
            good = np.flatnonzero(rank[:keep, 0] >= 0)
            if len(good) < keep:
                failed[ranks.used[i]] = f"{keep - len(good)} of its cases have draws that are not finite"
            new = {"set": np.full(len(good), ranks.used[i]), "row": good, "rank": rank[good], "z": z[good]}
            for name, values in new.items():
                parts[name].append(values)
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    rank, cases = columns["rank"], len(columns["set"])
    return pd.DataFrame(
        {
            "set": np.repeat(columns["set"], len(names)),
            "row": np.repeat(columns["row"], len(names)),
            "site": [site for site, _ in names] * cases,
            "coordinate": [label for _, label in names] * cases,
            "rank": rank.ravel(),
            "u": ((rank + generator.uniform(size=rank.shape)) / (draws + 1)).ravel(),
            "z": columns["z"].ravel(),
        }
    )

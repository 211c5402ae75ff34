"""Does a comparison depend on the step size and on the budget? The same guides at every setting of a grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .compare import Comparison, compare
from .errors import OptionError
from .optim import adam
from .pairs import decide, pairwise, rank_intervals, scored
from .style import shorten
from .tables import WIDTH, digits_of, with_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Sensitivity", "sensitivity"]

Setting = tuple[float, int]
COLUMNS = ["score", "score_se", "difference", "difference_se", "runs", "seconds"]


@dataclass
class Sensitivity:
    """A comparison at every setting of step size and budget.

    Attributes:
        results: the comparison at each setting (lr, epochs) that has finished.
        partial: the comparison that was interrupted, with the runs that it had finished; it enters nothing else.
        meta: lrs and epochs that were asked for, interrupted, elapsed_seconds.
    """

    results: dict[Setting, Comparison]
    partial: Comparison | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def guides(self) -> list[str]:
        """Names of the guides."""
        return list(dict.fromkeys(str(g) for r in self.results.values() for g in r.rows["guide"]))

    @property
    def pairs(self) -> pd.DataFrame:
        """`dgm.pairs.pairwise` at every setting, with lr and epochs; p_holm and better hold for all of it together."""
        parts = []
        for (lr, epochs), result in self.results.items():
            names = [g for g in self.guides if g in result.per_datum]
            parts.append(pairwise(result.rows, result.per_datum, names).assign(lr=lr, epochs=epochs))
        return decide(pd.concat(parts, ignore_index=True))

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each setting and guide.

        Columns lr, epochs, guide; score and score_se (nats, NaN without a finite score); difference and difference_se,
        to the best at this setting; runs that finished, seconds of one; rank_low and rank_high, which hold at all
        settings together.
        """
        pairs, parts = self.pairs, []
        for (lr, epochs), result in self.results.items():
            table = result.table.rename(columns={"bound": "score", "bound_se": "score_se"}).reindex(columns=COLUMNS)
            known = scored(result.per_datum)
            table.loc[[g not in known for g in table.index], ["score", "score_se"]] = np.nan
            here = pairs[(pairs["lr"] == lr) & (pairs["epochs"] == epochs)]
            table = table.join(rank_intervals(here, [g for g in table.index if g in known]))
            table = table.reindex(self.guides).astype(float)
            table.insert(0, "guide", self.guides)
            parts.append(table.assign(lr=lr, epochs=epochs))
        frame = pd.concat(parts, ignore_index=True)
        return frame[["lr", "epochs", *frame.columns.drop(["lr", "epochs"])]]

    @property
    def table(self) -> pd.DataFrame:
        """One row for each guide, in the order of its score at its best setting.

        Columns: the score at each setting; best and worst, which settings; lost, the difference between these two in
        nats, and lost_se, paired over seeds and data.
        """
        frame = self.frame
        wide = frame.pivot(index="guide", columns=["epochs", "lr"], values="score").reindex(self.guides)
        out = pd.DataFrame({self.label((lr, epochs)): wide[(epochs, lr)] for lr, epochs in self.results})
        losses = {g: self._lost(g, frame[frame["guide"] == g]) for g in self.guides}
        for i, name in enumerate(("best", "worst", "lost", "lost_se")):
            out[name] = [losses[g][i] for g in self.guides]
        top = frame.groupby("guide")["score"].max().reindex(out.index)
        return out.loc[top.sort_values(ascending=False, na_position="last", kind="stable").index]

    def _lost(self, guide: str, own: pd.DataFrame) -> tuple[str, str, float, float]:
        known = own[own["score"].notna()].sort_values("score", ascending=False, kind="stable")
        if known.empty:
            return "", "", np.nan, np.nan
        places: list[Setting] = [(float(known["lr"].iloc[i]), int(known["epochs"].iloc[i])) for i in (0, -1)]
        labels = self.label(places[0]), self.label(places[1])
        if places[0] == places[1]:
            return *labels, 0.0, 0.0
        ends = dict(zip(("best", "worst"), (self.results[place] for place in places), strict=True))
        rows = pd.concat([r.rows[r.rows["guide"] == guide].assign(guide=end) for end, r in ends.items()])
        pair = pairwise(rows, {end: r.per_datum[guide] for end, r in ends.items()})
        if pair.empty:  # no seed finished at both
            return *labels, float(known["score"].iloc[0] - known["score"].iloc[-1]), np.nan
        return *labels, float(pair["difference"].iloc[0]), float(pair["difference_se"].iloc[0])

    def label(self, setting: Setting) -> str:
        """A setting in words, without what all have in common."""
        lr, epochs = setting
        several = len({s[0] for s in self.results}) > 1, len({s[1] for s in self.results}) > 1
        parts = [f"lr {lr:g}"] * (several[0] or not several[1]) + [f"{epochs} epochs"] * several[1]
        return ", ".join(parts)

    def statement(self) -> str:
        """Whether the ranking changes between settings, by more than chance, and what that rests on."""
        from .sensitivity_text import statement

        return statement(self)

    def figure(self) -> Figure:
        """Scores against the step size (against the budget, where there is one step size only), by guide."""
        from .sensitivity_text import draw

        return draw(self)

    def __repr__(self) -> str:
        table, frame = self.table, self.frame
        names = [shorten(g, WIDTH) for g in table.index]
        width = max(len("guide"), *map(len, names))
        parts = [[f"{text:<{width}}" for text in ("guide", "", *names)]]
        digits = digits_of(frame["difference_se"])
        for lr, epochs in self.results:
            own = frame[(frame["lr"] == lr) & (frame["epochs"] == epochs)].set_index("guide").loc[table.index]
            is_best = table["best"] == self.label((lr, epochs))
            texts = with_errors(own["score"], own["score_se"], digits)
            cells = [text + "*" * best for text, best in zip(texts, is_best, strict=True)]
            parts.append([f"lr {lr:g}", f"{epochs} epochs", *(f"{c:<{max(map(len, cells))}}" for c in cells)])
        parts.append(["lost", "at worst", *with_errors(table["lost"], table["lost_se"], digits)])
        columns = [[f"{text:^{max(map(len, part))}}" for text in part] for part in parts]
        lines = ["   ".join(line).rstrip() for line in zip(*columns, strict=True)]
        return "\n".join([*lines, "*: best setting of the guide", self.statement()])


def sensitivity(
    model: Any,
    guides: Mapping[str, Callable[..., Any]],
    data: Any,
    *,
    lrs: Sequence[float] = (3e-4, 1e-3, 3e-3),
    epochs: Sequence[int] = (100,),
    progress: bool = False,
    **options: Any,
) -> Sensitivity:
    """The comparison of `dgm.compare` at every pair of a step size and a number of epochs.

    A ranking that holds at one setting only is one of tuning. Cost: len(lrs) * sum(epochs) epochs of training for each
    guide, all seeds at once; budgets that double cost less than twice the largest. Short budgets come first, so that
    what an interruption (Ctrl-C) leaves is a whole grid of them.

    Args:
        model, guides, data: as for `dgm.compare`.
        lrs: step sizes, positive, each once.
        epochs: budgets, whole numbers from 1, each once.
        progress: print a line for each run.
        options: go to `dgm.compare` (test, seeds, batch_size, num_samples, ...) and to `dgm.fit`.

    Raises:
        OptionError: no setting, one twice, a bad one, or search_lr, which would choose the step size itself.
        DataError, ModelError: as for `dgm.compare`, before anything is trained.

    >>> import torch, pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    >>> found = sensitivity(model, {"normal": lambda model, x: AutoNormal(model)}, torch.arange(20.0) / 10,
    ...                     lrs=[1e-2], epochs=[1, 2], seeds=2, num_samples=100)
    >>> found.frame.shape, found.table.index.tolist()
    ((2, 11), ['normal'])
    """
    settings = _settings(lrs, epochs, options)
    results: dict[Setting, Comparison] = {}
    partial, started, interrupted = None, time.perf_counter(), False
    for lr, budget in settings:
        if progress:
            print(f"[setting {len(results) + 1}/{len(settings)}] step size {lr:g}, {budget} epochs", flush=True)
        try:
            result = compare(model, guides, data, lr=lr, epochs=budget, progress=progress, **options)
        except KeyboardInterrupt:
            if not results:
                raise
            interrupted = True
            break
        if result.meta.get("interrupted"):
            if not results:
                raise KeyboardInterrupt
            partial, interrupted = result, True
            break
        results[(lr, budget)] = result
    meta = {"lrs": list(lrs), "epochs": list(epochs), "settings": len(settings), "interrupted": interrupted}
    return Sensitivity(results, partial, meta | {"elapsed_seconds": time.perf_counter() - started})


def _settings(lrs: Sequence[float], epochs: Sequence[int], options: Mapping[str, Any]) -> list[Setting]:
    for name in ("search_lr", "lr"):
        if options.get(name):
            raise OptionError(f"{name} is {options[name]!r}: the step sizes of a sensitivity are those of lrs")
    for name, values in (("lrs", lrs), ("epochs", epochs)):
        if isinstance(values, str) or not hasattr(values, "__len__") or len(values) == 0:
            raise OptionError(f"{name} is {values!r}, expected a list with at least one value")
        if len(set(values)) != len(values):
            raise OptionError(f"{name} is {list(values)!r}, expected each value once")
    for lr in lrs:
        adam(lr)  # refuses a bad step size now
    for budget in epochs:
        if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 1:
            raise OptionError(f"epochs has {budget!r}, expected whole numbers, at least 1")
    return [(float(lr), int(budget)) for budget in sorted(epochs) for lr in sorted(lrs)]

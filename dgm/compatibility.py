"""Which guide goes with what: a table that is found by running every one on tiny models, not written by hand."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .borrowed import quietly
from .errors import DGMError, OptionError
from .graph import Untraceable
from .programs import preserved_rng
from .registry import Entry, attachments, families
from .replicas import Replicas
from .svi import SVI

YES, NO = "yes", "–"

COLUMNS = (
    "guide",
    "kind",
    "global",
    "local",
    "discrete",
    "traces",
    "replicas",
    "density",
    "parameters",
    "a draw costs",
)

ROWS = 12
D = 10
"""Latents that parameters are counted for."""

Make = Callable[..., Any]
Example = tuple[Any, tuple[Tensor, ...]]


# -------------------------------------------------------------------------------------------------- tiny models


def _vector(x: Tensor) -> None:
    """w ~ N(0, I) in ten dimensions, x_n ~ N(mean w, 1)."""
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w.mean(), 1.0), obs=x)


def _rows(x: Tensor) -> None:
    """z_n ~ N(0, I) in ten dimensions, x_n ~ N(mean z_n, 1)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.mean(-1), 1.0), obs=x)


def _layers(x: Tensor) -> None:
    """Two stochastic layers: z2_n ~ N(0, I), z1_n ~ N(z2_n, I), ten latents together."""
    with pyro.plate("data", len(x)):
        top = pyro.sample("z2", dist.Normal(torch.zeros(D // 2), 1.0).to_event(1))
        z = pyro.sample("z1", dist.Normal(top, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.mean(-1), 1.0), obs=x)


def _coins(x: Tensor) -> None:
    """Ten coins for each row: b_n ~ Bernoulli(1/2), x_n ~ N(mean b_n, 1)."""
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(D)).to_event(1))
        pyro.sample("x", dist.Normal(b.mean(-1), 1.0), obs=x)


def _network() -> Example:
    """A network of ten weights in two layers, 2 classes."""
    bnn, likelihoods = (importlib.import_module(f"dgm.models.{name}") for name in ("bnn", "likelihoods"))
    layers = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    x = torch.randn(ROWS, 1)
    return bnn.BNN(layers, likelihood=likelihoods.Categorical()), (x, (x[:, 0] > 0).long())


def _examples(rows: int = ROWS) -> dict[str, list[tuple[str, Example]]]:
    """By column: what to try, and what to say where it is served."""
    x = torch.randn(rows)
    return {
        "global": [(YES, (_vector, (x,))), ("networks", _network())],
        "local": [(YES, (_rows, (x,))), ("layers", (_layers, (x,)))],
        "discrete": [(YES, (_coins, (x,)))],
    }


# ------------------------------------------------------------------------------------------------- running them


@dataclass
class _Found:
    """What came of a guide on one model."""

    guide: Any
    traces: str = NO
    replicas: str | None = None  # not tried


@dataclass
class _Row:
    """What is known of one guide."""

    cells: dict[str, str] = field(default_factory=dict)
    found: dict[str, _Found] = field(default_factory=dict)
    tried: dict[str, tuple[str, Example]] = field(default_factory=dict)


def compatibility(names: Iterable[str] | None = None) -> pd.DataFrame:
    """Every family and way to attach, and what it goes with, found by running it.

    Each is attached to tiny models with global, local and discrete latents; where that is refused the cell is "–".
    "networks" and "layers" say that it serves global weights of a network, or local latents in several layers, only.
    "traces": a step becomes a graph; "replicas": two of them run as one vmap; where global and local differ, the cell
    names the one that does. "parameters" is their number for ten latents, without an encoder: of a family without a
    context, of a way to attach with its default family. What a draw costs is the sentence of its docstring.

    Args:
        names: which; default all.

    Raises:
        OptionError: an unknown name.

    >>> table = compatibility(["point", "discrete"])
    >>> table.set_index("guide").loc["discrete", ["global", "discrete", "traces"]].tolist()
    ['–', 'yes', '–']
    """
    zoo = {**families(), **attachments()}
    unknown = sorted(set(names or ()) - set(zoo))
    if unknown:
        raise OptionError(f"no guide {unknown[0]!r}: `dgm list guides` shows them")
    chosen = [entry for name, entry in zoo.items() if names is None or name in names]
    with preserved_rng(0), quietly():  # why a step stays eager is in the table
        rows = [_row(entry) for entry in sorted(chosen, key=lambda e: (e.kind != "family", e.name))]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(entry: Entry) -> dict[str, str]:
    row = _Row()
    for column, examples in _examples().items():
        make = _maker(entry, column)
        for said, example in examples if make is not None else ():
            guide = _guide(make, example)
            if guide is not None:
                # the weights of a family are stacked alike with and without a context: one of the two is enough
                row.found[column] = _ran(make, guide, example, entry.kind != "family" or column == "global")
                row.cells[column], row.tried[column] = said, (said, example)
                break
    count = _parameters(entry, row)
    return {
        "guide": entry.name,
        "kind": "family" if entry.kind == "family" else "attach",
        **{column: row.cells.get(column, NO) for column in ("global", "local", "discrete")},
        "traces": _agreed({column: found.traces for column, found in row.found.items()}),
        "replicas": _agreed({c: found.replicas for c, found in row.found.items() if found.replicas is not None}),
        "density": NO if not all(_has_density(entry, found.guide) for found in row.found.values()) else YES,
        "parameters": count,
        "a draw costs": cost_of(entry.make),
    }


def _maker(entry: Entry, column: str) -> Make | None:
    """How a guide is tried: a family is attached to what densities can serve."""
    if entry.kind != "family":
        return entry.make
    ways = attachments()
    if column == "discrete":
        return None  # Joint serves such latents by a guide of their own, whatever the family is
    return partial(ways["global" if column == "global" else "amortized"].make, family=entry.make)


def _guide(make: Any, example: Example) -> Any | None:
    model, batch = example
    try:
        with preserved_rng(1):
            return make(model, *batch)
    except Exception:  # a plug-in may refuse in any way
        return None


def _svi(guide: Any, example: Example) -> SVI:
    model, _ = example
    objective = getattr(guide, "objective", None)
    loss = objective() if callable(objective) else None
    return SVI(model, guide, partial(torch.optim.Adam, lr=1e-3), loss=loss, compile="trace")


def _ran(make: Any, guide: Any, example: Example, replicas: bool) -> _Found:
    """One traced step, and one of two replicas; what comes after training is then made."""
    found = _Found(guide)
    batch = example[1]
    rows = torch.arange(len(batch[0]))
    with contextlib.suppress(DGMError):  # nothing to train by steps
        svi = _svi(guide, example)
        svi.step(*batch, rows=rows)
        found.traces = YES if svi.kind == "trace" else NO
    if isinstance(inspect.getattr_static(guide, "has_density", None), property):
        with contextlib.suppress(DGMError):  # there is a density once it is finished
            guide.finish(example[0], *batch)
    if replicas:
        found.replicas = NO
    if replicas and found.traces == YES:
        both = [_svi(make(example[0], *batch), example) for _ in range(2)]
        try:
            Replicas(both, batch, compile="trace").step(rows.expand(2, -1))
            found.replicas = YES
        except (Untraceable, DGMError):
            pass
    return found


def _agreed(cells: Mapping[str, str]) -> str:
    """One answer, or the columns that it holds for."""
    yes = [column for column, cell in cells.items() if cell == YES]
    return NO if not yes else YES if len(yes) == len(cells) else ", ".join(yes)


def _has_density(entry: Entry, guide: Any) -> bool:
    holders = [guide, getattr(guide, "family", None)]
    said = [getattr(holder, "has_density") for holder in holders if hasattr(holder, "has_density")]  # noqa: B009
    return bool(said[0]) if said else bool(getattr(entry.make, "has_density", True) is not False)


def _parameters(entry: Entry, row: _Row) -> str:
    """How many for ten latents; where they grow with the rows of the data, for each row."""
    if entry.kind == "family":
        return f"{sum(p.numel() for p in entry.make(D).parameters()):,}"
    column = next((c for c in ("global", "local", "discrete") if c in row.found), None)
    if column is None:
        return NO
    said, _ = row.tried[column]
    count = _count(row.found[column].guide)
    more = next(example for s, example in _examples(2 * ROWS)[column] if s == said)
    grown = _count(_guide(entry.make, more))
    return f"{count:,}" if grown == count else f"{(grown - count) // ROWS:,} a row"


def _count(guide: Any) -> int:
    named = guide.named_parameters() if isinstance(guide, nn.Module) else ()
    return sum(p.numel() for name, p in named if p.requires_grad and "encoder" not in name.split("."))


COSTS = [
    re.compile(rf"\b(?:draw|sample)\b[^.;:]{{0,40}}?{verb}\s+([^.;:]+)") for verb in (r"\bcosts?", ":", r"\btakes?")
]


def cost_of(make: Any) -> str:
    """What a guide says that a draw costs, by an attribute `draw_costs` or in its docstring; else one pass.

    >>> def guide(model):
    ...     "It has two parameters; a draw costs three passes, at most."
    >>> cost_of(guide)
    'three passes, at most'
    """
    said = getattr(make, "draw_costs", None)
    if said is None:
        text = " ".join((inspect.getdoc(make) or "").split())
        said = next((match.group(1) for cost in COSTS if (match := cost.search(text))), "one pass")
    return str(said).strip().replace("|", "/")


# ------------------------------------------------------------------------------------------------------ output


def to_markdown(table: pd.DataFrame) -> str:
    """The table as Markdown, each guide in one line.

    >>> print(to_markdown(pd.DataFrame({"guide": ["point"], "local": ["yes"]})))
    | guide | local |
    |---|---|
    | point | yes |
    """
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


__all__ = ["compatibility", "cost_of", "to_markdown"]

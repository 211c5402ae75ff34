"""The parts of an evaluation that take minutes: latent diagnostics, the annealed bound, and where the gap is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .data import as_given
from .errors import OptionError, did_you_mean
from .heldout import spaced

if TYPE_CHECKING:
    from .evaluation import Evaluation
    from .programs import Program

PARTS = ("latents", "annealed", "gaps")
ROWS = 100
"""Rows of which the annealed bound and the gaps are made, at most: evenly spaced."""


Thorough = bool | Iterable[str] | Mapping[str, Mapping[str, Any]]
"""All parts, some of them, or some with options of their functions."""


def parts_of(thorough: Thorough) -> dict[str, dict[str, Any]]:
    """The parts that were asked for, in their order, each with its options.

    Raises:
        OptionError: an unknown part.

    >>> parts_of(True), parts_of({"gaps": {"max_steps": 200}})
    ({'latents': {}, 'annealed': {}, 'gaps': {}}, {'gaps': {'max_steps': 200}})
    """
    if isinstance(thorough, bool):
        return {name: {} for name in PARTS} if thorough else {}
    asked = [thorough] if isinstance(thorough, str) else list(thorough)
    for name in asked:
        if name not in PARTS:
            raise OptionError(
                f"thorough has {name!r}, expected some of {', '.join(PARTS)}; {did_you_mean(str(name), PARTS)}"
            )
    options = thorough if isinstance(thorough, Mapping) else {}
    return {name: dict(options.get(name, {})) for name in PARTS if name in asked}


def add_parts(
    result: Evaluation,
    parts: Mapping[str, Mapping[str, Any]],
    model: Program,
    guide: Program,
    batch: Sequence[Any],
    train: Any,
    plates: Iterable[str],
    seed: int,
) -> None:
    """Fill the parts of an evaluation that were asked for; what does not go with this pair becomes a note.

    A guide that cannot do one part can do the others, and hours of evaluation are not to be lost for it.
    """
    if not parts:
        return
    if result.bound is None or result.kind.startswith("log predictive"):
        result.notes.append(f"{', '.join(parts)}: they are of latents of each row that have a density; there are none")
        return
    from .annealing import annealed_bound
    from .errors import DGMError
    from .gaps import gaps
    from .latent_diagnostics import latent_diagnostics

    some, rows = spaced(batch, ROWS)
    for part, options in parts.items():
        told: dict[str, Any] = {"seed": seed, "plates": plates, **options}
        try:
            if part == "latents":
                result.latents = latent_diagnostics(model, guide, *batch, **told)
                result.summary["active_units"] = result.latents.active
            elif part == "annealed":
                result.annealed = annealed_bound(model, guide, *some, **told)
                result.annealed_rows = rows
                result.summary["annealed_bound"] = result.annealed.mean
                result.summary["annealed_bound_se"] = result.annealed.se
                result.summary["annealed_bound_mc_se"] = result.annealed.mc_se
            else:
                fitted = None if train is None else spaced(as_given([train]), ROWS)[0]
                known = result.annealed if fitted is None else None  # log p(x) must be of one kind for all rows
                result.gaps = gaps(model, guide, *some, train=fitted, log_evidence=known, **told)
                result.summary["approximation_gap"] = result.gaps.summary["approximation"]
                result.summary["amortization_gap"] = result.gaps.summary["amortization"]
        except DGMError as error:
            result.notes.append(f"{part}: {error}")


__all__ = ["PARTS", "add_parts", "parts_of"]

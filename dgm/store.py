"""Results on disk: tidy rows, plots and one page; each file appears whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots
from .errors import OptionError
from .tables import format_table, score_name

if TYPE_CHECKING:
    from .compare import Comparison


def writable(folder: Path) -> Path:
    """Make a folder and be sure that it can be written to: to be called before anything is trained.

    Raises:
        OptionError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        told = getattr(error, "strerror", None) or error
        raise OptionError(f"cannot write to {folder}: {told}; give another folder") from error
    return folder


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write to a temporary file beside the target, sync it, and rename it into place."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.unlink(missing_ok=True)  # a link of this name would be followed
        write(part)
        with part.open("rb+") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def save_comparison(result: Comparison, folder: Path) -> Path:
    """Write `rows.parquet`, `rows.csv`, `history.parquet`, `table.txt`, `meta.json`, the plots and `report.html`.

    Raises:
        OptionError: the folder cannot be written to.
    """
    writable(folder)
    write_whole(folder / "rows.parquet", lambda p: p.write_bytes(result.rows.to_parquet(index=False)))
    write_whole(folder / "rows.csv", lambda p: result.rows.to_csv(p, index=False))
    write_whole(folder / "history.parquet", lambda p: p.write_bytes(result.history.to_parquet(index=False)))
    text = format_table(result.table, result.meta, result.rows)
    write_whole(folder / "table.txt", lambda p: p.write_text(text + "\n", encoding="utf-8", errors="backslashreplace"))
    meta = json.dumps(result.meta, indent=1, default=str, ensure_ascii=False)
    write_whole(folder / "meta.json", lambda p: p.write_text(meta + "\n", encoding="utf-8", errors="backslashreplace"))
    for name, figure in _figures(result).items():
        write_whole(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=150, facecolor="white"))
    return result.report(folder / "report.html")


def _figures(result: Comparison) -> dict[str, Any]:
    table, order = result.table, [str(g) for g in result.table.index]
    score = score_name(result.meta)
    out: dict[str, Any] = {}
    if len(result.history):
        out["training-curves"] = plots.training_curves(result.history, order)
    if score in table and table[score].notna().any():
        out["bound-against-cost"] = plots.bound_against_cost(table, score)
    if result.khat:
        out["k-hat"] = plots.khat_distribution(result.khat, result.k_threshold, order)
    if any("samples" in part for part in result.pictures.values()):
        out["pictures"] = plots.images(result.pictures, order)
    if any("grid" in part for part in result.pictures.values()):
        out["predictions"] = plots.predictive_band(result.pictures, order)
    return out

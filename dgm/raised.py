"""What torch raises where numbers are not finite: an error in the middle of training that is none of the program's."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pyro
import torch
from torch import Tensor

_TELLS = ("to satisfy the constraint", "within the support")
_CORE, _LIBRARIES = Path(__file__).parent, [Path(module.__file__ or "").parent for module in (torch, pyro)]


def is_numerical(error: BaseException) -> bool:
    """Whether an error says that a value is out of its domain, or that a matrix cannot be factorised.

    >>> is_numerical(ValueError("Expected parameter loc ... to satisfy the constraint Real()"))
    True
    >>> is_numerical(ValueError("too many values to unpack"))
    False
    """
    if isinstance(error, torch.linalg.LinAlgError):
        return True
    return isinstance(error, ValueError) and any(tell in str(error) for tell in _TELLS)


def message(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__.lstrip('_')}: {(str(error).splitlines() or [''])[0]}"


def describe(error: BaseException, where: str, trace: Any, batch: Sequence[Any], rows: Tensor | None) -> str:
    """Where in the model or guide an error came up: the site, the rows, the line.

    Args:
        where: "model" or "guide". trace: what of it was run before; None where it ran to its end.
    """
    frames = _frames(error)
    own = [(f, n) for f, n in frames if not _of_library(Path(f.f_code.co_filename))]
    site = _site(*own[-1]) if own else None
    before = [n for n, node in trace.nodes.items() if node["type"] == "sample"] if trace is not None else []
    if site is not None:
        place = f"at site {site!r} of the {where}"
    else:
        place = f"in the {where}" + (f" after site {before[-1]!r}" if before else "")
    if own:
        place += f" ({Path(own[-1][0].f_code.co_filename).name}, line {own[-1][1]})"
    return f"{place} torch raises {message(error)}{_rows(frames, batch, rows)}"


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """The frames that an error went through, innermost last; of the error that came first."""
    while error.__cause__ is not None:
        error = error.__cause__
    found, at = [], error.__traceback__
    while at is not None:
        found.append((at.tb_frame, at.tb_lineno))
        at = at.tb_next
    return found


def _of_library(file: Path) -> bool:
    return file.parent == _CORE or any(folder in file.parents for folder in _LIBRARIES)


def _site(frame: FrameType, line: int) -> str | None:
    """The name in the `sample("name", ...)` around a line."""
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and node.lineno <= line <= (node.end_lineno or 0):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name == "sample" and isinstance(node.args[0], ast.Constant):
                return str(node.args[0].value)
    return None


def _rows(frames: Sequence[tuple[FrameType, int]], batch: Sequence[Any], rows: Tensor | None) -> str:
    """Rows of the values that torch's validation found wrong: its own last frame holds them."""
    valid = frames[-1][0].f_locals.get("valid") if frames else None
    sizes = [len(t) for t in batch if isinstance(t, Tensor) and t.dim()]
    if not isinstance(valid, Tensor) or not sizes:
        return ""
    axis = next((i for i, n in enumerate(valid.shape) if n == sizes[0]), None)
    if axis is None:
        return ""
    bad = (~valid.bool()).movedim(axis, 0).reshape(sizes[0], -1).any(1).nonzero().flatten()
    named = rows[bad] if rows is not None and len(rows) == sizes[0] else bad
    return f", rows {named[:5].tolist()}" + (" ..." if len(bad) > 5 else "")

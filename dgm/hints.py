"""What is behind the failure of a program on its data: devices, floating types, shapes; and where its sites stand."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .data import array_names
from .errors import DGMError, without_shapes
from .programs import Program, owner
from .support import kind_of

_ROOTS = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (pyro.__file__, torch.__file__, __file__))


COPIED = 2**22
"""Numbers of an argument that are copied while a program runs for the first time, in case it writes to them."""


class Lines(Messenger):
    """Remembers by which line of which file each site was sampled: `at` gives "model.py:12" by the site's name."""

    def __init__(self) -> None:
        super().__init__()
        self.at: dict[str, str] = {}

    def _pyro_sample(self, msg: Any) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(_ROOTS):
            frame = frame.f_back
        if frame is not None:
            self.at[msg["name"]] = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"


@contextlib.contextmanager
def unwritten(name: str, batch: Sequence[Any], refusal: type[DGMError]) -> Iterator[None]:
    """Refuse a program that writes to the data it is given, and give them back as they were, up to `COPIED` numbers."""
    tensors = [(n, t) for n, t in zip(array_names(len(batch)), batch, strict=False) if isinstance(t, Tensor)]
    held = [(n, t, t._version, t.clone() if t.numel() <= COPIED else None) for n, t in tensors if not t.is_inference()]
    yield
    for label, tensor, version, before in held:
        if tensor._version != version:
            if before is not None:
                with torch.no_grad():
                    tensor.copy_(before)
            raise refusal(
                f"{name} writes to its argument {label} (x -= 1, x[0] = ..., x.clamp_()), so that every step would see "
                f"other data than the one before: make a new tensor, such as {label} = {label} - 1"
            )


def misplaced(nodes: Mapping[str, Any], lines: Mapping[str, str]) -> str | None:
    """The first site whose independent entries stand in no plate, and the fix; None where all do.

    A site's batch shape must be that of its plates: entries in no plate would be summed where they do not belong.
    """
    for name, node in nodes.items():
        if node["type"] != "sample" or site_is_subsample(node):
            continue
        frames = {frame.dim: frame for frame in node["cond_indep_stack"] if frame.vectorized}
        batch = tuple(node["fn"].batch_shape)
        wide = {dim: batch[dim] for dim in range(-len(batch), 0) if batch[dim] != 1}
        leftmost = min(frames, default=0)
        bad = [
            dim for dim, size in wide.items() if dim < leftmost or (dim in frames and size not in (1, frames[dim].size))
        ]
        if not bad:
            continue
        around = ", ".join(f"{f.name!r} (dim {d}, {f.size})" for d, f in sorted(frames.items(), reverse=True)) or "none"
        where = f", {lines[name]}" if name in lines else ""
        return (
            f"site {name!r} ({kind_of(node['fn'])}{where}) has the batch shape {batch}, its plates are: {around}; "
            f"make the entries one value by .to_event({len(bad)}), or open a pyro.plate around them"
        )
    return None


def failure(error: Exception, program: Program, batch: Sequence[Any]) -> str:
    """An error in one line, with the line of the program's own code and what is likely behind it."""
    code = getattr(program.forward if isinstance(program, nn.Module) else program, "__code__", None)
    code = getattr(getattr(program, "function", None), "__code__", code)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    text = " ".join(without_shapes(str(error)).split())
    where = f" (line {lines[-1]} of its file)" if lines else ""
    return f"{type(error).__name__}: {text}{where}{hint(error, program, batch)}"


def hint(error: Exception, program: Program, batch: Sequence[Any]) -> str:
    """The likely cause of an error that a program raised on a batch, with its fix; "" where none is seen.

    >>> x = torch.zeros(4, 1, 28, 28)
    >>> hint(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), nn.Linear(784, 2), [x])
    '; x has the shape (4, 1, 28, 28), and the layer takes 784 features: give x.flatten(1)'
    """
    text, home = str(error), owner(program)
    module = home if home is not None else nn.Module()
    names = dict(zip(array_names(len(batch)), batch, strict=False))
    for name, value in names.items():
        if type(value).__module__.partition(".")[0] in ("numpy", "pandas"):
            return f"; {name} is a {type(value).__name__}: give tensors (dgm.fit and dgm.as_tensors convert arrays)"
    found = _devices(module, names)
    if not found and re.search(r"dtype|scalar type|expected .*(Float|Double|Half|Long)", text):
        found = _types(module, names)
    if not found and re.search(
        r"shapes? cannot be multiplied|size mismatch|input to conv|must match|to have \d+", text
    ):
        found = _layers(module, names)
    if not found:
        found = next((cure for pattern, cure in _KNOWN.items() if re.search(pattern, text)), "")
    plate = re.search(r"Shape mismatch inside plate\('(.+?)'\) at site (\S+) dim \S+ (\d+) vs (\d+)", text)
    if not found and plate:
        found = _plate(plate[1], plate[2], int(plate[3]), int(plate[4]), batch)
    return f"; {found}" if found else ""


_KNOWN = {
    r"Multiple sample sites named": (
        "give every site a name of its own, and make a plate that is opened twice once: rows = pyro.plate(...)"
    ),
    r"more than 1 value per channel": "batch normalisation cannot train on one row: give batches of 2 rows or more",
    r"subsample_size does not match": (
        "the plate's subsample has another number of rows than the plate draws: write pyro.plate(name, len(x)), for "
        "dgm makes the batches"
    ),
    r"positional arguments? but \d+ w|missing \d+ required positional": (
        "model and guide are both called with all arrays of the data, in their order"
    ),
}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _devices(module: nn.Module, names: Mapping[str, Any]) -> str:
    held = [(f"its {name!r}", t.device) for name, t in _tensors(module)]
    held += [(name, value.device) for name, value in names.items() if isinstance(value, Tensor)]
    other = next(((name, device) for name, device in held if device != held[0][1]), None) if held else None
    if other is None:
        return ""
    return (
        f"{held[0][0]} is on {held[0][1]} and {other[0]} on {other[1]}: put all on one device, e.g. by "
        "dgm.fit(device=...) or .to(device)"
    )


def _types(module: nn.Module, names: Mapping[str, Any]) -> str:
    held = next(((f"its {name!r}", t.dtype) for name, t in _tensors(module) if t.is_floating_point()), None)
    default = torch.get_default_dtype()
    name, dtype = held or ("the default of new tensors", default)
    short = str(dtype).removeprefix("torch.")
    for label, value in names.items():
        if not isinstance(value, Tensor) or value.dtype == dtype:
            continue
        kind = str(value.dtype).removeprefix("torch.")
        if not value.is_floating_point() and value.dim() < 2 and len(names) > 1 and label != "x":
            continue  # labels
        cure = (
            f"or train with dgm.fit(dtype={value.dtype})" if value.is_floating_point() and held else "as dgm.fit does"
        )
        return f"{label} is {kind}, {name} {short}: give {label}.to({dtype}), {cure}"
    if held is not None and dtype != default:
        new = str(default).removeprefix("torch.")
        return f"{name} is {short}, but tensors made on the way are {new}: write x.new_zeros(...) for torch.zeros(...)"
    return ""


def _layers(module: nn.Module, names: Mapping[str, Any]) -> str:
    shapes = {name: tuple(v.shape) for name, v in names.items() if isinstance(v, Tensor) and v.dim() > 1}
    for path, layer in module.named_modules():
        told = f"the layer {path!r}" if path else "the layer"
        for name, shape in shapes.items():
            if isinstance(layer, nn.Linear) and shape[-1] != layer.in_features:
                known = f"{name} has the shape {shape}, and {told} takes {layer.in_features} features"
                flat = len(shape) > 2 and math.prod(shape[1:]) == layer.in_features
                return f"{known}: give {name}.flatten(1)" if flat else f"{known}: give the model {shape[-1]}"
            if isinstance(layer, nn.Conv2d) and len(shape) < 3:
                return (
                    f"{name} has the shape {shape}, and {told} takes images of {layer.in_channels} channels: give "
                    f"{name}.reshape(-1, {layer.in_channels}, height, width)"
                )
        if isinstance(layer, nn.Linear | nn.Conv2d):
            return ""  # the first layer is the one that sees the data
    return ""


def _plate(plate: str, site: str, size: int, seen: int, batch: Sequence[Any]) -> str:
    rows = next((len(item) for item in batch if isinstance(item, Tensor) and item.dim()), None)
    if rows == size:
        return f"a row of {site!r} has {seen} entries: make them one value by .to_event(1)"
    return f"the plate counts {size} and the batch has {rows} rows: write pyro.plate({plate!r}, len(x))"


__all__ = ["Lines", "failure", "hint", "misplaced", "unwritten"]

"""How much memory there is, and how much a step needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .programs import preserved_rng
from .svi import SVI

SHARE = 0.5
"""Of the memory that is free, what a group of replicas may take."""


def available(device: torch.device) -> float:
    """Free memory in bytes; infinity where the system does not tell.

    >>> available(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = math.inf
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = float(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, float(limit) - used) if limit != "max" else free
    except (OSError, StopIteration, ValueError):
        pass
    return free


def step_bytes(svi: SVI, batch: Sequence[Any], rows: Tensor | None) -> float:
    """What one replica's step needs: parameters, gradients, moments, and twice what autograd keeps of the loss."""
    kept: dict[int, int] = {}

    def see(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    try:
        with preserved_rng(), torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            svi.pair.loss(None, batch, sizes=svi.sizes, rows=rows)
    except RuntimeError as error:
        if "saved tensor" not in str(error):
            raise
        with preserved_rng(), _Made() as made:  # gradients inside of the loss: count all that it makes instead
            svi.pair.loss(None, batch, sizes=svi.sizes, rows=rows)
        kept = {0: made.bytes}
    parameters = sum(p.numel() * p.element_size() for p in svi.parameters.values())
    return 4.0 * parameters + 2.0 * sum(kept.values())


class _Made(TorchDispatchMode):
    """Counts the bytes of every tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.bytes += sum(t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)

"""Arrays in memory-mapped files, read by rows: a slice or an index gives a tensor as `as_tensors` does."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import numpy_target, refuse_nonfinite
from .errors import DataError

RELEASE = 64 * 2**20
"""Bytes of a file that may stand in this process's memory before they are given back to the system's cache."""

_FAULT = 2**21  # one row maps up to so many: the system caches files, and maps them, in pieces of this size
_READ_AHEAD = 2**16  # rows shorter than this are read without what follows them
_NUMPY: dict[torch.dtype, type] = {torch.float32: np.float32, torch.float64: np.float64}


class MappedArray:
    """Rows of a `np.memmap`; `t[a:b]` and `t[index]` read them, and nothing else does.

    Args:
        array: `(N, ...)` of numbers, such as `np.load(path, mmap_mode="r")`; it is never written to.
        name: what messages call it.
        dtype: a floating dtype, default torch's; whole numbers of one dimension become int64 labels.
        device: of the tensors, default the CPU.

    Raises:
        DataError: it holds no numbers, or no rows. When it is read: a value is not finite (rows count from 0 in the
            whole array), or the file is shorter than it was.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "x.npy")
    ...     np.save(path, np.arange(6).reshape(3, 2))
    ...     MappedArray(np.load(path, mmap_mode="r"), "x")[torch.tensor([2, 0])]
    tensor([[4., 5.],
            [0., 1.]])
    """

    def __init__(
        self,
        array: np.memmap[Any, Any],
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name} is a memory-mapped array of {array.dtype}, not of numbers")
        if array.ndim == 0 or array.size == 0:
            raise DataError(f"{name} is empty or has no rows: its shape is {array.shape}")
        self.array, self.name = array, name
        self.device = torch.device("cpu" if device is None else device)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.label = array.ndim == 1 and array.dtype.kind in "biu"
        self.target = numpy_target(array, self.dtype)
        self._pages = _pages(array)
        self._touched = 0
        self._random = False
        self._row_bytes = array.itemsize * (array.size // len(array))

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        self.check_file()
        rows = index.cpu().numpy() if isinstance(index, Tensor) else np.arange(*index.indices(len(self)))
        return self.read(rows).to(self.device)

    def read(self, rows: np.ndarray) -> Tensor:
        """The rows with these numbers, in their order, on the CPU. Safe to call in a thread beside others."""
        contiguous = len(rows) > 0 and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
        self._expect(random=not contiguous)
        if contiguous:
            found: np.ndarray = np.array(self.array[rows[0] : rows[-1] + 1], dtype=self.target, order="C")
        else:
            order = np.argsort(rows)  # from front to back: no page of the file is fetched twice
            part = self.array[rows[order]]
            found = np.empty(part.shape, self.target)
            found[order] = part
        self._count(len(rows) * max(self._row_bytes, _FAULT if not contiguous else 0))
        return torch.from_numpy(found) if self.label else self._checked(found, rows)

    def _checked(self, found: np.ndarray, rows: np.ndarray) -> Tensor:
        """In numpy as far as it goes: torch would start a second team of threads in the thread that reads."""
        kind = _NUMPY.get(self.dtype)
        if kind is not None:
            with np.errstate(over="ignore"):
                values: np.ndarray = found.astype(kind, copy=False)
            result, finite = torch.from_numpy(values), bool(np.isfinite(values).all())
        else:
            result = torch.from_numpy(found).to(self.dtype)
            finite = bool(torch.isfinite(result).all())
        if not finite:
            refuse_nonfinite(torch.from_numpy(found), self.name, numbers=rows)
            refuse_nonfinite(result, self.name, what=f"too large for {self.dtype}", numbers=rows)
        return result

    def check_file(self) -> None:
        """Refuse a file that was cut since it was opened: to read behind its end kills the process without a word."""
        if self._pages is None:
            return
        start = self.array.offset - self.array.offset % mmap.ALLOCATIONGRANULARITY
        if self._pages.size() < start + len(self._pages):
            raise DataError(
                f"{self.name}: the file {self.array.filename} is shorter than when it was opened ({self._pages.size()} "
                f"bytes, {start + len(self._pages)} are mapped); write it again, then open it again"
            )

    def _expect(self, random: bool) -> None:
        """Reading ahead of a row that stands alone would fetch its neighbours for nothing."""
        if self._pages is not None and random != self._random and hasattr(mmap, "MADV_RANDOM"):
            alone = random and self._row_bytes < _READ_AHEAD
            self._pages.madvise(mmap.MADV_RANDOM if alone else mmap.MADV_NORMAL)
        self._random = random

    def _count(self, read: int) -> None:
        self._touched += read
        if self._touched > RELEASE:
            self._drop()

    def _drop(self) -> None:
        # pages of a copy-on-write map ("c") may hold what the caller wrote: those stay
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED") and self.array.mode != "c":
            if len(self._pages) > RELEASE:
                self._pages.madvise(mmap.MADV_DONTNEED)
        self._touched = 0

    def release(self) -> None:
        """Give the file's pages back, and leave the map as its owner had it."""
        self._expect(random=False)
        self._drop()


def _pages(array: np.ndarray) -> mmap.mmap | None:
    """The map under an array, None for one that was computed from a memory-mapped one and is in memory."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None

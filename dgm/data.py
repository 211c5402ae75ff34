"""Data as tensors: conversion, checks made before training, random splits and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Sized
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .errors import DataError, OptionError

_ARRAYS = (Tensor, np.ndarray, pd.DataFrame, pd.Series)


def as_tensors(
    data: Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, ...]:
    """Data of any usual kind as a tuple of checked tensors with one leading length N.

    Floats get one dtype. Whole numbers and booleans become int64 class labels where the array has one dimension
    and floats where it has more (pixels, indicator columns). The caller's arrays are never written to.

    Args:
        data: one array, or a tuple or list of arrays: tensor, numpy array, pandas frame or series, list of numbers.
        device: where the tensors shall live; None leaves tensors where they are.
        dtype: a floating dtype; None means ``torch.get_default_dtype()``.
        names: what messages call the arrays; ``("x", "y")`` unless told.

    Raises:
        DataError: a column that holds no numbers, a value that is not finite, no rows, unequal lengths. Columns are
            named as pandas names them; rows count from 0.
        OptionError: ``dtype`` is not a floating dtype.

    >>> x, y = as_tensors(([[0, 1], [1, 0]], [3, 4]))
    >>> x.dtype, y.dtype
    (torch.float32, torch.int64)
    """
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise OptionError(f"dtype must be a floating dtype, not {dtype}; labels stay int64 by themselves")
    arrays = several(data)
    labels = array_names(len(arrays), names)
    _check_order(arrays, labels)
    tensors = tuple(_tensor(array, label, dtype, device) for array, label in zip(arrays, labels, strict=False))
    check_lengths(tensors, labels)
    return tensors


def as_given(data: Sequence[Any]) -> tuple[Tensor, ...]:
    """The arguments of a call as `as_tensors`, in the floating type that their tensors have; () of none.

    >>> as_given([torch.zeros(3, dtype=torch.float64)])[0].dtype, len(as_given([(torch.zeros(3), torch.ones(3))]))
    (torch.float64, 2)
    """
    items = data[0] if len(data) == 1 and isinstance(data[0], tuple | list) else data
    dtype = next((d.dtype for d in items if isinstance(d, Tensor) and d.is_floating_point()), None)
    return as_tensors(items[0] if len(items) == 1 else tuple(items), dtype=dtype) if len(items) else ()


def _check_order(arrays: Sequence[Any], labels: Sequence[str]) -> None:
    """pandas aligns by index, arrays by position: two frames of the same rows in another order would be mixed up."""
    held = [(n, a.index) for n, a in zip(labels, arrays, strict=False) if isinstance(a, pd.DataFrame | pd.Series)]
    for name, index in held[1:]:
        first, other = held[0][0], held[0][1]
        if len(index) == len(other) and not index.equals(other) and index.is_unique and other.isin(index).all():
            row = next(i for i, (a, b) in enumerate(zip(index, other, strict=True)) if a != b)
            raise DataError(
                f"{first} and {name} hold the same rows in another order: row {row} has the index {other[row]} in "
                f"{first} and {index[row]} in {name}; align them by {name}.loc[{first}.index], or, if the order "
                "is right, give both .reset_index(drop=True)"
            )


def array_names(count: int, names: Sequence[str] | None = None) -> list[str]:
    """What messages call the arrays of one data set: x, y, array 2, ..."""
    labels = [*(names or ("x", "y")[:count])]
    return labels + [f"array {i}" for i in range(len(labels), count)]


def check_lengths(arrays: Sequence[Sized], labels: Sequence[str]) -> None:
    """Refuse arrays of different lengths by a DataError."""
    lengths = [len(a) for a in arrays]
    if len(set(lengths)) > 1:
        told = ", ".join(f"{label} has {n} rows" for label, n in zip(labels, lengths, strict=False))
        raise DataError(f"{told}; row n of each array must be the same data point")


def several(data: Any) -> list[Any]:
    """A tuple is several arrays; a list is several only where it holds arrays, for [1, 2] is one array of numbers."""
    if isinstance(data, tuple | list) and len(data) and not all(isinstance(a, Number) for a in data):
        if isinstance(data, tuple) or any(isinstance(a, _ARRAYS) for a in data):
            return list(data)
    return [data]


def _tensor(value: Any, name: str, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    columns = [str(c) for c in value.columns] if isinstance(value, pd.DataFrame) else None
    if isinstance(value, pd.Series) and value.name is not None:
        name = f"{name} (column {str(value.name)!r})"
    if isinstance(value, pd.DataFrame | pd.Series):
        value = _from_pandas(value, name)
    if isinstance(value, Tensor):
        raw = value.detach()
        if raw.is_meta:
            raise DataError(f"{name} is on the meta device, which holds no values; give a tensor that has some")
        if raw.layout != torch.strided:
            raise DataError(f"{name} is a sparse tensor ({raw.layout}); give {name}.to_dense()")
        if raw.is_complex():
            raise DataError(f"{name} holds complex numbers; give real and imaginary part as two columns")
    else:
        raw = _from_numpy(value, name, dtype)
    if raw.dim() == 0:
        raise DataError(f"{name} is a single number; expected one row for each data point")
    if raw.numel() == 0:
        raise DataError(f"{name} is empty: its shape is {tuple(raw.shape)}; give one row or more, and one column")
    label = raw.dim() == 1 and not raw.is_floating_point()
    result = raw.to(device=device, dtype=torch.int64 if label else dtype)
    if not label and not torch.isfinite(result).all():
        refuse_nonfinite(raw, name, columns)
        refuse_nonfinite(result, name, columns, f"too large for {dtype}")
    return result


def _from_pandas(value: pd.DataFrame | pd.Series, name: str) -> np.ndarray:
    frame = isinstance(value, pd.DataFrame)
    if value.size == 0:
        raise DataError(f"{name} is empty: its shape is {value.shape}")
    for position, (label, column) in enumerate(value.items() if frame else [("", value)]):
        if getattr(column.dtype, "kind", "O") not in "biuf":
            where = f"column {str(label)!r} ({position}) of {name}" if frame else name
            row = next((i for i, item in enumerate(column) if not isinstance(item, Number)), None)
            cure = "encode it or drop it" if row is not None else "convert it by .astype(float)"
            raise DataError(
                f"{where} holds {column.dtype}, not numbers (row {row or 0}: {column.iloc[row or 0]!r}); {cure}"
            )
    if not frame and value.dtype.kind in "biu" and not value.isna().any():
        return value.to_numpy(dtype=np.int64)
    return value.to_numpy(dtype=np.float64, na_value=np.nan)


def _from_numpy(value: Any, name: str, dtype: torch.dtype) -> Tensor:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} is no array: its rows differ in length, or it holds no numbers ({error})") from None
    if array.dtype.kind not in "biuf":
        kind = f"a {type(value).__name__}" if array.dtype.kind == "O" else f"{array.dtype}"
        cure = "give a tensor, numpy array or pandas frame"
        if array.dtype.kind in "US":
            cure = "class names become numbers by np.unique(y, return_inverse=True)[1]"
        raise DataError(f"{name} is {kind} and not an array of numbers; {cure}")
    # a copy: writable, native and contiguous
    return torch.from_numpy(np.array(array, dtype=numpy_target(array, dtype), order="C"))


def numpy_target(array: np.ndarray, dtype: torch.dtype) -> type:
    """The numpy type by which an array of numbers becomes a tensor of `dtype`, or int64 labels."""
    if array.ndim == 1 and array.dtype.kind in "biu":
        return np.int64
    return np.float64 if dtype == torch.float64 or array.dtype.itemsize > 4 else np.float32


def refuse_nonfinite(
    t: Tensor, name: str, columns: list[str] | None = None, what: str | None = None, numbers: np.ndarray | None = None
) -> None:
    """Raise a DataError that names the first column and the rows of values that are not finite.

    `numbers` are the row numbers where `t` holds some rows of a longer array.
    """
    for kind, bad in (("NaN", torch.isnan(t)), ("inf", torch.isinf(t))):
        count = int(bad.sum())
        if not count:
            continue
        where, others = name, 0
        if t.dim() == 2:
            in_column = bad.sum(0)
            first = int(in_column.nonzero()[0])
            others, count, bad = int((in_column > 0).sum()) - 1, int(in_column[first]), bad[:, first]
            where = f"column {columns[first]!r} ({first}) of {name}" if columns else f"column {first} of {name}"
        also = f", and so have {others} more columns" if others > 1 else ", and so has 1 more column" * others
        cure = "rescale it" if what else "drop or impute it"
        noun = f"value{'s' * (count > 1)} {what}" if what else kind
        raise DataError(f"{where} has {count} {noun} ({_rows(bad, numbers)}){also}; {cure}")


def _rows(bad: Tensor, numbers: np.ndarray | None = None) -> str:
    index = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist() if bad.dim() else []
    if numbers is not None:
        index = sorted(numbers[index].tolist())
    shown = ", ".join(map(str, index[:5])) + (", ..." if len(index) > 5 else "")
    return f"row{'s' * (len(index) > 1)} {shown}" if index else "no rows"


def check_batch_size(n: int, batch_size: int | None) -> int:
    """The batch size that will be used for n rows; None means all rows at once.

    Raises:
        DataError: there are no rows, or fewer than one batch holds (training would be zero steps).
        OptionError: ``batch_size`` is not a positive whole number.

    >>> check_batch_size(100, 32), check_batch_size(100, None)
    (32, 100)
    """
    if n < 1:
        raise DataError("the data has no rows")
    if batch_size is None:
        return n
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise OptionError(f"batch_size must be a whole number >= 1, or None for all rows; got {batch_size!r}")
    if batch_size > n:
        raise DataError(f"batch_size={batch_size} is larger than the data ({n} rows); use at most {n}, or None")
    return batch_size


def split(
    tensors: Sequence[Tensor], fraction: float, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Two random parts (train, valid), the second with ``fraction`` of the rows, at least one row each.

    >>> train, valid = split((torch.zeros(10, 2), torch.zeros(10)), 0.2, torch.Generator().manual_seed(0))
    >>> len(train[0]), len(valid[1])
    (8, 2)
    """
    train, valid = split_rows(len(tensors[0]), fraction, generator)
    return tuple(t[train.to(t.device)] for t in tensors), tuple(t[valid.to(t.device)] for t in tensors)


def split_rows(n: int, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The row numbers of the two parts that `split` makes of n rows; DataError where n < 2.

    >>> [len(part) for part in split_rows(10, 0.2, torch.Generator().manual_seed(0))]
    [8, 2]
    """
    if not 0.0 < fraction < 1.0:
        raise OptionError(f"fraction must lie between 0 and 1, got {fraction}")
    if n < 2:
        raise DataError(f"{n} rows cannot be split in two parts")
    held_out = min(max(round(fraction * n), 1), n - 1)
    order = torch.randperm(n, generator=generator, device=generator.device)
    return order[:-held_out], order[-held_out:]


def batches(
    n: int, batch_size: int | None, generator: torch.Generator | None = None, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """One epoch of index tensors that hold each of 0 .. n-1 once, shuffled by their own generator.

    A smaller last batch is kept, but one of a single row joins the batch before it, because batch normalisation
    cannot train on one row: that batch then has ``batch_size + 1`` rows. Without a generator rows keep their order.
    The permutation is drawn when the function is called, not when the first batch is asked for.

    >>> [len(index) for index in batches(9, 4, torch.Generator().manual_seed(0))]
    [4, 5]
    """
    size = check_batch_size(n, batch_size)
    if generator is None:
        order = torch.arange(n)
    else:
        order = torch.randperm(n, generator=generator, device=generator.device)
    order = order.to(device)
    starts = list(range(0, n, size))
    if size > 1 and len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return iter([order[a:b] for a, b in zip(starts, [*starts[1:], n], strict=True)])


def transformed(chunk: tuple[Tensor, ...], transform: Callable[..., Any]) -> tuple[Tensor, ...]:
    """What a transform makes of some rows.

    Raises:
        OptionError: it makes no tuple of tensors with one row for each of the chunk's.
    """
    made = transform(chunk, torch.Generator(chunk[0].device).manual_seed(0))
    tensors = isinstance(made, tuple | list) and len(made) > 0 and all(isinstance(t, Tensor) and t.dim() for t in made)
    lengths = [len(t) for t in made] if tensors else []
    if set(lengths) != {len(chunk[0])}:
        told = f"arrays of {lengths} rows" if tensors else f"a {type(made).__name__}"
        raise OptionError(
            f"transform makes {told} of {len(chunk[0])} rows, expected (batch, generator) -> a tuple of tensors with "
            "as many rows, such as lambda batch, generator: (torch.bernoulli(batch[0], generator=generator),)"
        )
    return tuple(made)

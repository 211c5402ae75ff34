"""Where a training's batches come from: rows in memory, memory-mapped files larger than memory, a DataLoader."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .data import (
    array_names,
    as_tensors,
    batches,
    check_batch_size,
    check_lengths,
    several,
    split,
    split_rows,
    transformed,
)
from .errors import DataError, OptionError
from .mapped import MappedArray
from .programs import Program
from .sites import DATA_PLATE, latents
from .threads import one_thread

Batch = tuple[Tensor, ...]
Transform = Callable[[Batch, torch.Generator], Batch]
State = dict[str, Tensor]
Item = TypeVar("Item")
Made = TypeVar("Made")

HELD_OUT = ("x of validation", "y of validation")
ALONE = 2**20
"""Numbers of a batch that one thread takes in less than a millisecond."""
PATIENCE = 2.0
"""Seconds to wait for a reading thread at the end: a read that hangs (a network drive) must not hang Ctrl-C too."""


class Memory:
    """Rows in memory, on the device where they are trained on: a batch is an index, not a loader's work.

    Args:
        tensors: arrays with rows first, of one length.
        batch_size: rows in a step; None for all.
        seed: of the data order and of the transform's noise.
        transform: `(batch, generator) -> batch`, applied to every batch.
        own: `(N_k,)`, the rows of `tensors` that this source may use (a replica's split of shared data), None for all.
            The row numbers handed out count within them, 0 .. N_k-1.

    Raises:
        OptionError: `own` holds no row numbers of `tensors`.

    >>> source = Memory((torch.arange(6.0),), 2, seed=0, transform=None, own=torch.tensor([1, 3, 5, 0]))
    >>> sorted(torch.cat([batch[0] for batch, rows in source.epoch()]).tolist())
    [0.0, 1.0, 3.0, 5.0]
    """

    def __init__(
        self,
        tensors: Sequence[Any],
        batch_size: int | None,
        seed: int,
        transform: Transform | None,
        own: Tensor | None = None,
    ):
        self.tensors: tuple[Any, ...] = tuple(tensors)
        self.transform = transform
        self.device = tensors[0].device
        self.own = None if own is None else checked_rows(own, len(tensors[0])).to(self.device)
        self.rows = len(tensors[0]) if own is None else len(own)
        self.batch_size = check_batch_size(self.rows, batch_size)
        order, noise = (np.random.SeedSequence([seed, use]).generate_state(1)[0] for use in (1, 2))
        self.shuffle = torch.Generator().manual_seed(int(order))
        self.noise = torch.Generator(device=self.device).manual_seed(int(noise))
        self.steps = len(list(batches(self.rows, self.batch_size)))

    @property
    def whole(self) -> bool:
        """A step takes all rows."""
        return self.batch_size == self.rows

    def sizes(self, model: Program) -> dict[str, int]:
        if self.whole and DATA_PLATE not in latents(model, *self.first()).plates:
            return {}  # all rows in each step: nothing to scale, whatever the model calls its plates
        return {DATA_PLATE: self.rows}

    def first(self) -> Batch:
        rows = slice(self.batch_size) if self.own is None else self.own[: self.batch_size]
        batch = tuple(t[rows] for t in self.tensors)
        return batch if self.transform is None else transformed(batch, self.transform)

    def position(self) -> State:
        """Where the data order stands: taken before an epoch, it gives that epoch again."""
        return {"order": self.shuffle.get_state()}

    def go_to(self, position: State) -> None:
        """Set the data order to what `position` gave."""
        self.shuffle.set_state(position["order"])

    def state(self) -> State:
        """The random streams of the data order and of `transform`, now."""
        return {"order": self.shuffle.get_state(), "noise": self.noise.get_state()}

    def restore(self, state: State) -> None:
        """Set the random streams to what `state` gave."""
        self.shuffle.set_state(state["order"])
        self.noise.set_state(state["noise"])

    def order(self) -> list[Tensor]:
        """The index tensors of the next epoch's batches; each call is one epoch of the data order."""
        return list(batches(self.rows, self.batch_size, None if self.whole else self.shuffle, self.device))

    def epoch(self, skip: int = 0, then: Callable[[], Any] = lambda: None) -> Iterator[tuple[Batch, Tensor | None]]:
        """The batches of the next epoch, each with the numbers of its rows.

        Args:
            skip: batches of it that were trained on before.
            then: called when they have been passed over: it sets the random streams to where they stood.
        """
        order = self.order()[skip:]
        then()
        for index in order:
            batch = self._all if self.whole else tuple(taken(t, self.numbers(index)) for t in self.tensors)
            yield (batch if self.transform is None else self.transform(batch, self.noise)), index

    def numbers(self, index: Tensor) -> Tensor:
        """The rows of `tensors` behind this source's own row numbers."""
        return index if self.own is None else self.own[index]

    def all_rows(self) -> tuple[Any, ...]:
        """The arrays to be checked before training: the rows of this source."""
        return self.tensors if self.own is None else tuple(t[self.own] for t in self.tensors)

    def everything(self, seed: int) -> Batch:
        """All rows of this source in memory, transformed once: what a guide's `finish` is given."""
        rows = slice(None) if self.own is None else self.own
        batch = tuple(t[rows] for t in self.tensors)
        if self.transform is None:
            return batch
        return self.transform(batch, torch.Generator(self.device).manual_seed(seed))

    @cached_property
    def _all(self) -> Batch:
        return self.all_rows()


class Mapped(Memory):
    """Rows of memory-mapped files that are larger than memory: the next two batches are read while one is trained on.

    Arguments, data order and random streams are those of `Memory`, so that a fit is the same from either. Arrays in
    memory may stand beside mapped ones. `everything` reads all rows into memory: guides with a `finish` need them.
    """

    def all_rows(self) -> tuple[Any, ...]:
        """The files as they are, held-out rows among them: to gather this source's own rows would be to load them."""
        return self.tensors

    def epoch(self, skip: int = 0, then: Callable[[], Any] = lambda: None) -> Iterator[tuple[Batch, Tensor | None]]:
        """The batches of the next epoch; only files are touched in the thread, the device and `transform` are not."""
        mapped = [t for t in self.tensors if isinstance(t, MappedArray)]
        for t in mapped:
            t.check_file()
        order = self.order()[skip:]
        then()
        ready = ahead(
            lambda rows: [t.read(rows) for t in mapped], [self.numbers(index).cpu().numpy() for index in order]
        )
        try:
            for index, pieces in zip(order, ready, strict=True):
                files, rows = iter(pieces), self.numbers(index)
                batch = tuple(
                    moved(next(files), t.device) if isinstance(t, MappedArray) else t[rows] for t in self.tensors
                )
                yield (batch if self.transform is None else self.transform(batch, self.noise)), index
        finally:
            ready.close()
            for t in mapped:
                t.release()


class Loaded:
    """Rows from a torch DataLoader.

    A loader with workers reads ahead by itself. One without them is left alone on purpose: a thread would draw the
    random numbers of its sampler and transforms between those of the steps, in no order that a seed could repeat.
    """

    def __init__(self, loader: DataLoader[Any], device: Any, dtype: Any):
        self.loader, self.device, self.dtype = loader, device, dtype
        self.each: Callable[[Batch], None] | None = None  # a check of every batch
        self.rows = len(loader.dataset)  # type: ignore[arg-type]
        self.steps = len(loader)
        self.batch_size = loader.batch_size or self.rows
        if self.steps == 0:
            raise DataError(
                f"the DataLoader gives 0 batches ({self.rows} rows, batch_size {self.batch_size}): drop_last?"
            )

    def sizes(self, model: Program) -> dict[str, int]:
        return {DATA_PLATE: self.rows}

    def _generators(self) -> dict[str, torch.Generator]:
        """The loader's own random streams; without them it draws from torch's."""
        sampler = getattr(self.loader, "sampler", None)
        inner = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        found = {"loader": self.loader, "sampler": sampler, "inner": inner}
        held = {name: getattr(place, "generator", None) for name, place in found.items()}
        return {name: one for name, one in held.items() if isinstance(one, torch.Generator)}

    def position(self) -> State:
        """Where the data order stands, as far as torch's generators decide it."""
        return {"torch": torch.get_rng_state(), **{name: g.get_state() for name, g in self._generators().items()}}

    def go_to(self, position: State) -> None:
        torch.set_rng_state(position["torch"])
        for name, generator in self._generators().items():
            generator.set_state(position[name])

    def state(self) -> State:
        return {name: g.get_state() for name, g in self._generators().items()}

    def restore(self, state: State) -> None:
        for name, generator in self._generators().items():
            generator.set_state(state[name])

    def epoch(self, skip: int = 0, then: Callable[[], Any] = lambda: None) -> Iterator[tuple[Batch, Tensor | None]]:
        """The batches of one pass of the loader; those to be skipped are loaded, which moves its random streams on."""
        left = iter(self.loader)
        for _ in range(skip):
            next(left)
        then()
        for item in left:
            # converted and checked where the loader left it: a check on the device would wait for the step before
            batch = as_tensors(tuple(item) if isinstance(item, (list, tuple)) else item, dtype=self.dtype)
            moved_batch = tuple(moved(t, self.device) for t in batch)
            if self.each is not None:
                self.each(moved_batch)
            yield moved_batch, None

    def first(self) -> Batch:
        """One batch, to look at."""
        return next(iter(self.epoch()))[0]

    def everything(self, seed: int) -> Batch:
        """All rows that one pass of the loader gives, in memory: what a guide's `finish` is given."""
        return tuple(torch.cat(parts) for parts in zip(*(batch for batch, _ in self.epoch()), strict=True))


def taken(t: Tensor, rows: Tensor) -> Tensor:
    """`t[rows]`; for a small batch without torch's other threads, which would spin through the step that follows.

    >>> taken(torch.arange(6.0), torch.tensor([4, 1]))
    tensor([4., 1.])
    """
    if len(rows) * t[0].numel() > ALONE:
        return t.index_select(0, rows)
    with one_thread():
        return t.index_select(0, rows)


def moved(t: Tensor, device: torch.device | str | None) -> Tensor:
    """A tensor on a device; towards a GPU by a copy that its stream makes while this thread goes on.

    The page-locked copy is made here and not in a reading thread, where it would break a CUDA graph's capture.
    """
    if device is None or torch.device(device).type != "cuda" or t.device.type != "cpu":
        return t.to(device=device)
    return (t if t.is_pinned() else t.pin_memory()).to(device=device, non_blocking=True)


def ahead(make: Callable[[Item], Made], items: Sequence[Item], depth: int = 2) -> Generator[Made, None, None]:
    """`make(item)` for each item in order, made in a thread by up to `depth` items ahead.

    What `make` raises is raised here, in its turn. When the iterator is closed, the thread ends after the item that it
    is at.

    >>> list(ahead(str, [1, 2, 3]))
    ['1', '2', '3']
    """
    made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        for item in items:
            room.acquire()
            if stop.is_set():
                return
            try:
                made.put((make(item), None))
            except BaseException as error:
                made.put((None, error))
                return

    thread = threading.Thread(target=work, name="dgm-feeding", daemon=True)
    thread.start()
    try:
        for _ in items:
            value, error = made.get()
            if error is not None:
                raise error
            room.release()
            yield value
    finally:
        stop.set()
        room.release()
        thread.join(timeout=PATIENCE)


def checked_rows(own: Tensor, n: int) -> Tensor:
    if own.dtype != torch.int64 or own.dim() != 1 or not len(own) or int(own.min()) < 0 or int(own.max()) >= n:
        raise OptionError(
            f"own is {own.dtype} of shape {tuple(own.shape)}, expected one or more int64 row numbers from 0 to {n - 1}"
        )
    return own


def _sources(
    data: Sequence[Any],
    validation: Any,
    batch_size: int | None,
    seed: int,
    transform: Transform | None,
    device: Any,
    dtype: Any,
) -> tuple[Memory | Loaded, Batch | None]:
    if not data:
        raise DataError("no data: fit(model, guide, x, ...) takes it after the guide")
    if len(data) == 1 and isinstance(data[0], DataLoader):
        if batch_size is not None or transform is not None:
            raise OptionError("batch_size and transform belong to arrays: the DataLoader has its own")
        if isinstance(validation, float):
            raise OptionError("a DataLoader cannot be split: give the held-out arrays as validation")
        held_out = (
            as_tensors(validation, device=device, dtype=dtype, names=HELD_OUT) if validation is not None else None
        )
        return Loaded(data[0], device, dtype), held_out
    arrays = several(data[0] if len(data) == 1 else tuple(data))
    source: Memory
    held_out = None
    if batch_size is not None and any(isinstance(a, np.memmap) for a in arrays):
        source, held_out = _mapped(arrays, validation, batch_size, seed, transform, device, dtype)
    else:
        _check_fits(arrays, dtype)
        tensors = as_tensors(tuple(arrays), device=device, dtype=dtype)
        if isinstance(validation, float):
            tensors, held_out = split(tensors, validation, torch.Generator().manual_seed(seed))
        source = Memory(tensors, batch_size, seed, transform)
    if validation is not None and held_out is None:
        held_out = as_tensors(validation, device=device, dtype=dtype, names=HELD_OUT)
    if held_out is not None and transform is not None and isinstance(validation, float):
        held_out = transform(held_out, torch.Generator(held_out[0].device).manual_seed(seed))
    return source, held_out


def _mapped(
    arrays: Sequence[Any],
    validation: Any,
    batch_size: int,
    seed: int,
    transform: Transform | None,
    device: Any,
    dtype: Any,
) -> tuple[Mapped, Batch | None]:
    """A `Mapped` source and the rows that it holds out, which are read into memory."""
    names = array_names(len(arrays))
    tensors: list[Any] = [
        MappedArray(a, name, dtype=dtype, device=device)
        if isinstance(a, np.memmap)
        else as_tensors((a,), device=device, dtype=dtype, names=[name])[0]
        for a, name in zip(arrays, names, strict=True)
    ]
    check_lengths(tensors, names)
    own, held_out = None, None
    if isinstance(validation, float):
        own, valid = split_rows(len(tensors[0]), validation, torch.Generator().manual_seed(seed))
        held_out = tuple(t[valid.to(t.device)] for t in tensors)
    return Mapped(tensors, batch_size, seed, transform, own), held_out


def _check_fits(arrays: Sequence[Any], dtype: torch.dtype | None) -> None:
    """A step over all rows holds them all: say so where a mapped file is too large, before the machine does."""
    width = (torch.get_default_dtype() if dtype is None else dtype).itemsize
    size = sum(a.size * width for a in arrays if isinstance(a, np.memmap))
    if size and hasattr(os, "sysconf") and size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        raise OptionError(
            f"without batch_size a step holds all rows, {size / 2**30:.3g} GiB, more than half of this machine's "
            "memory: give batch_size"
        )

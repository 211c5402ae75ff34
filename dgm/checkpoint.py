"""Checkpoints: the state of a training on disk, whole or not at all, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from . import __version__
from .errors import DataError, OptionError
from .lock import locked
from .plain import flatten, unflatten
from .store import writable, write_whole

__all__ = ["Checkpoints", "Saved"]

log = logging.getLogger("dgm")

FORMAT = 1
NAME = re.compile(r"step-(\d{9})\.json")
STALE = re.compile(r"\.step-\d{9}\.(json|safetensors)\.\d+\.part")
SHARE = 0.01
"""Of a training's time, what saving may take: the next one waits a hundred times as long as the last one took."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read: the step, the state as it was given, and the file."""

    step: int
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """A folder with the last states of one training.

    A state is two files, `step-N.safetensors` with all tensors and `step-N.json` with everything else and the size
    and SHA-256 of both. Each is written to a temporary file, synced and renamed, the JSON last: whoever is killed in
    between leaves the state before. Nothing in them is ever run.

    Args:
        folder: where to; made if need be. One training each: a second one at the same time is refused.
        seconds: time between two states; never so often that saving takes more than 1 % of the time.
        steps: save every so many steps instead.
        keep: how many states are kept, at least 2, so that one which is damaged does not cost the run.

    Raises:
        OptionError: a number out of its domain; the folder cannot be written to, or is in use.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kept = Checkpoints(folder)
    ...     for step in (10, 20, 30):
    ...         _ = kept.save(step, {"lr": 0.1})
    ...     kept.latest().step, len(kept.steps_kept())
    (30, 2)
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, seconds: float = 30.0, steps: int | None = None, keep: int = 2
    ):
        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 2:
            raise OptionError(f"keep is {keep!r}, expected a whole number of at least 2: the last may be damaged")
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise OptionError(f"steps is {steps!r}, expected a number of steps >= 1 between two checkpoints, or None")
        if not 0 <= seconds < math.inf:
            raise OptionError(f"seconds is {seconds!r}, expected a time >= 0 between two checkpoints")
        self.folder, self.seconds, self.every, self.keep = Path(folder), float(seconds), steps, keep
        self._next = self._last = 0.0
        self._failed = False

    def __repr__(self) -> str:
        often = f"every {self.every} steps" if self.every is not None else f"every {self.seconds:g} s"
        return f"Checkpoints({os.fspath(self.folder)!r}, {often}, keep {self.keep})"

    def inside(self, name: str) -> Checkpoints:
        """The same for a part of a training, in a folder of its own."""
        return Checkpoints(self.folder / name, seconds=self.seconds, steps=self.every, keep=self.keep)

    def outside(self) -> Checkpoints:
        """The same for the training that this folder is a part of."""
        return Checkpoints(self.folder.parent, seconds=self.seconds, steps=self.every, keep=self.keep)

    def clear(self) -> None:
        """Forget all states."""
        for path in self.folder.glob("step-*") if self.folder.is_dir() else ():
            path.unlink(missing_ok=True)

    @contextmanager
    def open(self) -> Iterator[Checkpoints]:
        """Hold the folder for one training, and clear what a killed one left half written."""
        writable(self.folder)
        with locked(self.folder):
            for path in self.folder.iterdir():
                if STALE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            self._clean()
            self._next = time.monotonic() + self.seconds
            yield self

    # --- writing ---------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Whether a state should be saved after this step."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() >= self._next

    def save(self, step: int, state: Mapping[str, Any]) -> Path | None:
        """Write the state after a step; None where the disk refused, which is said once and is not the end.

        Raises:
            OptionError: the state holds something that is no plain value.
        """
        start = time.monotonic()
        plain, tensors = flatten(dict(state))
        payload = save(tensors)
        data, path = self._paths(step)
        content = {
            "format": FORMAT,
            "dgm": __version__,
            "step": step,
            "tensors": {"file": data.name, "bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()},
            "state": plain,
        }
        content["sha256"] = _digest(content)
        lines = (f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in content.items())
        text = "{\n" + ",\n".join(lines) + "\n}"
        try:
            write_whole(data, lambda part: part.write_bytes(payload))
            write_whole(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))
        except OSError as error:
            if not self._failed:
                log.warning(
                    "step %d: no checkpoint, %s: %s; the last good one stays, training goes on and tries again",
                    step,
                    self.folder,
                    error.strerror or error,
                )
            self._failed = True
            self._wait(start)
            return None
        self._failed = False
        self._clean()
        self._wait(start)
        return path

    def _wait(self, start: float) -> None:
        now = time.monotonic()
        self._last = now - start
        self._next = now + max(self.seconds, self._last / SHARE)

    def _paths(self, step: int) -> tuple[Path, Path]:
        return self.folder / f"step-{step:09d}.safetensors", self.folder / f"step-{step:09d}.json"

    def _clean(self) -> None:
        """Keep the newest states only; tensors without their JSON are of a save that was cut short."""
        kept = self.steps_kept()[-self.keep :]
        for path in self.folder.glob("step-*"):
            found = re.fullmatch(r"step-(\d{9})\.(json|safetensors)", path.name)
            if found and int(found[1]) not in kept:
                path.unlink(missing_ok=True)

    # --- reading ---------------------------------------------------------------------------------------------------

    def steps_kept(self) -> list[int]:
        """The steps after which a state was saved, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := NAME.fullmatch(path.name)))

    def latest(self) -> Saved | None:
        """The newest state that is whole; None where there is none at all.

        A damaged one is passed over, and a line in the log says why and which older one is taken.

        Raises:
            DataError: there are states, and all of them are damaged; or they are of a newer dgm.
        """
        told: list[str] = []
        for step in reversed(self.steps_kept()):
            try:
                saved = self.read(step)
            except DataError as error:
                told.append(str(error))
                continue
            for line in told:
                log.warning("%s; going back to step %d", line, step)
            return saved
        if told:
            raise DataError(
                f"no checkpoint in {os.fspath(self.folder)!r} can be read: {'; '.join(told)}. To begin anew give "
                "another folder, or remove this one"
            )
        return None

    def read(self, step: int) -> Saved:
        """The state after a step.

        Raises:
            DataError: a file is missing, empty, cut short, damaged, not ours, or of a newer dgm.
        """
        data, path = self._paths(step)
        content = _read_json(path)
        payload = _read_bytes(data, content["tensors"])
        try:
            return Saved(step, unflatten(content["state"], load(payload)), path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{data} is no safetensors file of this checkpoint: {error}") from error


def _digest(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not text:
        raise DataError(f"{path} is empty")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged or cut short: {error}") from error
    wanted = ("format", "dgm", "step", "tensors", "state", "sha256")
    if not isinstance(content, dict) or any(key not in content for key in wanted) or type(content["format"]) is not int:
        raise DataError(f"{path} is no checkpoint of dgm")
    if content["format"] > FORMAT:
        raise DataError(f"{path} was written by dgm {content['dgm']}, this is {__version__}: use that version or newer")
    if content["sha256"] != _digest(content):
        raise DataError(f"{path} is damaged: its content does not give the SHA-256 that stands in it")
    return content


def _read_bytes(path: Path, told: Mapping[str, Any]) -> bytes:
    if told.get("file") != path.name:  # a name in a file leads nowhere else
        raise DataError(f"{path.with_suffix('.json')} names the tensors {told.get('file')!r}, expected {path.name!r}")
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is missing or cannot be read: {error.strerror or error}") from error
    if len(payload) != told["bytes"]:
        state = "empty" if not payload else f"{len(payload)} bytes long"
        raise DataError(f"{path} is {state}, expected {told['bytes']} bytes: it was cut short or replaced")
    if hashlib.sha256(payload).hexdigest() != told["sha256"]:
        raise DataError(f"{path} is damaged: its {len(payload)} bytes do not give the SHA-256 that was kept of them")
    return payload

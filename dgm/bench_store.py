"""Results of cells on disk: each is written whole when it is finished, with a checksum, and read with suspicion.

FOLDER/cells/KEY.json holds the row, what it cost and where it came from; KEY.safetensors beside it the arrays of that
row. The row depends on the cell alone, bit for bit; cost and provenance do not, and are kept apart from it.
FOLDER/attempts/KEY.N are empty files: one for each time that a job was begun and not ended well.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from . import store as files
from .bench_cells import canonical, plain, unplain
from .errors import DataError, DGMError, OptionError

__all__ = ["MOST_ATTEMPTS", "CannotWrite", "Record", "Store"]

MOST_ATTEMPTS = 3
log = logging.getLogger("dgm")


class CannotWrite(OptionError):
    """A result cannot be written; what is finished stays."""


@dataclass
class Record:
    """What is kept of a cell.

    row: its columns, "status" among them. cost: seconds. about: provenance. arrays: by column.
    """

    row: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return self.row.get("status") == "ok"


class Store:
    """A folder of results.

    damaged: keys of files that could not be read, which count as missing.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.cells, self.attempts = self.folder / "cells", self.folder / "attempts"
        self.damaged: list[str] = []

    def prepare(self) -> None:
        """Make the folders, and remove what a killed run left half written.

        Raises:
            CannotWrite: it cannot be.
        """
        try:
            for folder in (self.cells, self.attempts):
                files.writable(folder)
        except DGMError as error:
            raise CannotWrite(str(error)) from error
        for part in [*self.cells.glob(".*.part"), *self.folder.glob(".*.part")]:
            part.unlink(missing_ok=True)

    def keys(self) -> set[str]:
        """Keys of all results, of whatever version or protocol."""
        return {path.stem for path in self.cells.glob("*.json")}

    def read(self, key: str) -> Record | None:
        """A result; None where there is none, or a damaged one, which is told once."""
        path = self.cells / f"{key}.json"
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            checksum = content.pop("sha256")
            if checksum != _checksum(content):
                raise ValueError("its checksum is wrong")
            digests = content["arrays"]
            if digests and hashlib.sha256(self._arrays(key).read_bytes()).hexdigest() != digests["sha256"]:
                raise ValueError(f"{key}.safetensors is damaged")
            parts = {part: dict(unplain(content[part])) for part in ("row", "cost", "about")}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if key not in self.damaged:
                self.damaged.append(key)
                log.warning("%s is damaged (%s): it counts as missing and is computed again", path, _short(error))
            return None
        return Record(**parts)

    def arrays(self, key: str) -> dict[str, np.ndarray]:
        """The arrays of a result by column; empty where it has none."""
        from safetensors.numpy import load

        path = self._arrays(key)
        try:
            return dict(load(path.read_bytes())) if path.is_file() else {}
        except Exception as error:  # safetensors has an error of its own for each kind of damage
            raise DataError(f"{path} cannot be read: {_short(error)}; run the suite again") from error

    def write(self, key: str, record: Record) -> None:
        """Write a result: arrays first, so that a row that is there is whole.

        Raises:
            CannotWrite: a full disk, say. OptionError: a value that cannot be kept.
        """
        from safetensors.numpy import save

        content: dict[str, Any] = {
            part: plain(value, f"{part} of the result")
            for part, value in (("row", record.row), ("cost", record.cost), ("about", record.about))
        }
        data = save({k: np.ascontiguousarray(v) for k, v in record.arrays.items()}) if record.arrays else b""
        content["arrays"] = {"sha256": hashlib.sha256(data).hexdigest()} if data else {}
        content["sha256"] = _checksum(content)
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            if data:
                files.write_whole(self._arrays(key), lambda part: part.write_bytes(data))
            files.write_whole(self.cells / f"{key}.json", lambda part: part.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise CannotWrite(
                f"cannot write to {self.cells}: {error.strerror or error}; what is finished is safe: make room and run "
                "the same command again"
            ) from error
        with suppress(ValueError):
            self.damaged.remove(key)

    def discard(self, key: str) -> None:
        """Forget a result."""
        (self.cells / f"{key}.json").unlink(missing_ok=True)

    def _arrays(self, key: str) -> Path:
        return self.cells / f"{key}.safetensors"

    # ------------------------------------------------------------------------------------------------- attempts

    def tried(self, key: str) -> int:
        """How often a job was begun without ending well."""
        return len(list(self.attempts.glob(f"{key}.*")))

    def begin(self, key: str) -> None:
        """Count an attempt, before it can kill the process that counts."""
        number = self.tried(key) + 1
        with suppress(OSError):  # a full disk is told where a result is lost by it
            (self.attempts / f"{key}.{number}").touch()

    def forgive(self, key: str, all_: bool = False) -> None:
        """Take the last attempt back, or all."""
        marks = sorted(self.attempts.glob(f"{key}.*"), key=lambda p: int(p.suffix[1:]) if p.suffix[1:].isdigit() else 0)
        for mark in marks if all_ else marks[-1:]:
            mark.unlink(missing_ok=True)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def as_array(value: Any) -> np.ndarray | None:
    """An array of one axis or more, or None."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return value if isinstance(value, np.ndarray) and value.ndim else None

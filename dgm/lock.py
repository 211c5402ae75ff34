"""One process at a time in a folder: a lock that the kernel releases however its holder ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import OptionError

__all__ = ["LOCK", "locked"]

LOCK = ".dgm.lock"
"""The name of the lock's file; it says who holds it."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of some network drives
_BEYOND = 1 << 30  # Windows locks bytes for reading too: one behind the end leaves the text readable


@contextmanager
def locked(folder: str | os.PathLike[str], name: str = LOCK) -> Iterator[Path]:
    """Hold a folder for this thread alone; made if need be. A thread that holds it already goes on.

    The file `name` in the folder is locked by the kernel, so a holder that is killed leaves nothing that blocks the
    next; it is removed at the end. Where a file system has no locks, the file's existence is the lock, and one whose
    process on this machine is gone counts as free.

    Args:
        folder: what is to be held. name: of the lock's file, for a folder that is held for several purposes.

    Raises:
        OptionError: another process (named) or thread holds it, or the folder cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with locked(folder) as held, locked(folder):
    ...         inside = (held / LOCK).exists()
    ...     inside, (held / LOCK).exists()
    (True, False)
    """
    place = Path(folder)
    path = place / name
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, path = _acquired(path)
    except OSError as error:
        raise OptionError(f"cannot write to {place}: {error.strerror or error}; give another folder") from error
    if handle is None:
        if not _own(holder := _holder(path)):
            cure = "" if path.name == name else f" (if it has ended, remove {path})"
            raise OptionError(f"{place} is in use by {_told(holder)}: wait for its end, or give another folder{cure}")
        yield place
        return
    try:
        yield place
    finally:
        _released(path, handle)


def _acquired(path: Path) -> tuple[int | None, Path]:
    """A descriptor that holds the lock, None where another one does; and the file that says who does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if not _claimed(handle):
                os.close(handle)
                return None, path
            if _same_file(handle, path):
                _sign(handle)
                return handle, path
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            held = path.with_name(path.name + ".held")  # a name that nobody opens without creating it
            return _created(held), held
        os.close(handle)  # the last holder removed the file between our opening and our locking it


def _claimed(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _BEYOND, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except PermissionError:  # what Windows says
        if sys.platform == "win32":
            return False
        raise
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _created(path: Path) -> int | None:
    """The lock as the file's existence."""
    if _gone(_holder(path)):
        path.unlink(missing_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    _sign(handle)
    return handle


def _released(path: Path, handle: int) -> None:
    with suppress(OSError):  # the folder may be gone; Windows removes no open file
        path.unlink()
    os.close(handle)
    if sys.platform == "win32":
        with suppress(OSError):
            path.unlink()


# ------------------------------------------------------------------------------------------------- the holder


def _sign(handle: int) -> None:
    me = {"pid": os.getpid(), "host": socket.gethostname(), "thread": threading.get_ident()}
    text = json.dumps({**me, "command": " ".join(sys.argv)[:200]}).encode()
    os.lseek(handle, 0, os.SEEK_SET)
    os.truncate(handle, 0)
    os.write(handle, text)


def _holder(path: Path) -> dict[str, Any]:
    """What the holder wrote about itself; empty where that cannot be read."""
    try:
        content = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _own(holder: dict[str, Any]) -> bool:
    me = (os.getpid(), socket.gethostname(), threading.get_ident())
    return (holder.get("pid"), holder.get("host"), holder.get("thread")) == me


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid < 1 or holder.get("host") != socket.gethostname() or sys.platform == "win32":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _told(holder: dict[str, Any]) -> str:
    if not isinstance(holder.get("pid"), int):
        return "another process"
    command = "".join(c if c.isprintable() else "?" for c in str(holder.get("command", "")))
    if (holder["pid"], holder.get("host")) == (os.getpid(), socket.gethostname()):
        return "another thread of this process"
    return f"process {holder['pid']} on {holder.get('host')!s:.64}" + (f" ({command})" if command else "")

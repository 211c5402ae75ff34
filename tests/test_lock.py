"""One process at a time in a folder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dgm import lock
from dgm.errors import OptionError
from dgm.lock import LOCK, locked

HOLDER = """
import importlib.util, os, sys, time, types
sys.modules["dgm"] = types.ModuleType("dgm"); sys.modules["dgm"].__path__ = [sys.argv[2]]   # without torch
from dgm import lock
if "existence" in sys.argv:
    import errno
    def none(handle): raise OSError(errno.ENOLCK, "no locks")
    lock._claimed = none
with lock.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def held_by_another(folder: Path, *words: str) -> subprocess.Popen[str]:
    package = str(Path(lock.__file__).parent)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), package, *words], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    return other


def without_locks(handle: int) -> bool:
    raise OSError(errno.ENOLCK, "no locks here")


@pytest.mark.parametrize("words", [(), ("existence",)])
def test_the_other_process_is_named_and_a_killed_one_blocks_nobody(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words:
        monkeypatch.setattr(lock, "_claimed", without_locks)
    other = held_by_another(tmp_path, *words)
    try:
        with pytest.raises(OptionError, match=rf"in use by process {other.pid} on .*wait for"), locked(tmp_path):
            raise AssertionError("two hold it")
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        assert len(list(tmp_path.iterdir())) == 1  # it had no time to remove it
        with locked(tmp_path) as held:
            assert held == tmp_path
        assert list(tmp_path.iterdir()) == []
    finally:
        other.kill()
        other.wait()
        assert other.stdout is not None
        other.stdout.close()


@pytest.mark.parametrize("existence", [False, True])
def test_a_thread_goes_on_in_what_it_holds_and_another_waits(
    existence: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if existence:
        monkeypatch.setattr(lock, "_claimed", without_locks)
    told: list[str] = []

    def elsewhere() -> None:
        try:
            with locked(tmp_path):
                told.append("two hold it")
        except OptionError as error:
            told.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path):
            pass
        assert len(list(tmp_path.iterdir())) == 1  # the inner one released nothing
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with locked(tmp_path, name=".other.lock"):
            pass
    assert "another thread of this process" in told[0]
    with locked(tmp_path):
        pass


def test_an_error_inside_releases(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "new"):
        raise KeyError
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_that_was_never_signed_or_is_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "[]", "\0\0", '{"pid": "1; rm"}'):
        (tmp_path / LOCK).write_text(text)
        with locked(tmp_path):
            pass
    monkeypatch.setattr(lock, "_claimed", without_locks)
    (tmp_path / f"{LOCK}.held").write_text('{"pid": 1, "host": "elsewhere", "command": "\\u001b[2J"}')
    told = r"process 1 on elsewhere \(\?\[2J\).*if it has ended, remove .*held\)"
    with pytest.raises(OptionError, match=told), locked(tmp_path):
        pass


def test_a_lock_file_that_points_elsewhere_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OptionError, match="cannot write"), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(OptionError, match="cannot write to"), locked(tmp_path / "f"):
        pass

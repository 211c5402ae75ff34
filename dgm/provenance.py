"""Where a number came from: command, commit, versions, hardware, threads, date."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("dgm", "torch", "pyro-ppl", "zuko", "numpy", "pandas", "arviz-stats")


def provenance() -> dict[str, str]:
    """What a reader needs to make the same number again.

    >>> sorted(provenance())
    ['command', 'commit', 'date', 'hardware', 'threads', 'versions']
    """
    return {
        "command": _command(),
        "commit": _commit(),
        "versions": ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
        + f", Python {platform.python_version()}",
        "hardware": f"{_processor()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _command() -> str:
    if sys.argv and sys.argv[0].startswith("python -m "):  # `dgm.benchmarks` gives its suites their own words
        first = sys.argv[0].split()
    else:
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        if spec is not None and spec.name not in ("__main__", "pytest.__main__"):
            first = ["python", "-m", spec.name.removesuffix(".__main__")]
        else:
            first = [Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"]
    return shlex.join([*first, *map(_portable, sys.argv[1:])])


def _portable(word: str) -> str:
    """A word of a command without the folders of this machine: from here where it lies below, else its last name.

    >>> _portable("--out=/home/somebody/runs/first"), _portable("task=a/b"), _portable("0.1")
    ('--out=first', 'task=a/b', '0.1')
    """
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if not path.is_absolute():
        return word
    here = Path.cwd()
    return option + equals + (str(path.relative_to(here)) if path.is_relative_to(here) else path.name)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    """The commit of the checkout that is run, with a mark where it was changed; "release" outside of one."""
    here = Path(__file__).parent
    try:
        known = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, timeout=5
        )
        if known.returncode:
            return f"release {_version('dgm')}"
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return f"release {_version('dgm')}"
    return run.stdout.strip() or "no commit yet"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

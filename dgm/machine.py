"""The machine that dgm runs on: cores and threads, GPU, memory, compiler, folders."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Fact", "compiler", "machine", "places"]

LEAST = 2**30
"""Bytes of disk and memory below which a run is likely to fail."""


@dataclass(frozen=True)
class Fact:
    """One line: what it is about, what it is, and where something is wrong, what and how it is cured."""

    part: str
    name: str
    value: str
    problem: str = ""
    cure: str = ""


def _cores() -> tuple[int, float]:
    """Cores that this process may run on, and how many of them its control group lets it use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        limit = math.inf if quota == "max" else float(quota) / float(period)
    except (OSError, ValueError):
        limit = math.inf
    return allowed, limit


def machine(torch_: dict[str, Any]) -> Iterator[Fact]:
    """Cores, threads, GPU and memory; `torch_` is what `dgm.probes.torch_facts` says."""
    allowed, limit = _cores()
    usable = max(1, min(allowed, math.ceil(limit) if limit < math.inf else allowed))
    group = f", limited to {limit:g} by the control group" if limit < allowed else ""
    yield Fact("machine", "processor", f"{platform.machine()}, {allowed} of {os.cpu_count()} cores{group}")
    set_ = os.environ.get("OMP_NUM_THREADS")
    bad = set_ is not None and not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", set_)
    problem = "expected a whole number, at least 1" if bad else ""
    yield Fact(
        "machine", "OMP_NUM_THREADS", set_ or "not set", problem, f"export OMP_NUM_THREADS={usable}" if bad else ""
    )
    if "error" in torch_:
        return  # it stands among the versions
    threads = int(torch_["threads"])
    problem = f"{threads} threads on {usable} cores wait for each other" if threads > usable else ""
    yield Fact(
        "machine", "torch's threads", str(threads), problem, f"export OMP_NUM_THREADS={usable}" if problem else ""
    )
    gpus = torch_["gpus"]
    here = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    unused = here and not gpus
    problem = (
        ""
        if not unused
        else "a GPU's driver is here, and torch does not use it: "
        + (
            f"torch is built for CUDA {torch_['cuda']}, perhaps newer than the driver"
            if torch_["cuda"]
            else "a CPU build"
        )
    )
    cure = "pip install the build of torch for the driver's CUDA, or go on without" if unused else ""
    yield Fact("machine", "GPU", ", ".join(map(str, gpus)) or "none", problem, cure)
    memory = float(torch_["memory"])
    problem = "less than 1 GB is free" if memory < LEAST else ""
    yield Fact(
        "machine", "free memory", _size(memory), problem, "end other programs, or raise the limit" if problem else ""
    )


def compiler(compiled: str | None) -> Iterator[Fact]:
    """What compiles a step; `compiled` is what `dgm.probes.compiles` says, None where it was not asked."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    path = next((found for name in names if (found := shutil.which(name))), None)
    cure = "install g++ (apt install g++); until then steps run as graphs, --compile trace"
    problem = "" if path else f"no C++ compiler ({', '.join(names)}): steps cannot be compiled"
    yield Fact("compiler", "C++", _said(path) if path else "none", problem, cure if problem else "")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = not header.exists()
    problem = f"{header} is missing: torch's compiler needs it" if missing else ""
    yield Fact(
        "compiler",
        "Python's headers",
        "missing" if missing else "found",
        problem,
        "apt install python3-dev" if missing else "",
    )
    if compiled is None:
        yield Fact("compiler", "torch's compiler", "not tried (--thorough tries it)")
    else:
        problem = f"does not work: {compiled}" if compiled else ""
        yield Fact("compiler", "torch's compiler", "broken" if compiled else "works", problem, cure if problem else "")


def _said(path: str) -> str:
    """The first line that a compiler says of its version."""
    try:
        run = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=10)
        return run.stdout.partition("\n")[0].strip() or path
    except (OSError, subprocess.SubprocessError):
        return path


# --------------------------------------------------------------------------------------------------- places


def places() -> Iterator[Fact]:
    """Folders that are read and written, the room in them, and the coding of the output."""
    data = os.environ.get("DGM_DATA")
    if not data:
        yield Fact("places", "data (DGM_DATA)", "not set: named data sets are downloaded to the cache")
    else:
        missing = not Path(data).is_dir()
        problem = "there is no such folder" if missing else ""
        yield Fact(
            "places", "data (DGM_DATA)", data, problem, "make it, or export DGM_DATA=<folder>" if missing else ""
        )
    for name, folder in (("cache", _cache()), ("temporary files", tempfile.gettempdir()), ("here", os.getcwd())):
        if folder is None:
            continue
        near = next((f for f in (Path(folder), *Path(folder).parents) if f.is_dir()), Path("/"))
        problem, cure = "", ""
        try:
            with tempfile.TemporaryFile(dir=near):
                pass
            free = shutil.disk_usage(near).free
            if free < LEAST:
                problem, cure = f"{_size(free)} are free: results may not fit", "remove what is not needed"
            value = f"{folder}, {_size(free)} free"
        except OSError as error:
            problem, cure = f"cannot be written to: {error.strerror}", f"chmod u+w {near}, or free space there"
            value = str(folder)
        yield Fact("places", name, value, problem, cure)
    coding = (getattr(sys.stdout, "encoding", None) or "unknown").lower()
    narrow = coding.replace("-", "") != "utf8"
    yield Fact("places", "text", coding + (", ± is shown as ? (PYTHONUTF8=1 changes it)" if narrow else ""))


def _cache() -> str | None:
    try:
        import pooch

        return str(pooch.os_cache("dgm"))
    except Exception:  # it is among the versions, with its error
        return None


def _size(number: float) -> str:
    return f"{number / 2**30:.1f} GB" if number < math.inf else "unknown"

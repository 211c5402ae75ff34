"""Questions that are asked in another process, with a time limit: an import may fail, hang, crash or print."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["compiles", "import_errors", "plugin_errors", "torch_facts"]

_ANSWER = """
import json, os, sys
_out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a package prints is no answer
def answer(**content): print(json.dumps(content), file=_out, flush=True)
def first_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = "".join(c if c.isprintable() else "?" for c in lines[0])[:300] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
"""
_IMPORTS = """
import importlib
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except BaseException as error:
        answer(name=name, error=first_line(error))
    else:
        answer(name=name, error="")
"""
_TORCH = """
import torch
from dgm.memory import available
answer(
    threads=torch.get_num_threads(), cuda=torch.version.cuda, memory=available(torch.device("cpu")),
    gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
)
"""
_PLUGINS = """
from dgm.registry import broken
answer(broken=[(item.name, item.source, item.error) for item in broken()])
"""
_COMPILE = """
try:
    import torch
    x = torch.arange(8.0)
    def f(x): return (x.sin() * 2.0 + 1.0).sum()
    same = torch.allclose(torch.compile(f, backend="inductor")(x), f(x))
    answer(error="" if same else "compiled code gives other numbers")
except BaseException as error:
    answer(error=first_line(error))
"""


def _ask(code: str, words: Sequence[str] = (), limit: float = 60.0) -> tuple[list[dict[str, Any]], str]:
    """Answers of a process that runs `code`, and how it ended: empty where it ended well."""
    command = [sys.executable, "-P", "-c", _ANSWER + code, *words]  # -P: as `dgm` itself, without the current folder
    try:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit)
        said, end = run.stdout, _ended(run.returncode, run.stderr)
    except subprocess.TimeoutExpired as expired:
        said, end = expired.stdout or b"", f"took longer than {limit:g} s"
    except OSError as error:
        said, end = b"", f"no process can be started: {error.strerror}"
    return [json.loads(line) for line in said.decode("utf-8", "replace").splitlines() if line.endswith("}")], end


def _ended(code: int, stderr: bytes) -> str:
    if code < 0:
        return f"crashes the process (signal {-code})"
    if code == 0:
        return ""
    lines = stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {code}"]
    return "".join(c if c.isprintable() else "?" for c in lines[-1])[:300]


def import_errors(modules: Sequence[str], limit: float = 60.0) -> dict[str, str]:
    """What importing each module comes to, in one line; empty where it works.

    >>> import_errors(["json", "no_such_module_at_all"])
    {'json': '', 'no_such_module_at_all': "ModuleNotFoundError: No module named 'no_such_module_at_all'"}
    """
    found: dict[str, str] = {}
    left = list(modules)
    while left:
        answers, end = _ask(_IMPORTS, left, limit)
        found.update({answer["name"]: answer["error"] for answer in answers})
        left = left[len(answers) :]
        if left:  # the next one took the process with it; the others get a new one
            found[left.pop(0)] = end or "ends the process"
    return found


def torch_facts(limit: float = 60.0) -> dict[str, Any]:
    """Threads, GPUs, the CUDA that torch is built for, and free memory; only `error` where torch cannot be used."""
    answers, end = _ask(_TORCH, limit=limit)
    return answers[0] if answers else {"error": end or "no answer"}


def plugin_errors(limit: float = 60.0) -> list[tuple[str, str, str]]:
    """Models and guides that cannot be used: name, package and the first line of the error."""
    answers, end = _ask(_PLUGINS, limit=limit)
    if answers:
        return [(str(name), str(source), str(error)) for name, source, error in answers[0]["broken"]]
    return [("all", "dgm.models and dgm.guides", end or "no answer")]


def compiles(limit: float = 240.0) -> str:
    """Whether torch's compiler makes right code here: empty, or the first line of what is wrong."""
    answers, end = _ask(_COMPILE, limit=limit)
    return str(answers[0]["error"]) if answers else end or "no answer"

"""One measurement in a process of its own, so that threads are set before any pool exists: `speed` starts it.

python -m dgm.benchmarks.speed_worker JOB out.json, where JOB is JSON as in `speed.in_process`
"""

from __future__ import annotations

import gc
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

Train = Callable[[Any], float]


TABLE = (
    "pyro", "pyro, validation off", "pyro, same pair", "by hand", "by hand, compiled", "by hand, vmapped",
    "numpyro jit", "numpyro scan", "numpyro scan, optax", "dgm eager", "dgm trace", "dgm inductor",
)  # fmt: skip
"""Candidates of the table; where a case lacks one, its name is left out."""


@dataclass
class Candidate:
    """Something that trains, and how it is fed.

    Attributes:
        make: builds it; raises ImportError, OptionError or the like where it cannot be had.
        replicas: trainings in one step; figures are divided by it.
        stacked: row numbers have a replica axis.
        chunk: a block has a multiple of so many steps.
    """

    make: Callable[[], Train]
    replicas: int = 1
    stacked: bool = False
    chunk: int = 1


def candidates(case: Any) -> dict[str, Candidate]:
    """Everything that can train a case, by name."""
    from . import speed_dgm, speed_torch

    out: dict[str, Candidate] = {}
    own_flow = case.kind == "vae" and case.guide != "diagonal-normal"
    if not own_flow:
        out["pyro"] = Candidate(partial(speed_torch.stock_pyro, case))
        out["pyro, validation off"] = Candidate(partial(speed_torch.stock_pyro, case, validate=False))
    out["pyro, same pair"] = Candidate(partial(speed_torch.stock_same_pair, case))
    out["by hand"] = Candidate(partial(speed_torch.by_hand, case))
    out["by hand, compiled"] = Candidate(partial(speed_torch.by_hand, case, compiled=True))
    if case.stacked:
        out["by hand, vmapped"] = Candidate(partial(speed_torch.by_hand_vmapped, case), case.replicas, True)
    if not own_flow:
        out |= _numpyro(case)
    make = speed_dgm.replicated if case.stacked else speed_dgm.single
    for name, mode in (speed_dgm.MODES | {"dgm auto": "auto"}).items():
        if mode or not case.stacked:
            out[name] = Candidate(partial(make, case, mode), case.replicas, case.stacked)
    return out


def _numpyro(case: Any) -> dict[str, Candidate]:
    def make(**options: Any) -> Train:
        return numpyro_module().numpyro_rival(case, **options)

    fed = (case.replicas, case.stacked)
    return {
        "numpyro jit": Candidate(partial(make, scanned=False), *fed),
        "numpyro scan": Candidate(partial(make, scanned=True), *fed, case.scan),
        "numpyro scan, optax": Candidate(partial(make, scanned=True, use_optax=True), *fed, case.scan),
    }


def numpyro_module() -> Any:
    """NumPyro's side.

    Raises:
        OptionError: it is not installed.
    """
    from dgm.errors import OptionError

    try:
        from . import speed_numpyro
    except ImportError as error:
        raise OptionError(f"{error}: pip install 'dgm[bench]' installs NumPyro with what it needs") from error
    return speed_numpyro


def blocks(case: Any, candidate: Candidate, steps: int) -> Any:
    """Row numbers of `steps` steps, drawn with replacement: (steps, B), or (steps, K, B) for replicas."""
    import torch

    return torch.randint(case.rows, (steps, *((candidate.replicas,) if candidate.stacked else ()), case.batch))


def set_threads(threads: int) -> None:
    """The same number for every library; one thread is one core, or XLA's own pool would still use the others."""
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(threads)


def measure(
    case: Any, chosen: dict[str, Candidate], rounds: int, seconds: float, steps: int | None = None
) -> dict[str, Any]:
    """CPU and wall milliseconds a step (and replica) of each candidate, in turns within each round.

    Args:
        seconds: length of a turn, which sets its steps.
        steps: steps of a turn instead.

    Returns:
        {"candidates": name -> figures, "skipped": name -> why}.
    """
    ready, skipped = {}, {}
    for name, candidate in chosen.items():
        try:
            ready[name] = _prepare(case, candidate, seconds, steps)
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    for turn in range(rounds):
        names = list(ready)
        gc.collect()
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _turn(case, chosen[name], ready[name])
    return {"candidates": {name: _figures(case, chosen[name], r) for name, r in ready.items()}, "skipped": skipped}


def _prepare(case: Any, candidate: Candidate, seconds: float, steps: int | None) -> dict[str, Any]:
    start, processor = time.perf_counter(), time.process_time()
    train = candidate.make()
    built = time.perf_counter()
    loss = train(blocks(case, candidate, candidate.chunk))
    first = time.perf_counter()
    count = candidate.chunk
    if steps is None:
        while True:  # warm, and long enough to know how long a step takes
            begin = time.perf_counter()
            train(blocks(case, candidate, count))
            took = time.perf_counter() - begin
            if took > 0.1 or count >= 1600:
                break
            count = max(count * 2, candidate.chunk)
        wanted = min(5000, max(5, int(seconds / took * count)))
        count = -(-wanted // candidate.chunk) * candidate.chunk
    else:
        count = max(steps, candidate.chunk)
    times = {"build_s": built - start, "first_block_s": first - built}
    times |= {"spent_wall_s": time.perf_counter() - start, "spent_cpu_s": time.process_time() - processor}
    return {"train": train, "steps": count, "first_loss": loss, "cpu": [], "wall": [], **times}


def _turn(case: Any, candidate: Candidate, ready: dict[str, Any]) -> None:
    time.sleep(0.02)  # the pools of the one before stop spinning
    wall, cpu = time.perf_counter(), time.process_time()
    ready["last_loss"] = ready["train"](blocks(case, candidate, ready["steps"]))
    unit = 1e3 / ready["steps"] / candidate.replicas
    spent_cpu, spent_wall = time.process_time() - cpu, time.perf_counter() - wall
    ready["cpu"].append(spent_cpu * unit)
    ready["wall"].append(spent_wall * unit)
    ready["spent_cpu_s"] += spent_cpu
    ready["spent_wall_s"] += spent_wall


def _figures(case: Any, candidate: Candidate, ready: dict[str, Any]) -> dict[str, Any]:
    """Figures are per replica and step; losses per row of data."""
    return {
        "cpu_ms": spread(ready["cpu"]),
        "wall_ms": spread(ready["wall"]),
        "replicas": candidate.replicas,
        "steps_a_turn": ready["steps"],
        "build_s": ready["build_s"],
        "first_block_s": ready["first_block_s"],
        "spent_wall_s": ready["spent_wall_s"],
        "spent_cpu_s": ready["spent_cpu_s"],
        "first_loss": ready["first_loss"] / case.rows,
        "last_loss": ready["last_loss"] / case.rows,
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Median, smallest, largest and all of them.

    >>> spread([3.0, 1.0, 2.0])["median"]
    2.0
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def peak_memory() -> float:
    """Largest resident memory of this process so far, MiB; not that of the process that started it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def first_step(case: Any, name: str, launched: float) -> dict[str, Any]:
    """Seconds of import, of building model, guide and optimiser, and of the first step; peak memory of the process."""
    if name.startswith("numpyro"):
        numpyro_module()  # so that its import counts as one
    candidate = candidates(case)[name]
    case.data  # noqa: B018  (made once; not the candidate's own time)
    since, imported, before = time.time() - launched, time.perf_counter(), peak_memory()
    train = candidate.make()
    built = time.perf_counter()
    train(blocks(case, candidate, candidate.chunk))
    first = time.perf_counter()
    train(blocks(case, candidate, -(-50 // candidate.chunk) * candidate.chunk))
    return {
        "case": case.name,
        "candidate": name,
        "import_s": since,
        "build_s": built - imported,
        "first_step_s": first - built,
        "memory_before_mib": before,
        "memory_peak_mib": peak_memory(),
    }


def main(argv: list[str] | None = None) -> None:
    """Do the job of the first argument (JSON) and write the outcome to the file of the second."""
    text, out = sys.argv[1:] if argv is None else argv
    job = json.loads(text)
    set_threads(job["threads"])
    from dgm.bench_executors import end_with_parent

    from .speed_cases import find_case

    end_with_parent(job["parent"])

    if job["job"] == "compare":
        from .speed_compare import compare_end_to_end

        result = compare_end_to_end(job["epochs"], job["seeds"], job["stock_steps"])
    elif job["job"] == "first":
        result = first_step(find_case(job["case"]), job["candidate"], job["launched"])
    else:
        case = find_case(job["case"])
        chosen = {n: c for n, c in candidates(case).items() if n in job["only"]}
        result = {"case": case.name, "axis": case.axis, "value": case.value}
        result |= measure(case, chosen, job["rounds"], job["seconds"], job.get("steps"))
    result |= {"threads": job["threads"], "process_cpu_s": time.process_time()}
    Path(out).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

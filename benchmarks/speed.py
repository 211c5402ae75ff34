"""CPU and wall time of a training step: stock Pyro, PyTorch by hand, NumPyro and dgm in every mode, in turns.

Protocol. Each case and number of threads has a process of its own that holds all candidates. In a round every candidate
has a turn of about `--seconds`; from round to round another begins. A figure is the median over rounds, per step and
replica, with the smallest and largest; CPU time is that of all threads of the process. In the timing: drawing the row
numbers of fresh minibatches with replacement, taking these rows of data held in memory, noise, loss, gradients and Adam
(1e-3). Where the library gives the loss at each step (Pyro, dgm.SVI) or one reads it (by hand), it becomes a float at
each step; NumPyro and replicas hand it over once a turn, a scanned NumPyro takes its row numbers in blocks. Not in the
timing: import, start, compilation, the first steps. "one thread" binds the process to one core, so that XLA's pools
share it. Stock Pyro is written as in its tutorials, and runs dgm's own pair ("same pair"); both validate, as shipped.
First steps have a fresh process each: import, data and construction are apart; "cold" is an empty folder of the
compiler's cache, "warm" a second process with the same folder. Peak memory is the resident memory of that process.

    python -m dgm.benchmarks speed --cases all --out benchmarks/results/speed.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dgm.errors import OptionError
from dgm.provenance import provenance

from .speed_cases import CASES, SCALING, find_case
from .speed_report import markdown, picture, target_table, targets

GROUPS = ("table", "first", "scaling", "compare")
SCALED = ("pyro", "by hand", "by hand, vmapped", "numpyro scan", "dgm trace", "dgm inductor")
FIRST = {
    "vae20": ("pyro", "by hand", "by hand, compiled", "numpyro jit", "numpyro scan", "dgm eager", "dgm trace",
              "dgm inductor", "dgm auto"),
    "bnn32x20": ("numpyro scan", "dgm trace", "dgm inductor", "dgm auto"),
}  # fmt: skip
COMPILED = ("by hand, compiled", "dgm inductor")
TIMEOUT = 3600.0


def jobs_of(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part of the result, job) in the order in which they run.

    Raises:
        OptionError: an unknown case.
    """
    names = options.cases.split(",")
    names = list(GROUPS) if names == ["all"] else names
    threads = [int(t) for t in options.threads.split(",")]
    timing = {"rounds": options.rounds, "seconds": options.seconds, "steps": options.steps}
    for name in names:
        if name == "table" or name not in GROUPS:
            for case in CASES if name == "table" else [find_case(name).name]:
                part = "scaling" if case in SCALING else "cases"
                for count in threads:
                    yield part, {"job": "time", "case": case, "threads": count, **timing}
        elif name == "scaling":
            for case in SCALING:
                yield "scaling", {"job": "time", "case": case, "threads": max(threads), "only": SCALED, **timing}
        elif name == "first":
            for case, chosen in FIRST.items():
                for candidate in chosen:
                    yield "first", {"job": "first", "case": case, "candidate": candidate, "threads": max(threads)}
        else:
            yield "compare", {
                "job": "compare", "epochs": options.epochs, "seeds": options.seeds,
                "stock_steps": options.stock_steps, "threads": max(threads),
            }  # fmt: skip


def run_job(job: dict[str, Any], cache: str | None = None) -> dict[str, Any]:
    """Run a job in a fresh process whose thread pools have the job's size.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    threads = str(job["threads"])
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    if cache is not None:
        env["TORCHINDUCTOR_CACHE_DIR"] = cache
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        text = json.dumps(job | {"launched": time.time()})
        command = [sys.executable, "-m", "dgm.benchmarks.speed_worker", text, str(out)]
        try:
            run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {TIMEOUT:.0f} s") from None
        if run.returncode or not out.exists():
            raise RuntimeError((run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1])
        return json.loads(out.read_text(encoding="utf-8"))


def run_first(job: dict[str, Any]) -> list[dict[str, Any]]:
    """First steps of one candidate: with an empty cache and again with what that left, where a compiler is in play."""
    with tempfile.TemporaryDirectory() as cache:
        if job["candidate"] not in COMPILED:
            return [run_job(job, cache) | {"cache": ""}]
        return [run_job(job, cache) | {"cache": state} for state in ("cold", "warm")]


def tell(part: str, outcome: dict[str, Any]) -> None:
    """A job's figures on the terminal."""
    print(f"\n{outcome['case']}, {outcome['threads']} thread{'s' * (outcome['threads'] > 1)}", flush=True)
    if part == "first":
        print(
            f"  {outcome['candidate']} {outcome['cache']}: import {outcome['import_s']:.2f} s, build "
            f"{outcome['build_s']:.2f} s, first step {outcome['first_step_s']:.2f} s, "
            f"peak {outcome['memory_peak_mib']:.0f} MiB"
        )
    elif part == "compare":
        print(
            f"  dgm {outcome['dgm']['wall_s']:.1f} s, stock {outcome['stock']['wall_s']:.1f} s, "
            f"ratio {outcome['ratio_wall']:.4f}"
        )
    else:
        for name, figures in outcome["candidates"].items():
            cpu, wall = figures["cpu_ms"], figures["wall_ms"]
            print(
                f"  {name:22s} CPU {cpu['median']:9.4f} ms ({cpu['min']:.4f} to {cpu['max']:.4f}), "
                f"wall {wall['median']:9.4f} ms, loss {figures['first_loss']:.4g} to {figures['last_loss']:.4g}"
            )
        for name, why in outcome["skipped"].items():
            print(f"  {name:22s} skipped: {why}")


def write(result: dict[str, Any], out: Path) -> None:
    """JSON, and beside it the tables (.md) and the picture (.svg)."""
    result["targets"] = targets(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
    picture(result).savefig(out.with_suffix(".svg"), transparent=True)


def _versions() -> str:
    found = []
    for name in ("numpyro", "jax", "optax"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dgm.benchmarks speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", default="table", help=f"of {', '.join(CASES)}, or {', '.join(GROUPS)}, all; default table"
    )
    parser.add_argument("--threads", default=",".join(dict.fromkeys(["1", str(os.cpu_count() or 1)])))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn")
    parser.add_argument("--steps", type=int, default=None, help="steps of a turn, in place of seconds")
    parser.add_argument("--epochs", type=int, default=1000, help="of compare")
    parser.add_argument("--seeds", type=int, default=20, help="of compare")
    parser.add_argument(
        "--stock-steps", type=int, default=300, help="steps of stock SVI that compare extrapolates from"
    )
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write; tables and picture beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Time the cases of the command line, tell the figures and the targets, and write them."""
    options = parse(argv)
    try:
        jobs = list(jobs_of(options))
    except OptionError as error:
        raise SystemExit(str(error)) from None
    made_by = provenance()
    made_by["versions"] += f", {_versions()}"
    made_by["threads"] = options.threads
    result: dict[str, Any] = {"protocol": __doc__, **made_by, "failed": []}
    result |= {part: [] for part in ("cases", "scaling", "first", "compare")}
    for part, job in jobs:
        try:
            outcomes = run_first(job) if part == "first" else [run_job(job)]
        except RuntimeError as error:
            result["failed"].append(f"{job['case' if 'case' in job else 'job']}, {job['threads']} threads: {error}")
            print(result["failed"][-1], file=sys.stderr, flush=True)
            continue
        result[part] += outcomes
        for outcome in outcomes:
            tell(part, outcome)
        if options.out is not None:
            write(result, options.out)
    print("\n" + target_table(targets(result)))


if __name__ == "__main__":
    main()

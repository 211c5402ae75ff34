"""What guards and checkpoints cost: a step with and without the check of finiteness, and the share of saving.

    python -m dgm.benchmarks guards [--rounds 15] [--out guards.json]

A step without the guard has no norm of the gradient, no test, no choice between old and new values, and keeps nothing
for a report. Both sides take turns, block by block, on the same data; the figure is the median over the rounds of the
ratio of their CPU times. The cost of checkpoints is the CPU time of its saves over that of the rest of the training.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dgm
from dgm.checkpoint import Checkpoints
from dgm.provenance import provenance
from dgm.replicas import Replicas

from .speed_cases import Case
from .speed_dgm import make_svi

CASES = {
    "vae": Case("vae", "vae", batch=20, rows=2_000),
    "bnn20": Case("bnn20", "bnn", batch=100, rows=450, replicas=20),
}
MODES = ("trace", "inductor")
BLOCK = {"vae": 100, "bnn20": 500}
EPOCHS = {"vae": 40, "bnn20": 2_000}


def unguarded_step(
    gradients: Callable[..., Any],
    rule: Any,
    groups: Sequence[int],
    forms: Sequence[Any],
    unused: Sequence[bool],
    clip: float | None,
    replicas: bool = False,
    freeze: bool = True,
    look: bool = False,
) -> Callable[..., Tensor]:
    """As `dgm.whole.whole_step`, with nothing that only the guard needs."""
    count, slots = len(groups), len(rule.slots)

    def step(*inputs: Tensor) -> Tensor:
        values, rest = list(inputs[:count]), list(inputs[count:])
        states = [rest[i * slots : (i + 1) * slots] for i in range(count)]
        numbers, rest = rest[count * slots], rest[count * slots + 1 + replicas :]
        loss, *found = gradients(*values, *rest)
        for i, (p, g, state) in enumerate(zip(values, found, states, strict=True)):
            if unused[i]:
                continue
            shape = (-1,) + (1,) * (p.dim() - 1) if replicas else ()
            columns = [c.reshape(shape) for c in numbers[..., groups[i], :].unbind(-1)]
            new, moved = rule.update(p, g, state, columns, forms[groups[i]])
            for old, fresh in zip([p, *state], [new, *moved], strict=True):
                old.copy_(fresh)
        return torch.stack([loss, loss])

    return step


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Make steps, and run them, without a guard."""

    def update(self: dgm.SVI, loss: Tensor, gradients: Sequence[Tensor | None]) -> bool:
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        optimiser = self._optimiser()
        self.settle()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return True

    kept = torch.get_rng_state()
    with (
        mock.patch("dgm.compiled.whole_step", unguarded_step),
        mock.patch("dgm.replica_graph.whole_step", unguarded_step),
        mock.patch("dgm.replica_guard.ReplicaGuard.before", lambda self: None),
        mock.patch("dgm.replica_guard.ReplicaGuard.after", lambda self, *rest: None),
        mock.patch.object(dgm.SVI, "_update", update),
        mock.patch("torch.get_rng_state", lambda: kept),
    ):
        yield


def side(case: Case, mode: str) -> Callable[[Tensor], float]:
    """CPU seconds of the steps over a block of rows."""
    if case.replicas == 1:
        svi = make_svi(case, mode)

        def single(block: Tensor) -> float:
            start = time.process_time()
            for index in block:
                svi.step(*(t.index_select(0, index) for t in case.data))
            return time.process_time() - start

        return single
    engine = Replicas([make_svi(case, mode, seed) for seed in range(case.replicas)], case.data, compile=mode)  # type: ignore[arg-type]

    def many(block: Tensor) -> float:
        start = time.process_time()
        for index in block:
            engine.step(index)
        engine.losses()
        return time.process_time() - start

    return many


def blocks(case: Case, steps: int, seed: int) -> Tensor:
    shape = (steps, case.batch) if case.replicas == 1 else (steps, case.replicas, case.batch)
    return torch.randint(case.rows, shape, generator=torch.Generator().manual_seed(seed))


def guard_cost(case: Case, mode: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step with and without the guard, and the median ratio."""
    steps = BLOCK[case.name]
    guarded = side(case, mode)
    guarded(blocks(case, 10, 0))
    with unguarded():
        bare = side(case, mode)
        bare(blocks(case, 10, 0))
    found: list[tuple[float, float]] = []
    gc.disable()
    try:
        for number in range(rounds):
            block, pair = blocks(case, steps, number + 1), {}
            for name in ("with", "without") if number % 2 else ("without", "with"):
                with unguarded() if name == "without" else contextlib.nullcontext():
                    pair[name] = (bare if name == "without" else guarded)(block) / steps * 1e3
            found.append((pair["with"], pair["without"]))
            gc.collect()
    finally:
        gc.enable()
    ratios = sorted(a / b - 1 for a, b in found)
    return {
        "case": case.name, "mode": mode, "rounds": rounds, "steps_a_round": steps,
        "with_ms": statistics.median(a for a, _ in found), "without_ms": statistics.median(b for _, b in found),
        "cost": statistics.median(ratios), "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }  # fmt: skip


def checkpoint_cost(case: Case, mode: str, seconds: float) -> dict[str, Any]:
    """The share of a training's CPU time that its checkpoints take, saved as often as they may be."""
    spent = [0.0, 0.0]
    right = Checkpoints.save

    def timed(self: Checkpoints, step: int, state: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        try:
            return right(self, step, state)
        finally:
            spent[0] += time.perf_counter() - start
            spent[1] += time.process_time() - cpu
            saves.append(step)

    saves: list[int] = []
    options: dict[str, Any] = {"epochs": EPOCHS[case.name], "batch_size": case.batch, "seed": 0, "compile": mode}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Checkpoints, "save", timed):
        kept = Checkpoints(folder, seconds=seconds)
        start, cpu = time.perf_counter(), time.process_time()
        if case.replicas == 1:
            dgm.fit(*case.pair(0), *case.data, checkpoint=kept, **options)
        else:
            pairs = [case.pair(seed) for seed in range(case.replicas)]
            models, guides = [model for model, _ in pairs], [guide for _, guide in pairs]
            dgm.fit(models, guides, *case.data, replicas=case.replicas, checkpoint=kept, **options)
        total = time.perf_counter() - start, time.process_time() - cpu
    return {
        "case": case.name, "mode": mode, "seconds_between": seconds, "saves": len(saves), "wall_s": total[0],
        "cost": spent[1] / (total[1] - spent[1]), "cost_wall": spent[0] / (total[0] - spent[0]),
        "save_ms": spent[0] / max(1, len(saves)) * 1e3,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="between two checkpoints; the default of fit is 30")
    parser.add_argument("--what", nargs="+", default=["guards", "checkpoints"], choices=["guards", "checkpoints"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"provenance": provenance(), "guards": [], "checkpoints": []}
    for name in args.cases:
        for mode in args.modes:
            if "guards" in args.what:
                row = guard_cost(CASES[name], mode, args.rounds)
                found["guards"].append(row)
                low, high = row["quartiles"]
                print(
                    f"{name:6s} {mode:9s} guard: {row['with_ms']:.4f} ms with, {row['without_ms']:.4f} ms without: "
                    f"{row['cost']:+.2%} ({low:+.2%} to {high:+.2%})",
                    flush=True,
                )
            if "checkpoints" in args.what:
                row = checkpoint_cost(CASES[name], mode, args.seconds)
                found["checkpoints"].append(row)
                print(
                    f"{name:6s} {mode:9s} checkpoints: {row['saves']} of {row['save_ms']:.1f} ms in {row['wall_s']:.1f}"
                    f" s: {row['cost']:+.2%} of CPU time, {row['cost_wall']:+.2%} of wall time",
                    flush=True,
                )
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

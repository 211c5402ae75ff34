"""`dgm.compare` of eight families and twenty seeds end to end, against the same cells one by one through stock SVI.

Stock SVI is timed on some steps of one cell of each family, on dgm's own pair, and multiplied by the steps and cells:
cells of a family do the same arithmetic. Its side is training alone, each family with the number of threads that suits
it; ours holds all that `compare` does, evaluation and pictures included. So the ratio errs against us.
"""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import dgm
from dgm.errors import DGMError
from dgm.guides import attached
from dgm.guides.inverse_autoregressive_flow import InverseAutoregressiveFlow
from dgm.guides.joint import Joint
from dgm.guides.low_rank_normal import LowRankNormal
from dgm.programs import preserved_rng

from .speed_torch import stock_on_pair
from .uci import make_bnn

FEATURES, BATCH = 6, 100


def families() -> dict[str, Any]:
    """The default six, a low-rank normal of rank 5 and an inverse autoregressive flow of four steps."""
    return attached() | {
        "low-rank-normal, rank 5": partial(Joint, family=partial(LowRankNormal, rank=5)),
        "inverse-autoregressive-flow, 4 steps": partial(Joint, family=partial(InverseAutoregressiveFlow, transforms=4)),
    }


def yacht() -> tuple[Any, str]:
    """UCI yacht, or data of its size drawn from a linear model where it cannot be had; and which of them."""
    try:
        return dgm.load("uci-yacht", split=0), "uci-yacht, split 0"
    except DGMError:
        with preserved_rng(0):
            x = torch.randn(308, FEATURES)
            return (x, x @ torch.randn(FEATURES) + 0.1 * torch.randn(308)), "308 rows drawn from a linear model"


def compare_end_to_end(epochs: int, seeds: int, stock_steps: int) -> dict[str, Any]:
    """Seconds of the whole comparison, and of stock SVI extrapolated from `stock_steps` steps of each family."""
    data, name = yacht()
    guides = families()
    cpu, wall = time.process_time(), time.perf_counter()
    result = dgm.compare(partial(make_bnn, FEATURES), guides, data, seeds=seeds, epochs=epochs, batch_size=BATCH)
    ours = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
    failed = {str(row["guide"]): str(row["status"]) for _, row in result.rows.iterrows() if row["status"] != "ok"}
    steps = int(result.history["step"].max())
    train = data.train if hasattr(data, "train") else data
    stock = {family: _stock(guide, train, stock_steps) for family, guide in guides.items()}
    total = {
        unit: sum(figures[f"{unit}_ms_a_step"] for figures in stock.values()) * steps * seeds / 1e3
        for unit in ("cpu", "wall")
    }
    return {
        "case": "compare", "data": name, "epochs": epochs, "seeds": seeds, "steps_a_cell": steps,
        "cells": len(guides) * seeds, "failed": failed, "dgm": ours,
        "stock": {"timed_steps": stock_steps, "families": stock, "cpu_s": total["cpu"], "wall_s": total["wall"]},
        "ratio_wall": ours["wall_s"] / total["wall"], "ratio_cpu": ours["cpu_s"] / total["cpu"],
    }  # fmt: skip


def _stock(guide: Any, data: tuple[Tensor, ...], steps: int) -> dict[str, float]:
    with preserved_rng(0):
        model = make_bnn(FEATURES)
        pair = model, guide(model, *data)
    rows = len(data[0])
    case = SimpleNamespace(kind="bnn", scale=rows / min(BATCH, rows), loss=None, data=data)
    train = stock_on_pair(case, *pair)
    order = torch.randint(rows, (steps, min(BATCH, rows)))
    train(order[:5])  # the first steps make the parameters and the optimisers
    threads, found = torch.get_num_threads(), []
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            cpu, wall = time.process_time(), time.perf_counter()
            train(order)
            took = time.perf_counter() - wall, time.process_time() - cpu
            found.append({"wall_ms_a_step": took[0] / steps * 1e3, "cpu_ms_a_step": took[1] / steps * 1e3})
            found[-1]["threads"] = count
    finally:
        torch.set_num_threads(threads)
    return min(found, key=lambda figures: figures["wall_ms_a_step"])  # tiny tensors may want one thread

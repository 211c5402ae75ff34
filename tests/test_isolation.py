"""Trainings do not meet each other: not in one process, in any order, in workers, after threads, or across ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from dgm import Comparison, compare
from dgm.guides import attached
from dgm.guides.encoders import mlp
from dgm.models.vae import VAE

X = torch.rand(24, 4, generator=torch.Generator().manual_seed(0)).round()
NAMES = ["diagonal-normal", "full-normal"]


def make() -> VAE:
    return VAE(4, latent=2, hidden=(8,))


def cells(names: list[str], seeds: list[int], jobs: int = 1) -> pd.DataFrame:
    """The rows of a comparison, without the clock's columns, sorted by cell."""
    guides: Mapping[str, Any] = attached(names, encoder=mlp(8))
    result: Comparison = compare(make, guides, X, epochs=2, batch_size=8, seeds=seeds, num_samples=100, jobs=jobs)
    rows = result.rows
    assert list(rows["status"].unique()) == ["ok"], rows["status"]
    keep = [name for name in rows if not any(word in str(name) for word in ("second", "cpu", "thread", "time"))]
    return rows[keep].sort_values(["guide", "seed"]).reset_index(drop=True)


def test_cells_in_two_orders_are_bit_equal() -> None:
    pd.testing.assert_frame_equal(cells(NAMES, [0]), cells(NAMES[::-1], [0]), check_exact=True)


@pytest.mark.slow  # worker processes import torch
def test_cells_on_one_and_two_workers_are_bit_equal() -> None:
    pd.testing.assert_frame_equal(cells(NAMES, [0, 1]), cells(NAMES, [0, 1], jobs=2), check_exact=True)


AFTER_THREADS = """
import torch
torch.set_num_threads(2)
a = torch.randn(1500, 1500)
(a @ a).sum().backward() if a.requires_grad else (a @ a).sum()  # torch's thread pool is up
from test_isolation import NAMES, cells
if __name__ == "__main__":
    print(len(cells(NAMES, [0, 1], jobs=2)))
"""


def python(code: str, folder: Path, limit: float) -> str:
    """Standard output of a program in a process of its own, which ends within a time limit."""
    script = folder / "main.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}", encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=limit, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_workers_after_a_product_on_many_threads_do_not_hang(tmp_path: Path) -> None:
    assert python(AFTER_THREADS, tmp_path, limit=240).split() == ["4"]


PEAK = """
import resource
import torch
import dgm
from functools import partial
from dgm.guides.encoders import linear
from dgm.guides.global_ import Global
from dgm.guides.joint import Joint
from dgm.models.bnn import BNN
from dgm.models.linear_vae import LinearVAE
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

x, y = torch.randn(5000, 4), torch.randn(5000)
bnn = BNN(torch.nn.Sequential(torch.nn.Linear(4, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1)))
q = Global(bnn, x[:50], y[:50])
model, rows = LinearVAE.simulate(5000, 10, 2, generator=torch.Generator().manual_seed(0))
guide = Joint(model, rows, encoder=linear())
dgm.evaluate(bnn, q, x[:50], y[:50], num_samples=100)
dgm.evaluate(model, guide, rows[:50], num_samples=100)
before = peak()
dgm.evaluate(bnn, q, x, y, num_samples=1000)
between = peak()
dgm.evaluate(model, guide, rows, num_samples=5000)
print(between - before, peak() - between)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit")
def test_memory_of_predictions_and_bounds_is_bounded(tmp_path: Path) -> None:
    """S = 1000 draws of a network's 50 units on 5000 rows are 1 GB, K = 5000 of 10 columns 1 GB as well.

    What is kept is S numbers a row for the scores (40 MB in double precision, with a few copies), and a chunk.
    """
    predicted, bounded = map(float, python(PEAK, tmp_path, limit=500).split())
    assert predicted < 400 and bounded < 150, (predicted, bounded)


RANKS = """
import os
import sys
import torch
import torch.distributed as distributed
from functools import partial
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from dgm.guides.joint import Joint
from dgm.models.linear_vae import LinearVAE
from dgm.pair import Pair

N, HALF = 8, 4
rank, port = int(sys.argv[1]), sys.argv[2]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
distributed.init_process_group("gloo", rank=rank, world_size=2)
torch.manual_seed(0)
model, x = LinearVAE.simulate(N, 3, 2, generator=torch.Generator().manual_seed(0))
pair = Pair(model, Joint(model, x))
pair.check((x,))  # every parameter is there before the wrapping

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.owners = pair.owners

    def forward(self, batch, seed):
        torch.manual_seed(seed)
        return pair.loss(None, (batch,), sizes={"data": N})

loss = Loss()
parts = []
for other in (0, 1):  # what each rank would have alone
    value = loss(x[other * HALF : (other + 1) * HALF], 10 + other)
    parts.append(torch.autograd.grad(value, list(loss.parameters())))
together = DistributedDataParallel(loss)
together(x[rank * HALF : (rank + 1) * HALF], 10 + rank).backward()
off = max(float((p.grad - (a + b) / 2).abs().max()) for p, a, b in zip(loss.parameters(), *parts))
size = max(float(p.grad.abs().max()) for p in loss.parameters())
print(off <= 1e-5 * size, size > 0)
distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_gradients_of_two_ranks_are_averaged(tmp_path: Path) -> None:
    """`Pair.loss` is what DistributedDataParallel wraps: all rows in `sizes`, the seed of each rank its own."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "ranks.py"
    script.write_text(RANKS, encoding="utf-8")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), port], stdout=-1, stderr=-1, text=True)
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            out, error = process.communicate(timeout=240)
            assert process.returncode == 0, error[-2000:]
            assert out.split() == ["True", "True"], out
    finally:
        for process in ranks:
            process.kill()

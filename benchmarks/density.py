"""Densities of images: VAEs and deep latent Gaussian models under several guides and objectives, by held-out nats.

dgm bench run density --budget short --jobs 2
"""

from __future__ import annotations

import sys

from dgm.bench_cells import Metric, Suite

from .density_data import load_task
from .density_list import cells, seconds
from .density_run import run


def ready(task: str) -> None:
    """Raises DataError where the file of a task is missing."""
    load_task(task, 0)


SUITE = Suite(
    "density",
    cells,
    run,
    [
        Metric("nll", "lower", "NLL", "nats of a held-out row: minus the importance bound on log p(x)"),
    ],
    summary="VAEs and deep latent Gaussian models of images: held-out nats, gaps and active units",
    ready=ready,
    seconds=seconds,
)


if __name__ == "__main__":
    from .__main__ import main

    main(["density", *sys.argv[1:]])

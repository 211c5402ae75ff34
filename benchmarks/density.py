"""Densities of images: VAEs and deep latent Gaussian models under several guides and objectives, by held-out nats.

Fixed binarized MNIST repeats the recipe of a published row (784-400-40, 89.8 nats) with three families of q. MNIST with
redrawn pixels and OMNIGLOT (a cut of our own) have the models of Burda, Grosse and Salakhutdinov, "Importance weighted
autoencoders", 2016, one and two stochastic layers, and deep latent Gaussian models, by the ELBO and by 5 or 50
importance weights; thresholded Fashion-MNIST and Frey faces have no published numbers. For each: the importance bound
of held-out rows, the ELBO and the gap between them, active units, and the curve of training. The short budget repeats
the recipe in full and has a short protocol of its own for all else, of which orders alone are compared.

dgm bench run density --budget short --jobs 2
"""

from __future__ import annotations

from dgm.bench_cells import Metric, Suite

from .density_data import load_task
from .density_list import cells, seconds
from .density_report import checks, notes
from .density_run import run
from .density_story import story


def ready(task: str) -> None:
    """Raises DataError where the file of a task is missing."""
    load_task(task, 0)


SUITE = Suite(
    "density",
    cells,
    run,
    [
        Metric("nll", "lower", "NLL", "nats of a held-out row: minus the importance bound on log p(x)"),
        Metric("nll_tight", "lower", "NLL, more draws", "the same by 5000 draws, estimated from some rows in pairs"),
        Metric("elbo", "higher", "ELBO", "of held-out rows, nats"),
        Metric("gap", "lower", "gap", "importance bound minus ELBO: what q loses, at least"),
        Metric("approximation", "lower", "approximation gap", "what the best q of the family loses, on some rows"),
        Metric("amortization", "lower", "amortization gap", "what the encoder loses of that, on the same rows"),
        Metric("active_units", None, "active units", "whose mean under q varies over rows by more than 0.01"),
        Metric("khat_bad", "lower", "k-hat too high", "share of held-out rows whose k-hat is above its threshold"),
        Metric("epoch_kept", None, "epoch", "whose parameters were kept"),
    ],
    summary="VAEs and deep latent Gaussian models of images: held-out nats, gaps and active units",
    ready=ready,
    seconds=seconds,
    checks=checks,
    notes=notes,
    story=story,
)

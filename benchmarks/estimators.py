"""Gradient estimators side by side: variance and signal-to-noise of encoder and decoder gradients of a digits VAE.

Signal-to-noise of a parameter is |mean| / standard deviation of its gradient over the noise (Rainforth et al., "Tighter
Variational Bounds are Not Necessarily Better", 2018); the table has its root mean square over the parameters of each
network, and the variance summed over them, at the start and after training. The importance weighted bound's encoder
signal must fall with K, the doubly reparameterised one's must not; sticking the landing must have less variance than
the plain estimator where the guide is good.

    python -m dgm.benchmarks.estimators
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import dgm
from dgm.guides.encoders import mlp
from dgm.guides.joint import Joint
from dgm.models.vae import VAE
from dgm.noise import recording
from dgm.pair import Pair
from dgm.programs import preserved_rng
from dgm.provenance import provenance

ROWS = 20


def estimators(counts: tuple[int, ...]) -> dict[str, Any]:
    """The estimators by name; K is in the name where there are several particles."""
    found: dict[str, Any] = {
        "pathwise": dgm.ELBO(),
        "sticking the landing": dgm.ELBO(estimator="stl"),
        "analytic KL": dgm.ELBO(kl="analytic"),
        "score function, K=8": dgm.ELBO(8, estimator="score"),
        "pathwise, K=8": dgm.ELBO(8),
        "sticking the landing, K=8": dgm.ELBO(8, estimator="stl"),
        "antithetic, K=8": dgm.ELBO(8, draws="antithetic"),
        "Sobol, K=8": dgm.ELBO(8, draws="sobol"),
        "stratified, K=8": dgm.ELBO(8, draws="stratified"),
        "Renyi 1/2, K=8": dgm.RenyiELBO(0.5, 8),
    }
    for k in counts:
        found[f"importance weighted, K={k}"] = dgm.ImportanceELBO(k)
        found[f"doubly reparameterised, K={k}"] = dgm.ImportanceELBO(k, estimator="dreg")
        found[f"reweighted wake-sleep, K={k}"] = dgm.ReweightedWakeSleep(k)
    return found


def gradients(pair: Pair, x: Tensor, size: int, count: int, chunk: int = 10) -> dict[str, Tensor]:
    """`count` independent gradients of the loss of one minibatch, each `(count, ...)`."""
    sizes = {"data": size}
    pair.loss(None, (x,), sizes=sizes)
    with recording() as draws:
        pair.loss(None, (x,), sizes=sizes)
    parameters = {name: p.detach() for name, p in pair.parameters().items()}
    one = lambda *eps: torch.func.grad(lambda p: pair.loss(p, (x,), eps, sizes=sizes))(parameters)  # noqa: E731
    many = torch.func.vmap(one)
    parts = [many(*draws.sample_many(min(chunk, count - start))) for start in range(0, count, chunk)]
    return {name: torch.cat([part[name] for part in parts]) for name in parameters}


def row(found: Mapping[str, Tensor], network: str) -> dict[str, float]:
    """Signal-to-noise and variance of the parameters of one network."""
    flat = torch.cat([g.flatten(1) for name, g in found.items() if name.startswith(network)], 1)  # (count, P)
    mean, sd = flat.mean(0), flat.std(0)
    moved = sd > 0
    # the square of an estimated mean is too large by its variance
    signal = (mean.square() - sd.square() / len(flat)).clamp_min(0)
    ratio = (signal[moved] / sd[moved].square()).mean().sqrt()
    return {"snr": float(ratio), "variance": float(sd.square().sum())}


def table(epochs: int, count: int, counts: tuple[int, ...], seed: int = 0) -> pd.DataFrame:
    """One row for each estimator and state of training."""
    data = dgm.load("digits")
    x = data.transform(data.train, torch.Generator().manual_seed(seed))[0] if data.transform else data.train[0]
    with preserved_rng(seed):
        model = VAE(64, latent=8, hidden=(128,))
        model.initialise_output_bias(data.train[0])
        guide = Joint(model, x, encoder=mlp(128))
    rows = []
    for state in ("start", f"{epochs} epochs"):
        if state != "start":
            dgm.fit(
                model, guide, data.train, epochs=epochs, batch_size=100, lr=3e-3, seed=seed, transform=data.transform
            )
        for name, loss in estimators(counts).items():
            began = time.process_time()
            with preserved_rng(seed + 1):
                found = gradients(Pair(model, guide, loss), x[:ROWS], len(x), count)
            seconds = time.process_time() - began
            told = {"state": state, "estimator": name, "particles": loss.num_particles}
            for label, network in (("encoder", "guide"), ("decoder", "model")):
                told |= {f"{label}_{key}": value for key, value in row(found, network).items()}
            rows.append(told | {"milliseconds": 1000 * seconds / count})
            print(f"{state:12s} {name:34s}", *(f"{k} {v:.4g}" for k, v in rows[-1].items() if "_" in k), flush=True)
    return pd.DataFrame(rows)


def checks(rows: pd.DataFrame, counts: tuple[int, ...]) -> dict[str, bool]:
    """What theory says of the trained pair."""
    trained = rows[rows.state != "start"].set_index("estimator")
    snr, variance = trained["encoder_snr"], trained["encoder_variance"]
    first, last = min(counts), max(counts)
    return {
        "importance weighting loses encoder signal as K grows": bool(
            snr[f"importance weighted, K={last}"] < snr[f"importance weighted, K={first}"]
        ),
        "doubly reparameterised does not": bool(
            snr[f"doubly reparameterised, K={last}"] > snr[f"importance weighted, K={last}"]
        ),
        "sticking the landing has less variance": bool(variance["sticking the landing"] < variance["pathwise"]),
        "the score function has more": bool(variance["score function, K=8"] > variance["pathwise, K=8"]),
        "Sobol has less than independent": bool(variance["Sobol, K=8"] < variance["pathwise, K=8"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50, help="of training before the second half of the table")
    parser.add_argument("--count", type=int, default=400, help="gradients for each row")
    parser.add_argument("--particles", default="8,64", help="K of the bounds of several samples, comma-separated")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = tuple(int(k) for k in options.particles.split(","))
    about = provenance()
    rows = table(options.epochs, options.count, counts)
    found = checks(rows, counts)
    for text, holds in found.items():
        print(f"{'yes' if holds else 'NO '}  {text}")
    if options.out is not None:
        options.out.write_text(
            json.dumps({"rows": rows.to_dict("records"), "checks": found, "provenance": about}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

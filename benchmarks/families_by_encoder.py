"""Which family, which encoder? A digits VAE whose decoder is fixed, and every pair of the two, in one comparison.

The decoder is trained first, with a full normal and the largest encoder, then frozen: what differs in the bound is the
guide's alone. One `dgm.compare` call; the tables, of the ELBO and of the importance weighted bound, are family by
encoder.

    python -m dgm.benchmarks.families_by_encoder
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import dgm
from dgm.guides import attached
from dgm.guides.encoders import linear, mlp
from dgm.guides.full_normal import FullNormal
from dgm.guides.joint import Joint
from dgm.models.vae import VAE
from dgm.programs import preserved_rng

ENCODERS: dict[str, Any] = {
    "linear": linear(),
    "32": mlp(32),
    "128": mlp(128),
    "512": mlp(512),
    "128-128": mlp(128, 128),
}
FAMILIES = ("diagonal-normal", "low-rank-normal", "full-normal", "inverse-autoregressive-flow", "coupling-affine-flow")


def decoder(epochs: int, seed: int = 0) -> VAE:
    """A trained digits VAE, frozen."""
    data = dgm.load("digits")
    with preserved_rng(seed):
        model = VAE(64, latent=8, hidden=(128,))
        model.initialise_output_bias(data.train[0])
        guide = Joint(model, data.train[0], family=FullNormal, encoder=mlp(512))
    dgm.fit(model, guide, data.train, epochs=epochs, batch_size=100, lr=3e-3, seed=seed, transform=data.transform)
    return model.requires_grad_(False)


def by_encoder(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """A held-out score of each family (rows) and encoder (columns), mean over seeds."""
    rows = rows[rows.status == "ok"]
    parts = rows.guide.str.split(" | ", n=1, expand=True, regex=False)
    table = rows.assign(family=parts[0], encoder=parts[1]).pivot_table(
        index="family", columns="encoder", values=score, aggfunc="mean"
    )
    return table.reindex(index=list(FAMILIES), columns=list(ENCODERS))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100, help="of the decoder, and of each guide")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="folder for rows, plots and page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = decoder(options.epochs)
    guides = {
        f"{family} | {name}": guide
        for name, encoder in ENCODERS.items()
        for family, guide in attached(FAMILIES, encoder=encoder).items()
    }
    result = dgm.compare(
        partial(_same, model), guides, dgm.load("digits"), epochs=options.epochs, batch_size=100, lr=3e-3,
        seeds=options.seeds, num_samples=1000, title="Digits VAE, fixed decoder: family by encoder",
        compile="trace", progress=True,
    )  # fmt: skip
    print(result)
    for score, told in (("elbo", "ELBO, where q's gap shows"), ("bound", "bound, K = 1000, where weights close it")):
        print(f"\n{told}\n{by_encoder(result.rows, score).round(2).to_string()}")
    if options.out is not None:
        result.save(options.out)


def _same(model: VAE) -> VAE:
    return model


if __name__ == "__main__":
    main()

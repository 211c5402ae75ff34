"""Where the gap of a VAE is: three families by two encoder sizes, decoder fixed or trained jointly, in two tables.

The fixed decoder is trained once, with a full normal and the large encoder, then frozen; every guide is then trained on
it alone. Jointly, each guide trains a decoder of its own. For each: approximation and amortization gap (Cremer, Li and
Duvenaud, 2018) on held-out and on training rows. log p(x) of the fixed decoder is one number for all guides: the best
of the importance bounds of its own guide (10 K draws) and of the guide at hand (K draws); jointly it is the latter.
Annealed importance sampling on a few held-out rows says how far such a bound is from log p(x).
The best q of a datum is the best that was found: a flow contains a full normal, or nearly, and so by as much as its
approximation gap is above the full normal's the optimisation stopped short and its amortization gap is too small.

    python -m dgm.benchmarks gaps --data digits
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import dgm
from dgm.annealing import annealed_bound
from dgm.bounds import LogWeightSummary, paired_difference
from dgm.estimate import Estimate
from dgm.gaps import gaps
from dgm.guides import attached
from dgm.guides.encoders import mlp
from dgm.models.vae import VAE
from dgm.programs import preserved_rng
from dgm.provenance import provenance
from dgm.weights import LogWeightSampler

FAMILIES = ("diagonal-normal", "full-normal", "inverse-autoregressive-flow")
BATCH = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {
        "features": 64, "latent": 8, "hidden": 128, "encoders": {"16": 16, "256": 256}, "epochs": 100, "lr": 3e-3,
    },
    "binarized-mnist": {
        "features": 784, "latent": 20, "hidden": 200, "encoders": {"50": 50, "400": 400}, "epochs": 10, "lr": 1e-3,
    },
}  # fmt: skip


class Bench:
    """One data set: its rows, its models and guides, and what is measured of each."""

    def __init__(
        self,
        name: str,
        epochs: int | None,
        rows: int,
        samples: int,
        annealed: int,
        seed: int,
        free: int,
        tolerance: float,
    ):
        self.setting, self.seed, self.samples, self.annealed, self.free = SETTINGS[name], seed, samples, annealed, free
        self.tolerance = tolerance
        self.epochs = epochs or self.setting["epochs"]
        self.data = dgm.load(name)
        generator = torch.Generator().manual_seed(seed)
        self.held_out, self.seen = (self._some(part[0], rows, generator) for part in (self.data.test, self.data.train))

    def _some(self, x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
        """Rows drawn at random: files are sorted by writer. Grey pixels are binarized once, with this seed."""
        chosen = x[torch.randperm(len(x), generator=generator)[:rows]]
        return chosen if self.data.transform is None else torch.bernoulli(chosen, generator=generator)

    def model(self) -> VAE:
        with preserved_rng(self.seed):
            model = VAE(self.setting["features"], latent=self.setting["latent"], hidden=(self.setting["hidden"],))
            model.initialise_output_bias(self.data.train[0])
        return model

    def guide(self, model: VAE, family: str, width: int) -> Any:
        with preserved_rng(self.seed):
            return attached([family], encoder=mlp(width))[family](model, self.data.train[0][:1000])

    def train(self, model: VAE, guide: Any) -> None:
        dgm.fit(
            model, guide, self.data.train, epochs=self.epochs, batch_size=BATCH, lr=self.setting["lr"],
            seed=self.seed, transform=self.data.transform,
        )  # fmt: skip

    def bound(self, model: VAE, guide: Any, x: Tensor, samples: int) -> Estimate:
        summary = LogWeightSummary()
        with preserved_rng(self.seed):
            for chunk in LogWeightSampler(model, guide, x).chunks(samples):
                summary.update(chunk.local)
        return Estimate.of(summary, "importance bound by the decoder's own guide")

    def row(self, model: VAE, guide: Any, family: str, encoder: str, evidence: list[Any], mode: Any) -> dict[str, Any]:
        start = time.process_time()
        found = gaps(
            model, guide, self.held_out, train=self.seen, num_samples=self.samples, free_samples=self.free,
            seed=self.seed, mode=mode, tolerance=self.tolerance, log_evidence=evidence[0],
            train_log_evidence=evidence[1],
        )  # fmt: skip
        keys = [key for key in found.summary if not key.startswith("generalisation_log")]
        return {
            "mode": found.mode, "family": family, "encoder": encoder, **{key: found.summary[key] for key in keys},
            "evidence": found.evidence, "converged": found.converged, "steps": found.steps, "notes": found.notes,
            "cpu_seconds": time.process_time() - start,
        }  # fmt: skip

    def anneal(self, model: VAE, guide: Any) -> dict[str, Any]:
        """Annealed minus importance bound on the same few rows, nats."""
        x = self.held_out[: self.annealed]
        annealed = annealed_bound(model, guide, x, chains=8, steps=200, leapfrogs=5, seed=self.seed)
        plain = self.bound(model, guide, x, self.samples)
        mean, error = paired_difference(annealed.values, plain.values)
        return {"rows": len(x), "annealed": annealed.mean, "annealed_mc_se": annealed.mc_se, "bound": plain.mean,
                "annealed_minus_bound": mean, "se": error}  # fmt: skip


def table(rows: list[dict[str, Any]], mode: str) -> str:
    """One mode's rows as text: gaps ± their error over data."""
    lines = []
    for row in rows:
        if row["mode"] != mode:
            continue
        line = {"family": row["family"], "encoder": row["encoder"]}
        for key, name in (
            ("log_evidence", "log p(x)"), ("elbo", "ELBO"), ("approximation", "approximation"),
            ("amortization", "amortization"), ("train_amortization", "amortization, train"),
            ("generalisation_elbo", "ELBO, train - held-out"),
        ):  # fmt: skip
            line[name] = f"{row[key]:.2f} ± {row[f'{key}_se']:.2f}"
        lines.append(line | {"q*": "converged" if row["converged"] else "NOT CONVERGED"})
    return pd.DataFrame(lines).to_string(index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(SETTINGS), default="digits")
    parser.add_argument("--epochs", type=int, default=None, help="of the decoder and of each guide; default by data")
    parser.add_argument("--rows", type=int, default=100, help="held-out, and as many training rows")
    parser.add_argument("--samples", type=int, default=1000, help="K")
    parser.add_argument("--free-samples", type=int, default=4, help="draws of a step of the free guide")
    parser.add_argument("--tolerance", type=float, default=0.02, help="nats a row: gain of a round that counts")
    parser.add_argument("--annealed", type=int, default=20, help="rows of the annealed bound; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few epochs and rows: does it run")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.epochs, options.rows, options.samples, options.annealed = options.epochs or 2, 10, 100, 4
    bench = Bench(
        options.data, options.epochs, options.rows, options.samples, options.annealed, options.seed,
        options.free_samples, options.tolerance,
    )  # fmt: skip
    result: dict[str, Any] = {
        "protocol": __doc__, **provenance(), "data": options.data, "epochs": bench.epochs,
        "tolerance": options.tolerance, "rows": [], "annealed": {},
        **{key: value for key, value in bench.setting.items() if key not in ("epochs", "encoders")},
    }  # fmt: skip
    encoders = bench.setting["encoders"]
    start, best = time.perf_counter(), bench.model()
    own = bench.guide(best, "full-normal", max(encoders.values()))
    bench.train(best, own)
    best.requires_grad_(False)
    evidence = [bench.bound(best, own, x, 10 * options.samples) for x in (bench.held_out, bench.seen)]
    if options.annealed:
        result["annealed"]["fixed decoder"] = bench.anneal(best, own)
    print(f"fixed decoder trained, {time.perf_counter() - start:.0f} s", flush=True)
    for mode in ("fixed decoder", "joint training"):
        for family in FAMILIES:
            for name, width in encoders.items():
                model, known = (best, evidence) if mode == "fixed decoder" else (bench.model(), [None, None])
                guide = bench.guide(model, family, width)
                bench.train(model, guide)
                result["rows"].append(bench.row(model, guide, family, name, known, mode))
                if options.annealed and mode == "joint training":
                    result["annealed"][f"{family} | {name}"] = bench.anneal(model, guide)
                result["seconds"] = time.perf_counter() - start
                last = result["rows"][-1]
                print(f"{mode} | {family} | {name}: {last['steps']} steps, {last['cpu_seconds']:.0f} s of CPU; "
                      f"{result['seconds']:.0f} s in all", flush=True)  # fmt: skip
                if options.out is not None:
                    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        told = "one decoder" if mode == "fixed decoder" else "a decoder for each guide: gaps of several models"
        print(f"\n{options.data}, {mode} ({told}), nats ± over data\n{table(result['rows'], mode)}\n", flush=True)
    for name, found in result["annealed"].items():
        print(f"annealed - importance bound, {name}: {found['annealed_minus_bound']:+.3f} ± {found['se']:.3f}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

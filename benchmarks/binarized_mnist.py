"""Fixed binarized MNIST: held-out NLL of a VAE under several guides, and CPU time beside a loop written by hand.

Protocol: 784-400(ReLU)-20 VAE, Bernoulli pixels, batch 100, Adam 1e-3, 50 epochs on the 50,000 training images; NLL by
importance sampling with K = 1000 on every tenth test image (the file is not shuffled). The loop by hand is the same
model, guide, batches and optimiser in plain PyTorch; both are timed in turns within one process.

    python -m dgm.benchmarks.binarized_mnist --guides diagonal-normal,full-normal,inverse-autoregressive-flow
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgm
from dgm.guides import attached
from dgm.guides.encoders import mlp
from dgm.models.vae import VAE
from dgm.optim import adam
from dgm.programs import preserved_rng
from dgm.provenance import provenance

from .by_hand import VAEByHand

LATENT, HIDDEN, BATCH, LR, K = 20, 400, 100, 1e-3, 1000


def make_model(train: Tensor) -> VAE:
    """The decoder, its output bias at the log-odds of the training pixels (Burda et al., 2016)."""
    model = VAE(784, latent=LATENT, hidden=(HIDDEN,))
    model.initialise_output_bias(train)
    return model


class ByHand(VAEByHand):
    """The same VAE with a diagonal normal encoder; base of the other two."""

    def __init__(self) -> None:
        super().__init__(784, (HIDDEN,), LATENT)


class FullByHand(ByHand):
    """The same with a full covariance: a strictly lower triangle is one more output."""

    row: Tensor
    column: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Linear(HIDDEN, LATENT * (LATENT - 1) // 2)
        row, column = torch.tril_indices(LATENT, LATENT, -1)
        self.register_buffer("row", row)
        self.register_buffer("column", column)

    def warp(self, eps: Tensor, h: Tensor) -> tuple[Tensor, Tensor | float]:
        matrix = torch.zeros(len(h), LATENT, LATENT)
        matrix[:, self.row, self.column] = self.lower(h)
        return eps + (matrix @ eps.unsqueeze(-1)).squeeze(-1), 0.0


class FlowByHand(ByHand):
    """The same with two gated steps of an inverse autoregressive flow: masked networks of 128 hidden units."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.first = [nn.Linear(LATENT, hidden) for _ in range(2)]
        self.context = nn.ModuleList(nn.Linear(HIDDEN, hidden, bias=False) for _ in range(2))
        self.last = [nn.Linear(hidden, 2 * LATENT) for _ in range(2)]
        self.masked = nn.ModuleList([*self.first, *self.last])
        degree = torch.arange(hidden) * LATENT // hidden
        for t, order in enumerate((torch.arange(LATENT) + 1, LATENT - torch.arange(LATENT))):
            self.register_buffer(f"in{t}", (degree[:, None] >= order).float())
            self.register_buffer(f"out{t}", (order[:, None] > degree).float().repeat(2, 1))

    def warp(self, eps: Tensor, h: Tensor) -> tuple[Tensor, Tensor | float]:
        u, log_det = eps, torch.zeros(())
        for t in range(2):
            first, last, steps = self.first[t], self.last[t], dict(self.named_buffers())
            inside = F.linear(u, first.weight * steps[f"in{t}"], first.bias) + self.context[t](h)
            shift, gate = F.linear(inside.relu(), last.weight * steps[f"out{t}"], last.bias).chunk(2, -1)
            log_gain = F.logsigmoid(gate + 1.5)
            u, log_det = log_gain.exp() * u + shift, log_det + log_gain.sum()
        return u, log_det


HAND = {"diagonal-normal": ByHand, "full-normal": FullByHand, "inverse-autoregressive-flow": FlowByHand}


def by_hand(name: str, train: Tensor) -> Callable[[Tensor], float]:
    """One step of the loop by hand: loss, backward, fused Adam."""
    model = HAND[name]()
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, fused=True)

    def step(x: Tensor) -> float:
        optimiser.zero_grad(set_to_none=True)
        loss = model(x) * (len(train) / len(x))
        loss.backward()
        optimiser.step()
        return loss.item()

    return step


def with_dgm(name: str, train: Tensor) -> Callable[[Tensor], float]:
    """One step of `dgm.SVI`."""
    model = make_model(train)
    guide = attached([name], encoder=mlp(HIDDEN))[name](model, train[:1000])
    svi = dgm.SVI(model, guide, adam(LR), sizes={"data": len(train)})
    return lambda x: svi.step(x)


def cpu_time(names: list[str], train: Tensor, rounds: int, steps: int = 250) -> dict[str, Any]:
    """CPU milliseconds of a step with dgm and of the same loop by hand, in turns; the ratio is of the medians."""
    candidates = {f"{name}, by hand": by_hand(name, train) for name in names}
    candidates |= {name: with_dgm(name, train) for name in names}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    generator = torch.Generator().manual_seed(0)
    for turn in range(rounds + 1):
        for name, step in candidates.items():
            order = torch.randint(len(train), (steps, BATCH), generator=generator)
            start = time.process_time()
            for index in order:
                step(train[index])
            if turn:  # the first turn traces and warms up
                times[name].append((time.process_time() - start) / steps * 1e3)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    ratios = {name: round(medians[name] / medians[f"{name}, by hand"], 3) for name in names}
    return {"cpu_ms_a_step": {n: round(v, 3) for n, v in medians.items()}, "ratio_to_by_hand": ratios}


def likelihood(name: str, data: dgm.Dataset, epochs: int, seed: int) -> dict[str, Any]:
    """Train with one guide and estimate the NLL of every tenth test image."""
    train, test = data.train[0], data.test[0][::10]
    with preserved_rng(seed):
        model = make_model(train)
        guide = attached([name], encoder=mlp(HIDDEN))[name](model, train)
    fit = dgm.fit(model, guide, train, epochs=epochs, batch_size=BATCH, lr=LR, seed=seed)
    scores = dgm.evaluate(fit.model, fit.guide, test, num_samples=K).summary
    return {
        "guide": name, "seed": seed, "epochs": epochs, "nll": -scores["bound"], "nll_se": scores["bound_se"],
        "negative_elbo": -scores["elbo"], "khat_bad": scores["khat_bad"], "seconds": fit.seconds,
        "cpu_seconds": fit.cpu_seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", default="diagonal-normal,full-normal,inverse-autoregressive-flow")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="turns of the timing; 0 for none")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    names = options.guides.split(",")
    data = dgm.load("binarized-mnist", data_dir=options.data_dir)
    result: dict[str, Any] = {"protocol": __doc__, **provenance()}
    if options.rounds:
        result |= cpu_time(names, data.train[0], options.rounds)
        print(json.dumps({k: result[k] for k in ("cpu_ms_a_step", "ratio_to_by_hand")}), flush=True)
    result["rows"] = []
    for seed in range(options.seeds if options.epochs else 0):
        for name in names:
            result["rows"].append(likelihood(name, data, options.epochs, seed))
            print(json.dumps(result["rows"][-1]), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The VAE as one writes it in plain PyTorch: what dgm's steps are timed against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VAEByHand(nn.Module):
    """Bernoulli VAE with a diagonal normal encoder; `forward` is the negative ELBO of a batch, summed over its rows.

    Args:
        pixels, hidden, latent: widths of data, hidden layers and z; (200, 100) is x-200-100-z-100-200-x.
    """

    def __init__(self, pixels: int, hidden: Sequence[int], latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*_layers((pixels, *hidden)))
        self.loc, self.log_scale = nn.Linear(hidden[-1], latent), nn.Linear(hidden[-1], latent)
        self.decoder = nn.Sequential(*_layers((latent, *reversed(hidden))), nn.Linear(hidden[0], pixels))

    def warp(self, eps: Tensor, h: Tensor) -> tuple[Tensor, Tensor | float]:
        """What a family does with the noise, and its log-determinant; nothing here."""
        return eps, 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        loc, log_scale = self.loc(h), self.log_scale(h)
        eps = torch.randn_like(loc)
        u, log_det = self.warp(eps, h)
        z = loc + log_scale.exp() * u
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        # the same one-sample estimate of the ELBO as Trace_ELBO: log p(z) - log q(z)
        return reconstruction + (0.5 * z.square() - 0.5 * eps.square() - log_scale).sum() - log_det


def _layers(widths: Sequence[int]) -> list[nn.Module]:
    return [layer for m, n in pairwise(widths) for layer in (nn.Linear(m, n), nn.ReLU())]

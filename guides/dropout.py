"""Monte Carlo dropout: weights whose inputs are switched off at random, all else points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from dgm.distributions import sample_sites
from dgm.errors import GuideError, OptionError
from dgm.packing import Packing
from dgm.sites import DATA_PLATE

from .layers import global_sites, matrices_of, packed_start, spread

__all__ = ["Dropout"]


class Dropout(PyroModule):
    """W = M diag(m) / (1 - rate),  m_i ~ Bernoulli(1 - rate): each input of a layer is off with probability rate.

        objective = E_m[log p(y | w) + log p(w)]

    Y. Gal, Z. Ghahramani: Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning, 2016.
    One mask holds for all rows of a call, so that a draw is one network. Weights are the real global latents with two
    axes or more, (outputs, inputs, ...) as torch's layers have them; inputs of a convolution are its channels. All
    others (biases, scales) are points. The mean of W is M: the start is the network's own.

    It has no density (`has_density` is False) and its objective is no bound on the evidence: q puts all its mass on
    2^inputs points. For the prior N(0, s^2) the objective is the paper's up to a constant: E[log p(w)] =
    -(1 - rate) |M / (1 - rate)|^2 / (2 s^2) + ..., and the remaining terms of the authors' KL, the entropies of narrow
    normals about those points, do not depend on M. The rate is fixed; a constant that depends on the rate alone is
    left out, so that rates are not to be compared by this objective.

    It has as many parameters as there are weights, and a draw takes one uniform number for each input.

    Args:
        model: the model; only its sites are read.
        batch: a batch of data, as the model takes it.
        rate: probability that an input is off, 0 <= rate < 1.
        inputs: whether the first layer's inputs are switched off, too: those are the data.
        sites: names of the latents to serve; default all.
        init: constrained start values by site name; otherwise the model's `init_values()`, else the prior's median.
        plates: names of the data plates.

    Raises:
        OptionError: rate outside [0, 1).
        GuideError: a latent is local, a name is unknown, or there is no layer whose inputs could be off.
        ModelError: a latent is discrete.

    >>> from dgm.models.bnn import example
    >>> model, batch = example()
    >>> Dropout(model, *batch)(*batch)["network.2.weight"].shape
    torch.Size([1, 8])
    """

    has_density = False

    def __init__(
        self,
        model: Callable[..., Any],
        *batch: Any,
        rate: float = 0.1,
        inputs: bool = False,
        sites: Iterable[str] | None = None,
        init: Mapping[str, Tensor] | None = None,
        plates: Iterable[str] = (DATA_PLATE,),
    ) -> None:
        super().__init__()
        if not (isinstance(rate, int | float) and 0 <= rate < 1):
            raise OptionError(f"Dropout: rate is {rate!r}, expected 0 <= rate < 1")
        self.packing = Packing(global_sites(model, batch, sites, plates, "Dropout"))
        self.matrices = matrices_of(self.packing)
        if not self.matrices:
            raise GuideError(
                f"Dropout: none of the latents {[s.name for s in self.packing.sites]} is a real matrix, (outputs, "
                "inputs), whose inputs could be off: use Global or PerLayer"
            )
        self.rate = float(rate)
        self.dropped = list(self.matrices)[0 if inputs else 1 :]
        if not self.dropped:
            raise GuideError(
                f"Dropout: the only layer is {next(iter(self.matrices))!r}, and its inputs are the data: pass "
                "inputs=True to switch those off"
            )
        self.loc = nn.Parameter(packed_start(self.packing, model, batch, init).clone())  # (d,)

    def forward(self, *batch: Any, **kwargs: Any) -> dict[str, Tensor]:
        factors = {}
        for name in self.dropped:
            unit = dist.Uniform(self.loc.new_zeros(self.matrices[name].inputs), 1.0, validate_args=False).to_event(1)
            u = pyro.sample(f"_global_{name}", unit, infer={"is_auxiliary": True})  # (*S, inputs)
            kept = (u >= self.rate).to(self.loc.dtype) / (1 - self.rate)
            factors[name] = kept.unsqueeze(-2)  # (*S, 1, inputs)
        return sample_sites(self.packing, self.loc * spread(self.packing, self.matrices, factors), has_density=False)

"""Likelihoods p(x | output of a network), one exchangeable object for VAEs, deep latent Gaussians and BNNs."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm.errors import ModelError, OptionError

NOISE = "noise_scale"  # the site of a scale that is a global latent

# Pyro's distributions carry no types; the name says what is meant.
Distribution = Any


class Likelihood(nn.Module):
    """What every likelihood says: how many outputs it reads for each dimension, and what it makes of them.

    A network gives `outputs` numbers for each dimension of x. `parts` turns the last axis, of that length, into the
    named parameters of the density of one dimension; `distribution` turns these into a Pyro distribution;
    `forward` does both for the flat output (..., d * outputs) of a decoder. A BNN reads its network as one dimension.

    A new likelihood defines `outputs`, `parts`, `distribution`, `mean`, `draw` and `output_bias`.
    """

    outputs: int | None = 1  # None: as many as the network has

    def parts(self, raw: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Parameters of the density, from raw (..., outputs) and, where there is one, the latent noise scale ()."""
        raise NotImplementedError

    def distribution(self, parts: dict[str, Tensor]) -> Distribution:
        """The density of one dimension with these parameters."""
        raise NotImplementedError

    def mean(self, parts: dict[str, Tensor]) -> Tensor:
        """E[x] under these parameters, in the units of x."""
        raise NotImplementedError

    def draw(self, parts: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """x drawn with these parameters, outside of every Pyro program."""
        raise NotImplementedError

    def output_bias(self, x: Tensor) -> Tensor:
        """Raw outputs (d, outputs) that give each column of x (N, d) its own marginal density."""
        raise NotImplementedError

    def forward(self, output: Tensor) -> Distribution:
        """p(x | output) for a decoder's output (..., d * outputs): event shape (d,)."""
        return self.distribution(self.parts(self.split(output))).to_event(1)

    def split(self, output: Tensor) -> Tensor:
        """(..., d * outputs) -> (..., d, outputs)."""
        return output.unflatten(-1, (-1, cast(int, self.outputs)))

    def noise_prior(self, like: Tensor) -> Distribution | None:
        """Prior of a noise scale that is a global latent, with the dtype and device of `like`; None if it is not."""
        return None

    def noise(self, like: Tensor) -> Tensor | None:
        """Sample site "noise_scale", where this likelihood has one. Call it outside plates, or it becomes local."""
        prior = self.noise_prior(like)
        return None if prior is None else pyro.sample(NOISE, prior)

    def init_values(self, like: Tensor) -> dict[str, Tensor]:
        """Where a posterior approximation of the noise scale may start: its prior mean, or 1 where that is infinite."""
        prior = self.noise_prior(like)
        if prior is None:
            return {}
        try:
            mean = prior.mean.to(like)
        except NotImplementedError:
            mean = like.new_full((), torch.inf)
        return {NOISE: torch.where(torch.isfinite(mean), mean, torch.ones_like(mean))}

    def for_decoder(self) -> Likelihood:
        """A copy for a model whose weights are parameters, with its own parameters, or a ModelError."""
        if self.outputs is None:
            raise ModelError(f"{type(self).__name__}(): a decoder needs the number of levels; give Categorical(levels)")
        if self.noise_prior(torch.zeros(())) is not None:
            raise ModelError(
                'Normal(scale=<a prior>): expected scale "learned", "predicted" or a number in a model whose decoder '
                "weights are parameters, got a distribution; a prior on the noise scale belongs in a BNN"
            )
        return copy.deepcopy(self)

    def bayesian(self) -> Likelihood:
        """A copy for a model whose weights are latent: what it would learn has a prior instead."""
        return copy.deepcopy(self)


class BernoulliLogits(dist.Bernoulli):
    """Bernoulli by its logits, with log p(x) = x f - softplus(f): two passes over the pixels where torch makes ten.

    >>> f, x = torch.randn(5), torch.ones(5)
    >>> torch.allclose(BernoulliLogits(logits=f).log_prob(x), dist.Bernoulli(logits=f).log_prob(x), atol=1e-6)
    True
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return value * self.logits - F.softplus(self.logits)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BernoulliLogits:
        new = self._get_checked_instance(BernoulliLogits, _instance)
        return super().expand(batch_shape, _instance=new)


class Bernoulli(Likelihood):
    """x_i | f ~ Bernoulli(sigmoid(f_i)), x_i in {0, 1}.

    >>> Bernoulli()(torch.zeros(5, 3)).event_shape
    torch.Size([3])
    """

    outputs = 1

    def parts(self, raw: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": raw.squeeze(-1)}

    def distribution(self, parts: dict[str, Tensor]) -> Distribution:
        return BernoulliLogits(logits=parts["logits"])

    def mean(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["logits"].sigmoid()

    def draw(self, parts: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(parts), generator=generator)

    def output_bias(self, x: Tensor) -> Tensor:
        return x.mean(0).clamp(0.001, 0.999).logit().unsqueeze(-1)


class Normal(Likelihood):
    """x_i | f ~ N(f_i, s_i^2), where the scale s is learned, predicted by the network, known, or latent.

    Args:
        scale: "learned": s = floor + exp(log_scale), one parameter for all dimensions or, with `features`, one for
            each. In a BNN, where everything learned is latent, it is a global latent at site "noise_scale" with
            prior LogNormal(-1, 1): median 0.37 and 95 % in (0.05, 2.6), meant for targets of unit variance.
            "predicted": s = floor + softplus(second output), heteroscedastic noise.
            A positive number: known. A Pyro distribution on positive numbers: the prior of a global latent scale (BNN).
        features: number of learned scales, None for one shared by all dimensions.
        floor: lower bound of a learned or predicted scale, in units of x; without one the likelihood has no maximum
            when a column is constant.

    Raises:
        OptionError: `scale`, `features` or `floor` out of its domain.

    >>> Normal(scale="predicted")(torch.zeros(5, 6)).event_shape
    torch.Size([3])
    """

    def __init__(
        self,
        scale: Literal["learned", "predicted"] | float | Distribution = "learned",
        features: int | None = None,
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        if not floor >= 0:
            raise OptionError(f"Normal(floor={floor!r}): expected a number >= 0")
        if features is not None and features < 1:
            raise OptionError(f"Normal(features={features!r}): expected a positive number of scales, or None")
        self.floor = floor
        self.log_scale: nn.Parameter | None = None
        self.known: float | None = None
        self.latent = False
        self.prior: Distribution | None = None
        if scale == "learned":
            self.log_scale = nn.Parameter(torch.zeros(() if features is None else (features,)))
        elif scale == "predicted":
            self.outputs = 2
        elif hasattr(scale, "log_prob"):
            self.latent, self.prior = True, _positive_prior(scale)
        elif isinstance(scale, int | float) and 0 < scale < float("inf"):
            self.known = float(scale)
        else:
            raise OptionError(
                f'Normal(scale={scale!r}): expected "learned", "predicted", a finite number > 0 or a distribution'
            )

    def parts(self, raw: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        loc = raw[..., 0]
        if noise is not None:
            return {"loc": loc, "scale": noise}
        if self.log_scale is not None:
            return {"loc": loc, "scale": self.floor + self.log_scale.exp()}
        if self.known is not None:
            return {"loc": loc, "scale": loc.new_full((), self.known)}
        return {"loc": loc, "scale": self.floor + F.softplus(raw[..., 1])}

    def distribution(self, parts: dict[str, Tensor]) -> Distribution:
        return dist.Normal(parts["loc"], parts["scale"])

    def mean(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["loc"]

    def draw(self, parts: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        loc = parts["loc"]
        eps = torch.randn(loc.shape, generator=generator, dtype=loc.dtype, device=loc.device)
        return loc + parts["scale"] * eps

    def output_bias(self, x: Tensor) -> Tensor:
        if self.outputs == 1:
            return x.mean(0).unsqueeze(-1)
        excess = (x.std(0, correction=0) - self.floor).clamp_min(1e-3)
        return torch.stack([x.mean(0), excess + (-(-excess).expm1()).log()], -1)  # inverse of softplus

    def bayesian(self) -> Likelihood:
        twin = copy.deepcopy(self)
        if self.log_scale is not None:
            if self.log_scale.ndim:
                raise ModelError("Normal(features=...): a BNN has one noise scale for its one target; leave it out")
            twin.log_scale, twin.latent = None, True
        return twin

    def noise_prior(self, like: Tensor) -> Distribution | None:
        if not self.latent:
            return None
        return dist.LogNormal(like.new_full((), -1.0), 1.0) if self.prior is None else self.prior


class Categorical(Likelihood):
    """x_i | f ~ Categorical(softmax(f_i)), x_i an integer in 0 .. levels - 1: pixels of a few grey levels, or classes.

    Args:
        levels: number of levels, >= 2; a decoder needs d * levels outputs. None in a BNN: as many classes as the
            network has outputs.

    Raises:
        OptionError: fewer than two levels.

    >>> Categorical(4)(torch.zeros(5, 12)).event_shape
    torch.Size([3])
    """

    def __init__(self, levels: int | None = None) -> None:
        super().__init__()
        if levels is not None and levels < 2:
            raise OptionError(f"Categorical(levels={levels!r}): expected at least 2 levels")
        self.outputs = levels

    def parts(self, raw: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": raw}

    def distribution(self, parts: dict[str, Tensor]) -> Distribution:
        return dist.Categorical(logits=parts["logits"])

    def mean(self, parts: dict[str, Tensor]) -> Tensor:
        probs = parts["logits"].softmax(-1)
        return probs @ torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)

    def draw(self, parts: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        probs = parts["logits"].softmax(-1)
        return torch.multinomial(probs.flatten(0, -2), 1, generator=generator).reshape(probs.shape[:-1])

    def output_bias(self, x: Tensor) -> Tensor:
        levels = cast(int, self.outputs)
        counts = F.one_hot(x.long(), levels).sum(0) + 1.0  # one more of each, so that no level starts impossible
        return counts.log() - counts.sum(-1, keepdim=True).log()


def _positive_prior(prior: Distribution) -> Distribution:
    lower = getattr(prior.support, "lower_bound", None)
    if tuple(prior.shape()) != () or lower is None or bool(torch.as_tensor(lower < 0).any()):
        raise OptionError(
            f"Normal(scale={prior}): expected a scalar distribution on positive numbers, as LogNormal(-1, 1)"
        )
    return prior

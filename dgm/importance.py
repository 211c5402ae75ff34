"""Bounds of several samples: importance weighted, Renyi, and reweighted wake-sleep; right in minibatches.

The weights of a row are its own, w_kn = p(x_n, z_kn) / q(z_kn | x_n), and the factor N/B of a minibatch stands in front
of the sum over rows, never inside a logarithm. A latent that all rows share has no such weights: it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map

from .errors import ModelError, OptionError
from .objectives import Objective, apart, choose, refuse_unscorable, stochastic, with_value
from .particles import Draws, Programs, over_particles
from .terms import LIKELIHOOD, POSTERIOR, PRIOR, Terms, factors_of, sample_sites_of, terms_of


class ImportanceELBO(Objective):
    """-sum_n (N/B) log (1/K) sum_k w_kn, the importance weighted bound, by a choice of gradient estimators.

    "pathwise": Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016; the signal of the guide falls
    as K grows (Rainforth et al., "Tighter variational bounds are not necessarily better", 2018). "dreg": doubly
    reparameterised, for which it rises: sum_k v_k^2 dlog w_k/dz dz/dphi with v the normalised weights (Tucker, Lawson,
    Gu and Maddison, "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives", 2019).

    Args:
        samples: K, draws for each row.
        estimator: "pathwise" or "dreg"; the model's gradient is the same.
        draws: what the particles have in common, see `Objective`.

    Raises:
        OptionError: samples < 1, or an unknown name.
        ModelError: in a step, where a latent is global, or a site has no pathwise gradient.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5 ** 0.5))
    >>> x = torch.tensor([0.0, 1.0])
    >>> loss = ImportanceELBO(8, estimator="dreg").loss(model, guide, x)
    >>> abs(loss + float(dist.Normal(0.0, 2.0 ** 0.5).log_prob(x).sum())) < 1e-5
    True
    """

    alpha = 0.0
    name = "the importance weighted bound"

    def __init__(
        self,
        samples: int = 8,
        *,
        estimator: Literal["pathwise", "dreg"] = "pathwise",
        draws: Draws = "independent",
    ):
        super().__init__(samples, draws)
        choose("estimator", estimator, ("pathwise", "dreg"))
        self.estimator = estimator

    def loss_of(self, programs: Programs) -> Tensor:
        if self.estimator == "dreg":
            apart(programs, "dreg")
            return self._doubly(programs)
        return self._pathwise(programs)

    def _pathwise(self, programs: Programs) -> Tensor:
        terms, factors = _terms(programs, self.num_particles, self.draws, self.name)
        return -_sum(terms, factors, lambda log_w: self._bound(log_w), programs.kl_weight)

    def _bound(self, log_w: Tensor) -> Tensor:
        """`(K, B)` to `(B,)`."""
        power = 1.0 - self.alpha
        return (torch.logsumexp(power * log_w, 0) - math.log(len(log_w))) / power

    def _doubly(self, programs: Programs) -> Tensor:
        """v^(power) in front of the model's gradient, v^2 (generally alpha v + (1 - alpha) v^2) in front of z's."""
        count, factors = self.num_particles, {}

        def draw() -> dict[str, Tensor]:
            guide = programs.trace_guide()
            refuse_unscorable(guide, self.estimator)
            return stochastic(guide)

        values = programs.each(count, draw, programs.noise(count, self.draws))
        if not values:  # nothing is drawn: all particles are one
            return self._pathwise(programs)
        fixed = _constant(values)

        def log_weights(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            def one(values: Mapping[str, Tensor]) -> Terms:
                guide = programs.guide_at(values, detach=True)
                model = programs.trace_model(guide)
                factors.update(factors_of(model, programs.plates))
                return terms_of(model, guide, programs.plates)

            many = over_particles(one) if programs.draws is not None else None
            terms = many(values) if many is not None else programs.each(count, one, None, values)
            return {plate: _log_w(three.unbind(1), programs.kl_weight) for plate, three in terms.rows.items()}

        _refuse_global(programs.guide_at(tree_map(lambda t: t[0], fixed), detach=True), programs.plates, self.name)
        log_w, back = torch.func.vjp(log_weights, fixed)  # type: ignore[misc]  # two where nothing is auxiliary
        weights = {plate: torch.softmax((1 - self.alpha) * w.detach(), 0) for plate, w in log_w.items()}
        above = {p: factors[p] * (self.alpha * v + (1 - self.alpha) * v.square()) for p, v in weights.items()}
        (slope,) = back({plate: v.detach() for plate, v in above.items()})
        value = sum(factors[plate] * self._bound(w).sum() for plate, w in log_w.items())
        surrogate = sum(factors[plate] * (weights[plate] * w).sum() for plate, w in log_w.items())
        surrogate = surrogate + sum((slope[name].detach() * z).sum() for name, z in values.items())
        return -with_value(torch.as_tensor(value), torch.as_tensor(surrogate))


class RenyiELBO(ImportanceELBO):
    """-sum_n (N/B) 1/(1 - alpha) log (1/K) sum_k w_kn^(1 - alpha), the variational Renyi bound.

    Li and Turner, "Renyi Divergence Variational Inference", 2016. alpha = 0 is the importance weighted bound, alpha
    towards 1 the ELBO; 0 <= alpha < 1 are lower bounds in the mean, alpha < 0 is none at finite K.

    Args:
        alpha: order of the divergence, any finite number but 1.
        samples, draws: see `ImportanceELBO`.
        estimator: "pathwise"; or "dreg", with the weights of Tucker et al., 2019, for a power.

    Raises:
        OptionError: alpha is 1 or not finite.

    >>> RenyiELBO(0.5, 4).num_particles
    4
    """

    name = "the Renyi bound"

    def __init__(
        self,
        alpha: float = 0.5,
        samples: int = 8,
        *,
        estimator: Literal["pathwise", "dreg"] = "pathwise",
        draws: Draws = "independent",
    ):
        super().__init__(samples, estimator=estimator, draws=draws)
        if not math.isfinite(alpha) or alpha == 1:
            raise OptionError(f"alpha is {alpha!r}, expected a finite number other than 1; at 1 the bound is ELBO()")
        self.alpha = float(alpha)


class ReweightedWakeSleep(Objective):
    """The importance weighted bound for the model; for the guide KL(p || q), which needs no pathwise gradient.

    Model: sum_k v_k grad log p(x, z_k). Guide: sum_k v_k grad log q(z_k | x) ("wake"), and, in the proportion `sleep`,
    grad log q(z | x) at x, z drawn from the model ("sleep"). Serves discrete latents as it does continuous ones.
    Bornschein and Bengio, "Reweighted Wake-Sleep", 2015; Le et al., "Revisiting Reweighted Wake-Sleep for Models with
    Stochastic Control Flow", 2019.

    Args:
        samples: K, draws for each row; at least 2, for with one all weights are 1.
        sleep: share of the sleep phase in the guide's gradient, in [0, 1].
        draws: see `Objective`.

    Raises:
        OptionError: samples < 2, or sleep outside of [0, 1].
        ModelError: in a step, where a latent is global; or with sleep, where no argument of the model is its data.

    >>> ReweightedWakeSleep(16).num_particles
    16
    """

    name = "reweighted wake-sleep"

    def __init__(self, samples: int = 8, *, sleep: float = 0.0, draws: Draws = "independent"):
        super().__init__(samples, draws)
        if samples < 2:
            raise OptionError(f"samples is {samples}, expected at least 2: one weight alone is always 1")
        if not 0 <= sleep <= 1:
            raise OptionError(f"sleep is {sleep!r}, expected a share in [0, 1]")
        self.sleep = float(sleep)

    def loss_of(self, programs: Programs) -> Tensor:
        apart(programs, self.name)
        terms, factors = _terms(programs, self.num_particles, self.draws, self.name, scored=True)
        value, surrogate = torch.zeros(()), torch.zeros(())
        for plate, three in terms.rows.items():  # (K, 3, B)
            log_w = _log_w(three.unbind(1), programs.kl_weight)
            weights = torch.softmax(log_w.detach(), 0)
            value = value + factors[plate] * (torch.logsumexp(log_w, 0) - math.log(len(log_w))).sum()
            wake = (1 - self.sleep) * three[:, POSTERIOR] + three[:, LIKELIHOOD] + three[:, PRIOR]
            surrogate = surrogate + factors[plate] * (weights * wake).sum()
        shared = terms.shared[:, LIKELIHOOD] + terms.shared[:, PRIOR]
        value, surrogate = value + shared.mean(), surrogate + shared.mean()
        if self.sleep:
            surrogate = surrogate + self.sleep * self._dream(programs)
        return -with_value(value, surrogate)

    @staticmethod
    def _dream(programs: Programs) -> Tensor:
        """log q of the latents of rows that the model drew, scaled as the rows are."""
        with torch.no_grad():
            dream: Any = poutine.trace(poutine.uncondition(programs.model)).get_trace(*programs.batch)
        real = programs.trace_model(programs.trace_guide())
        batch = list(programs.batch)
        places = {id(item): i for i, item in enumerate(batch) if isinstance(item, Tensor)}
        found = False
        for name, node in sample_sites_of(real):
            if node["is_observed"] and id(node["value"]) in places:
                batch[places[id(node["value"])]] = dream.nodes[name]["value"].detach()
                found = True
        if not found:
            raise ModelError(
                "sleep needs an argument of the model that is observed as it stands (obs=x), to put dreams in its "
                "place: use sleep=0"
            )
        latents: dict[str, Tensor] = {n: v["value"].detach() for n, v in sample_sites_of(dream)}
        asleep = Programs(programs.model, programs.guide, programs.home, batch, programs.plates)
        guide = asleep.guide_at(_guided(latents, asleep), detach=False)
        guide.compute_log_prob()
        model = poutine.trace(poutine.replay(programs.model, trace=guide)).get_trace(*batch)
        terms, factors = terms_of(model, guide, programs.plates), factors_of(model, programs.plates)
        return sum((factors[p] * t[POSTERIOR].sum() for p, t in terms.rows.items()), torch.zeros(()))


def _constant(tree: Any) -> Any:
    return tree_map(lambda t: t.detach(), tree)


def _guided(latents: Mapping[str, Tensor], programs: Programs) -> dict[str, Tensor]:
    """The values of the guide's own sites at which the model's latents have these values."""
    with torch.no_grad():
        trace = programs.trace_guide()
    values = {}
    for name in stochastic(trace):
        node: Any = trace.nodes[name]
        packing = node["infer"].get("packing")
        values[name] = packing.pack(latents) if packing is not None else latents[name]
    return values


def _terms(
    programs: Programs, count: int, draws: Draws, name: str, *, scored: bool = False
) -> tuple[Terms, dict[str, Any]]:
    """Terms of K particles; `scored` holds the draws fixed, so that log q has its own gradient alone."""
    factors: dict[str, Any] = {}

    def one() -> Terms:
        guide = programs.trace_guide()
        if scored:
            guide = programs.guide_at({n: v.detach() for n, v in stochastic(guide).items()}, detach=False)
        else:
            refuse_unscorable(guide, "pathwise")
        _refuse_global(guide, programs.plates, name)
        model = programs.trace_model(guide)
        factors.update(factors_of(model, programs.plates))
        return terms_of(model, guide, programs.plates)

    return programs.each(count, one, programs.noise(count, draws)), factors


def _refuse_global(guide: poutine.Trace, plates: Mapping[str, Any], name: str) -> None:
    for site, node in sample_sites_of(guide):
        inside = any(frame.name in plates for frame in node["cond_indep_stack"])
        if not inside and not node["infer"].get("is_auxiliary"):
            raise ModelError(
                f"latent {site!r} is global, and {name} of all rows needs its weight over all rows at once: with N/B "
                "inside of the logarithm a minibatch gives no bound, it can lie above the evidence. Use ELBO for it, "
                "or make it a parameter of the model"
            )


def _log_w(three: Any, kl_weight: Any) -> Tensor:
    return three[LIKELIHOOD] + kl_weight * (three[PRIOR] - three[POSTERIOR])


def _sum(terms: Terms, factors: Mapping[str, Any], bound: Any, kl_weight: Any) -> Tensor:
    total = (terms.shared[:, LIKELIHOOD] + terms.shared[:, PRIOR]).mean()  # the model's own terms outside of the data
    for plate, three in terms.rows.items():
        total = total + factors[plate] * bound(_log_w(three.unbind(1), kl_weight)).sum()
    return total


__all__ = ["ImportanceELBO", "RenyiELBO", "ReweightedWakeSleep"]

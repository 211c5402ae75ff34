"""Objectives: what a step descends. Each is a Pyro loss; `dgm.SVI` and `pyro.infer.SVI` take them alike.

The value of a loss is always the negative bound it is named after; what the estimators differ in is the gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor, nn

from .analytic import closed_form, group_means
from .errors import GuideError, ModelError, OptionError
from .layer_noise import LAYER_NOISE, LayerNoise, layer_noise
from .particles import DRAWS, Draws, Programs
from .programs import announce, owner
from .sites import DATA_PLATE
from .terms import LIKELIHOOD, POSTERIOR, PRIOR, Terms, by_row, factors_of, frames_of, sample_sites_of, terms_of


class Objective(pyro.infer.ELBO):
    """Base of the objectives: `loss_of(programs)` is the negative bound, with the gradient that its estimator means.

    Args:
        num_particles: draws of the latents for each datum.
        draws: what the particles have in common: "independent", "antithetic", "sobol" or "stratified"; see
            `dgm.particles.particle_noise`.

    Raises:
        OptionError: num_particles < 1, or an unknown name.
    """

    def __init__(self, num_particles: int = 1, draws: Draws = "independent"):
        if isinstance(num_particles, bool) or not isinstance(num_particles, int) or num_particles < 1:
            raise OptionError(f"the number of particles is {num_particles!r}, expected a whole number, at least 1")
        choose("draws", draws, DRAWS)
        super().__init__(num_particles=num_particles)
        self.draws: Draws = draws

    def loss_of(self, programs: Programs) -> Tensor:
        raise NotImplementedError

    # --- what Pyro asks of a loss ------------------------------------------------------------------------------------

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[poutine.Trace, poutine.Trace]:
        guided = poutine.trace(guide).get_trace(*args, **kwargs)
        return poutine.trace(poutine.replay(model, trace=guided)).get_trace(*args, **kwargs), guided

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of two programs on rows that are all the data, or whose plate declares its full size."""
        home = nn.ModuleList(m for m in (owner(model), owner(guide)) if m is not None)
        bind: Callable[[Any], Any] = lambda program: lambda *batch: program(*batch, **kwargs)  # noqa: E731
        programs = Programs(bind(model), bind(guide), home, args, {DATA_PLATE: None})
        with warnings.catch_warnings():
            # Pyro's modules say so of parameters that an estimator holds constant for one term
            warnings.filterwarnings("ignore", message=".*was not registered in the param store")
            programs.draws = programs.record()
            announce(dict(home.named_parameters()))
            return self.loss_of(programs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


def choose(name: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse an option that is none of the known ones."""
    if value not in known:
        raise OptionError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")


def stochastic(trace: poutine.Trace, only: Callable[[Any], bool] = lambda node: True) -> dict[str, Tensor]:
    """The values that a guide drew: those of its sites that are no function of other sites."""
    return {
        name: node["value"]
        for name, node in sample_sites_of(trace)
        if not isinstance(node["fn"], Delta) and not node["is_observed"] and only(node)
    }


def with_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """The number of one, the gradient of the other."""
    return value.detach() + (surrogate - surrogate.detach())


def apart(programs: Programs, estimator: str) -> None:
    """Refuse an estimator that changes or leaves out the gradient of log q where a reverse model learns by it.

    Raises:
        GuideError: the guide says that it holds a reverse density.
    """
    for part in programs.home.modules() if programs.home is not None else ():
        if getattr(part, "reverse_density", False):
            raise GuideError(
                f"{type(part).__name__} learns a reverse density through its log q, which {estimator!r} would train "
                'wrongly or not at all: use ELBO or ImportanceELBO with estimator="pathwise"'
            )


def refuse_unscorable(guide: poutine.Trace, estimator: str) -> None:
    """Refuse a pathwise estimator where a site has no pathwise gradient.

    Raises:
        ModelError: naming the site.
    """
    for name, node in sample_sites_of(guide):
        if not node["is_observed"] and not getattr(node["fn"], "has_rsample", False):
            raise ModelError(
                f"site {name!r} of the guide ({type(node['fn']).__name__}) has no pathwise gradient, which "
                f'estimator="{estimator}" needs: use ELBO(estimator="mixed", particles=2) or ReweightedWakeSleep, or '
                "sum it out with TraceEnum_ELBO"
            )


Estimator = Literal["pathwise", "stl", "score", "mixed"]
ESTIMATORS: tuple[Estimator, ...] = ("pathwise", "stl", "score", "mixed")


class ELBO(Objective):
    """-E_q[sum_n (N/B) (log p(x_n | z_n) - beta KL_n)], the evidence lower bound, by a choice of gradient estimators.

    "pathwise": reparameterised (Kingma and Welling, "Auto-Encoding Variational Bayes", 2014). "stl": sticking the
    landing, pathwise without the gradient of log q's parameters, whose mean is zero; no variance at the exact posterior
    (Roeder, Wu and Duvenaud, "Sticking the Landing", 2017). "score": the score function, (f - b) grad log q, with the
    mean of the other particles as baseline (Williams, 1992; Kool, van Hoof and Welling, "Buy 4 REINFORCE samples, get a
    baseline for free!", 2019); a row's signal holds its own terms alone. "mixed": the score function for the sites
    without a pathwise gradient, such as discrete ones, pathwise for the others.

    Args:
        particles: draws for each datum, averaged.
        estimator: one of those.
        kl: "sampled", or "analytic" where guide and prior have a closed form; the others stay sampled.
        free_bits: nats below which a group's KL, averaged over the minibatch, has no gradient:
            sum_j max(free_bits, mean_n KL_nj) (Kingma et al., "Improving Variational Inference with Inverse
            Autoregressive Flow", 2016, C.8). The value of the loss is without them.
        groups: of free bits: "site", one for each site that the guide draws, or "dimension", one for each coordinate,
            which needs kl="analytic".
        layer_noise: "shared", one draw of the weights for all rows; "local", the local reparameterisation (Kingma,
            Salimans and Welling, 2015); "flipout" (Wen, Vicol, Ba, Tran and Grosse, 2018); see `dgm.layer_noise`.
        draws: what the particles have in common, see `Objective`.

    Raises:
        OptionError: a number or name out of its domain, or two options that exclude each other.
        ModelError, GuideError: in a step, where the guide has no such gradient; the message names the site.

    >>> import pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5 ** 0.5))
    >>> x = torch.tensor([0.0, 1.0])
    >>> loss = ELBO(particles=4, estimator="stl").loss(model, guide, x)
    >>> abs(loss + float(dist.Normal(0.0, 2.0 ** 0.5).log_prob(x).sum())) < 1e-5
    True
    """

    def __init__(
        self,
        particles: int = 1,
        *,
        estimator: Estimator = "pathwise",
        kl: Literal["sampled", "analytic"] = "sampled",
        free_bits: float = 0.0,
        groups: Literal["site", "dimension"] = "site",
        layer_noise: LayerNoise = "shared",
        draws: Draws = "independent",
    ):
        super().__init__(particles, draws)
        choose("estimator", estimator, ESTIMATORS)
        choose("kl", kl, ("sampled", "analytic"))
        choose("groups", groups, ("site", "dimension"))
        choose("layer_noise", layer_noise, LAYER_NOISE)
        if isinstance(free_bits, bool) or not 0 <= free_bits < float("inf"):
            raise OptionError(f"free_bits is {free_bits!r}, expected nats >= 0")
        if estimator != "pathwise" and (kl == "analytic" or free_bits):
            raise OptionError(f'estimator={estimator!r} is for a sampled KL without free bits: use "pathwise"')
        if layer_noise != "shared" and draws != "independent":
            raise OptionError(f"layer_noise={layer_noise!r} draws for each layer anew: draws must be 'independent'")
        if groups == "dimension" and free_bits and kl != "analytic":
            raise OptionError('free bits for each dimension need the KL of each: give kl="analytic"')
        self.estimator, self.kl, self.free_bits, self.groups = estimator, kl, float(free_bits), groups
        self.layer_noise: LayerNoise = layer_noise

    def loss_of(self, programs: Programs) -> Tensor:
        if self.estimator != "pathwise":
            apart(programs, self.estimator)
        if self.estimator in ("score", "mixed"):
            return self._score(programs)
        factors: dict[str, Any] = {}
        rows: dict[str, int] = {}

        def one() -> tuple[Tensor, dict[str, Tensor]]:
            with layer_noise(self.layer_noise):
                guide = programs.trace_guide()
                refuse_unscorable(guide, self.estimator)
                model = programs.trace_model(guide)
            density = programs.guide_at(stochastic(guide), detach=True) if self.estimator == "stl" else guide
            exact = closed_form(model, guide) if self.kl == "analytic" else None
            terms = terms_of(model, density, programs.plates, exact.by_site if exact is not None else None)
            factors.update(factors_of(model, programs.plates))
            bound = elbo_of(terms, factors, programs.kl_weight)
            groups = group_means(model, guide, exact, programs.plates, self.groups) if self.free_bits else {}
            rows.update({frame.name: frame.size for frame in frames_of(model, programs.plates)})
            return bound, groups

        own = self.layer_noise != "shared"  # the layers draw noise on the way, so that particles run one by one
        noise = None if own else programs.noise(self.num_particles, self.draws)
        bounds, groups = programs.each(self.num_particles, one, noise)
        bound = freed = bounds.mean()
        for plate, means in groups.items():  # (K, groups)
            kl = means.mean(0)
            lost = (kl.clamp(min=self.free_bits) - kl).sum()
            freed = freed - programs.kl_weight * factors[plate] * rows[plate] * lost
        return -with_value(bound, freed) if groups else -bound

    def _score(self, programs: Programs) -> Tensor:
        """f = log p - log q as the signal of grad log q, and its own pathwise gradient where a site has one."""
        every = self.estimator == "score"
        factors: dict[str, Any] = {}

        def one() -> tuple[Terms, Terms]:
            drawn = programs.trace_guide()
            scored = lambda node: every or not getattr(node["fn"], "has_rsample", False)  # noqa: E731
            values = {n: v.detach() if scored(drawn.nodes[n]) else v for n, v in stochastic(drawn).items()}
            guide = programs.guide_at(values, detach=False)
            model = programs.trace_model(guide)
            terms = terms_of(model, guide, programs.plates)
            factors.update(factors_of(model, programs.plates))
            for name, node in sample_sites_of(guide):
                if name in values and not scored(drawn.nodes[name]):
                    node["log_prob"] = torch.zeros_like(node["log_prob"])
                elif isinstance(node["fn"], Delta):
                    node["log_prob"] = torch.zeros_like(torch.as_tensor(node["log_prob"]))  # no parameters in it
            return terms, _posterior(guide, programs.plates, terms)

        terms, score = programs.each(self.num_particles, one, programs.noise(self.num_particles, self.draws))
        bound = torch.zeros(())
        signals: dict[str, Tensor] = {}
        for plate, three in terms.rows.items():  # (K, 3, B)
            signals[plate] = _elbo_of_part(three.unbind(1), programs.kl_weight)  # (K, B)
            bound = bound + factors[plate] * signals[plate].sum(-1)
        shared = _elbo_of_part(terms.shared.unbind(1), programs.kl_weight)  # (K,)
        bound = bound + shared
        surrogate = bound
        for plate, signal in signals.items():
            surrogate = surrogate + factors[plate] * (_centred(signal) * score.rows[plate][:, POSTERIOR]).sum(-1)
        surrogate = surrogate + _centred(bound) * score.shared[:, POSTERIOR]
        return -with_value(bound.mean(), surrogate.mean())


def _posterior(guide: poutine.Trace, plates: Mapping[str, Any], like: Terms) -> Terms:
    """The terms of log q alone, as the guide's nodes hold them now, in the shapes of `like`."""
    rows, shared = {name: torch.zeros_like(t) for name, t in like.rows.items()}, torch.zeros_like(like.shared)
    unit = torch.eye(3, dtype=like.shared.dtype, device=like.shared.device)[POSTERIOR]
    for _, node in sample_sites_of(guide):
        plate, values = by_row(node, torch.as_tensor(node["log_prob"]), plates)
        if plate is None:
            shared = shared + unit * values
        else:
            rows[plate] = rows[plate] + unit[:, None] * values
    return Terms(rows, shared)


def _centred(signal: Tensor) -> Tensor:
    """The signal less the mean of the other particles, `(K, ...)`: as f_k - mean_(j != k) f_j; a constant."""
    signal = signal.detach()
    count = len(signal)
    return signal if count == 1 else (signal - signal.mean(0)) * (count / (count - 1))


def _elbo_of_part(three: Sequence[Tensor], kl_weight: Any) -> Tensor:
    return three[LIKELIHOOD] + kl_weight * (three[PRIOR] - three[POSTERIOR])


def elbo_of(terms: Terms, factors: Mapping[str, Any], kl_weight: Any) -> Tensor:
    """The scaled ELBO of one run."""
    total = _elbo_of_part(terms.shared.unbind(0), kl_weight)
    for plate, three in terms.rows.items():
        total = total + factors[plate] * _elbo_of_part(three.unbind(0), kl_weight).sum()
    return total


__all__ = ["ELBO", "Objective"]

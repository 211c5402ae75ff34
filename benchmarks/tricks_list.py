"""The tricks of the suite `tricks`: what each is, who proposed it, and what on and off mean for each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .tricks_models import DIABETES, DIGITS, FREY, OWN, PLAIN, YACHT, Settings

BOTH, TWO_VAES, TWO_BNNS = (DIGITS, YACHT), (DIGITS, FREY), (YACHT, DIABETES)
SIMPLE = "plain"
CONTROL = "another seed"


@dataclass(frozen=True)
class Trick:
    """A tip, switched on and off on two models.

    says: in one sentence. reference: authors, title, year. on, off: settings that differ. own: of "on" for one model.
    tasks: models that it is tried on.
    """

    name: str
    says: str
    reference: str
    on: Mapping[str, Any]
    off: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: tuple[str, ...] = BOTH

    def settings(self, task: str) -> tuple[Settings, Settings]:
        """Off and on, as differences to the plain model."""
        return dict(self.off), {**self.on, **self.own.get(task, {})}


TRICKS = (
    Trick(
        "narrow start of q",
        "q starts with a small standard deviation (codes 0.1, weights 0.02); off: at the prior's, which is 1",
        "Blundell, Cornebise, Kavukcuoglu, Wierstra, Weight Uncertainty in Neural Networks, 2015",
        {"init_scale": 0.1}, {"init_scale": 1.0}, {YACHT: {"init_scale": 0.02}},
    ),
    Trick(
        "KL warm-up",
        "the weight of the KL rises from 0 to 1 over the first third of the steps",
        "Bowman, Vilnis, Vinyals, Dai, Jozefowicz, Bengio, Generating Sentences from a Continuous Space, 2016",
        {"warmup": 0.333},
    ),
    Trick(
        "free bits",
        "the KL of a dimension has no gradient below 0.2 nats; off: the same KL in closed form without them",
        "Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016",
        {"kl": "analytic", "free_bits": 0.2}, {"kl": "analytic"}, tasks=TWO_VAES,
    ),
    Trick(
        "five particles",
        "the ELBO of a step is the mean over five draws of q; off: one",
        "Mohamed, Rosca, Figurnov, Mnih, Monte Carlo Gradient Estimation in Machine Learning, 2020",
        {"particles": 5},
    ),
    Trick(
        "sticking the landing",
        "the gradient leaves out the score of q, whose mean is zero",
        "Roeder, Wu, Duvenaud, Sticking the Landing, 2017",
        {"estimator": "stl"},
    ),
    Trick(
        "DReG",
        "the five-sample importance bound by its doubly reparameterised gradient; off: the same bound, pathwise",
        "Tucker, Lawson, Gu, Maddison, Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, 2019",
        {"objective": "importance", "particles": 5, "estimator": "dreg"}, {"objective": "importance", "particles": 5},
        tasks=TWO_VAES,
    ),
    Trick(
        "local reparameterisation",
        "a layer draws its outputs for each row instead of one draw of the weights for all rows",
        "Kingma, Salimans, Welling, Variational Dropout and the Local Reparameterization Trick, 2015",
        {"layer_noise": "local"}, tasks=TWO_BNNS,
    ),
    Trick(
        "output bias from data",
        "the decoder's last bias starts where it gives the mean of each pixel",
        "Burda, Grosse, Salakhutdinov, Importance Weighted Autoencoders, 2016",
        {"output_bias": True}, tasks=TWO_VAES,
    ),
    Trick(
        "learning-rate decay",
        "the step size falls to 0 by a cosine; off: it stays",
        "Loshchilov, Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017",
        {"decay": "cosine"},
    ),
    Trick(
        "gradient clipping",
        "the gradient is cut to the norm 4 for each row, which about half of the plain steps exceed",
        "Pascanu, Mikolov, Bengio, On the Difficulty of Training Recurrent Neural Networks, 2013",
        {"clip": 4.0},
    ),
    Trick(
        "batch normalisation",
        "in the hidden layer of encoder and decoder",
        "Sonderby, Raiko, Maaloe, Sonderby, Winther, Ladder Variational Autoencoders, 2016",
        {"batch_norm": True}, tasks=TWO_VAES,
    ),
    Trick(
        "prior width by fan-in",
        "weights have the prior N(0, 1 / inputs); off: N(0, 1)",
        "Neal, Bayesian Learning for Neural Networks, 1996",
        {"prior": "fan-in"}, tasks=TWO_BNNS,
    ),
    Trick(
        "noise scale learned",
        "the scale of the observation noise is learned (VAE) or latent (BNN); off: 1, the loss is a squared error",
        "Rybkin, Daniilidis, Levine, Simple and Effective VAE Training with Calibrated Decoders, 2021",
        {"noise": "learned"}, {"noise": "unit"}, tasks=(FREY, YACHT),
    ),
    Trick(
        CONTROL,
        "no trick: plain against plain with other starts, data order and noise, to see what chance does",
        "a control",
        {"seed_shift": 1000},
    ),
)  # fmt: skip


def variants(task: str, tricks: tuple[Trick, ...] = TRICKS) -> dict[str, Settings]:
    """The settings that a model is trained with, by name; two that are equal are one.

    >>> list(variants(DIABETES))
    ['plain', 'local reparameterisation', 'prior width by fan-in']
    """
    found = {SIMPLE: {**PLAIN, **OWN[task]}}
    for trick in tricks:
        if task in trick.tasks:
            for name, own in zip((f"{trick.name}: off", trick.name), trick.settings(task), strict=True):
                settings = {**found[SIMPLE], **own}
                if settings not in found.values():
                    found[name] = settings
    return found


def pair(trick: Trick, task: str, tricks: tuple[Trick, ...] = TRICKS) -> tuple[str, str]:
    """Names of the variants that are compared, off and on.

    >>> pair(TRICKS[0], YACHT), pair(TRICKS[0], DIGITS)
    (('narrow start of q: off', 'plain'), ('plain', 'narrow start of q'))
    """
    known = variants(task, tricks)
    names = []
    for own in trick.settings(task):
        settings = {**known[SIMPLE], **own}
        names.append(next(name for name, one in known.items() if one == settings))
    return names[0], names[1]


__all__ = ["BOTH", "CONTROL", "SIMPLE", "TRICKS", "TWO_BNNS", "TWO_VAES", "Trick", "pair", "variants"]

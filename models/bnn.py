"""Bayesian neural network: any torch module with priors over its weights, for regression or classification."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from pyro.nn.module import to_pyro_module_
from torch import Tensor, nn

from dgm.errors import ModelError, OptionError

from .likelihoods import Categorical, Distribution, Likelihood, Normal

__all__ = ["BNN", "example"]

Prior = Callable[[str, Tensor], Distribution]
"""(name of a weight in the network, a tensor of its shape, dtype and device) -> its prior."""

INITIAL = "_initial"  # suffix of the buffer that keeps a weight's initial value
SCALE = "_prior_scale"  # suffix of the buffer that keeps its prior's scale: replicas may differ in it


def normal_prior(scale: float = 1.0) -> Prior:
    """w ~ N(0, scale^2) for every weight and bias.

    Raises:
        OptionError: a scale that is not a finite number > 0.

    >>> normal_prior(0.5)("weight", torch.zeros(3, 2)).batch_shape
    torch.Size([3, 2])
    """
    _check_scale(scale)
    return lambda name, weight: dist.Normal(torch.zeros_like(weight), scale)


def fan_in_prior(scale: float = 1.0) -> Prior:
    """w ~ N(0, scale^2 / fan_in) for weights, N(0, scale^2) for vectors such as biases.

    The outputs of a layer then keep their size whatever its width (Neal, "Bayesian Learning for Neural Networks",
    1996), which wide or deep networks need. fan_in is the number of inputs of one unit: all axes but the first.

    Raises:
        OptionError: a scale that is not a finite number > 0.

    >>> bool((fan_in_prior(2.0)("weight", torch.zeros(3, 16)).scale == 0.5).all())
    True
    """
    _check_scale(scale)

    def prior(name: str, weight: Tensor) -> Distribution:
        fan_in = weight[0].numel() if weight.ndim > 1 else 1
        return dist.Normal(torch.zeros_like(weight), scale / fan_in**0.5)

    return prior


class BNN(PyroModule):
    """w ~ prior,  y_n | x_n, w ~ likelihood(network(x_n; w)).

    Neal, "Bayesian Learning for Neural Networks", 1996. Sites: "network.<name>" for every trainable weight, global;
    "noise_scale" (), global, where the likelihood has one; "y" (N,), observed in "data".
    The network is copied. Its weights become latent, its frozen weights (requires_grad=False) become constants, its
    buffers stay. Call it once with all weights at a time: batches of weights in front of a weight are not supported.

    Args:
        network: maps x (N, ...) to (N, outputs): (N, 1) for Normal() or a known scale, (N, 2) for
            Normal(scale="predicted"), (N, classes) for Categorical(), (N, 1) for Bernoulli().
        likelihood: p(y | output); default Normal(): homoscedastic noise whose scale is latent.
        prior: scale of independent N(0, scale^2) on every weight and bias, or a callable (name, weight) -> prior of
            the weight's shape, as `fan_in_prior()`. The default 1 is usual for one hidden layer on standardised data.

    Raises:
        OptionError: a prior scale that is not a finite number > 0.
        ModelError: a network without trainable, or with lazy or shared weights; a prior of another shape; an output
            or a target of another shape.

    >>> model = BNN(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)))
    >>> sorted(model(torch.zeros(5, 3)))
    ['loc', 'scale']
    """

    # Where guides start: sharp about the network's own weights. A start of 0.1, wide for 50 units, needs twice the
    # epochs to leave the noise that it makes (yacht, 1000 epochs, splits 10 and 11: RMSE 2.2 against 1.1).
    init_scale = 0.02

    def __init__(self, network: nn.Module, likelihood: Likelihood | None = None, prior: Prior | float = 1.0) -> None:
        super().__init__()
        self.likelihood = (Normal() if likelihood is None else likelihood).bayesian()
        if not callable(prior):
            _check_scale(prior)
        network = copy.deepcopy(network)
        _check_weights(network)
        to_pyro_module_(network)
        for path, module in list(network.named_modules()):
            for name, weight in list(module.named_parameters(recurse=False)):
                if weight.requires_grad:
                    _make_latent(module, name, f"{path}.{name}".lstrip("."), prior)
                else:
                    delattr(module, name)
                    module.register_buffer(name, weight.detach())
        self.network = network

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """The Pyro program, for x (N, ...) and y (N,), or None to draw y.

        Returns the parameters of p(y | x, w): "loc" (N,) and "scale" () or (N,), or "logits" (N, classes), or, for
        Bernoulli, "logits" (N,). `likelihood.distribution` makes a distribution of them.
        """
        # Weights and noise are drawn before the plate: drawn inside it, each datum would have its own.
        output = self.network(x)
        noise = self.likelihood.noise(output)
        self._check(x, y, output)
        parts = self.likelihood.parts(output, noise)
        with pyro.plate("data", len(x)):
            pyro.sample("y", self.likelihood.distribution(parts), obs=y)
        return parts

    def init_values(self) -> dict[str, Tensor]:
        """Site name -> a good value to start from: the network's own initial weights, and the noise's prior mean."""
        like = next(weight for _, weight in self._initial())
        return {name: weight.clone() for name, weight in self._initial()} | self.likelihood.init_values(like)

    def _initial(self) -> Iterator[tuple[str, Tensor]]:
        for module in self.network.modules():
            for name in module._pyro_samples if isinstance(module, PyroModule) else ():
                yield f"{module._pyro_name}.{name}", getattr(module, name + INITIAL)

    def _check(self, x: Tensor, y: Tensor | None, output: Tensor) -> None:
        wanted = self.likelihood.outputs
        named = f"(N, {wanted})" if wanted is not None else "(N, classes) with at least 2 classes"
        width_is_wrong = output.ndim != 2 or (output.shape[1] < 2 if wanted is None else output.shape[1] != wanted)
        if width_is_wrong or len(output) != len(x):
            raise ModelError(
                f"BNN, network: expected an output of shape {named} for {type(self.likelihood).__name__} and "
                f"N = {len(x)} rows, got {tuple(output.shape)}; change the network's last layer or the likelihood"
            )
        if y is not None and y.shape != (len(x),):
            raise ModelError(
                f"BNN, site 'y': expected targets of shape ({len(x)},), got {tuple(y.shape)}"
                + ("; use y.squeeze(-1)" if y.shape == (len(x), 1) else "")
            )


def _make_latent(module: nn.Module, name: str, path: str, prior: Prior | float) -> None:
    """Replace a parameter by a latent, and keep its initial value as a buffer."""
    value = getattr(module, name).detach().clone()
    module.register_buffer(name + INITIAL, value)
    if not callable(prior):
        module.register_buffer(name + SCALE, value.new_tensor(prior), persistent=False)

    def density_of(owner: nn.Module) -> Distribution:
        # built at each call from the buffers, so that the prior follows the model's dtype and device
        weight = getattr(owner, name + INITIAL)
        if callable(prior):
            return prior(path, weight)
        return dist.Normal(torch.zeros_like(weight), getattr(owner, name + SCALE))

    def latent(owner: nn.Module) -> Distribution:
        density = density_of(owner)
        return density.to_event(len(density.batch_shape))

    density = density_of(module)
    if not hasattr(density, "to_event"):
        raise ModelError(
            f"BNN, site 'network.{path}': expected a distribution of pyro.distributions, got {type(density).__name__}"
        )
    shape = density.shape()
    if shape != value.shape:
        raise ModelError(
            f"BNN, site 'network.{path}': expected a prior of shape {tuple(value.shape)}, got {tuple(shape)}; "
            "expand it, as dist.Normal(0.0, 1.0).expand(weight.shape)"
        )
    setattr(module, name, PyroSample(latent))


def _check_weights(network: nn.Module) -> None:
    seen: dict[int, str] = {}
    for name, weight in network.named_parameters(remove_duplicate=False):
        if torch.nn.parameter.is_lazy(weight):
            raise ModelError(f"BNN, weight {name!r} has no shape yet; run the network once on a batch first")
        if id(weight) in seen:
            raise ModelError(
                f"BNN, weight {name!r} is the same tensor as {seen[id(weight)]!r}; as latents they would differ: "
                "give each module its own weights"
            )
        seen[id(weight)] = name
    if not any(weight.requires_grad for weight in network.parameters()):
        raise ModelError("BNN, network: expected at least one trainable weight, got none")


def _check_scale(scale: float) -> None:
    if not (isinstance(scale, int | float) and 0 < scale < float("inf")):
        raise OptionError(f"prior scale {scale!r}: expected a finite number > 0")


def example() -> tuple[BNN, tuple[Tensor, ...]]:
    """A tiny regression network with latent noise, and 20 rows of 3 inputs with targets."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = BNN(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), Normal())
        x = torch.randn(20, 3)
        return model, (x, torch.sin(x[:, 0]) + 0.1 * torch.randn(20))


def example_classification() -> tuple[BNN, tuple[Tensor, ...]]:
    """A tiny classification network, and 20 rows of 3 inputs with labels 0, 1, 2."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = BNN(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), Categorical())
        x = torch.randn(20, 3)
        return model, (x, x.argmax(1))

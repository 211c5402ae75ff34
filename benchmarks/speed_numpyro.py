"""Rivals in NumPyro: the same models, jitted step by step and scanned over blocks of steps, vmapped over replicas.

Needs the extra: `pip install dgm[bench]`. Factories are as in `speed_torch`: `train(block) -> loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, autoguide
from numpyro.infer.initialization import init_to_uniform
from torch import Tensor

from .speed_cases import CLASSES, HIDDEN, LR, PIXELS, Case

Train = Callable[[Tensor], float]
Layer = Callable[[Any], Any]


def _dense(name: str, inputs: int, outputs: int) -> Layer:
    w = numpyro.param(f"{name}_w", lambda key: jax.random.normal(key, (inputs, outputs)) / jnp.sqrt(inputs))
    b = numpyro.param(f"{name}_b", jnp.zeros(outputs))
    return lambda x: x @ w + b


def _vae(case: Case) -> tuple[Any, Any]:
    a, b = HIDDEN
    latent, scale = case.latent, case.scale

    def model(x: Any) -> None:
        first, second, last = _dense("d1", latent, a), _dense("d2", a, b), _dense("d3", b, PIXELS)
        with numpyro.plate("data", x.shape[0]), numpyro.handlers.scale(scale=scale):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            logits = last(jax.nn.relu(second(jax.nn.relu(first(z)))))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        first, second = _dense("e1", PIXELS, a), _dense("e2", a, b)
        loc, log_scale = _dense("loc", b, latent), _dense("log_scale", b, latent)
        with numpyro.plate("data", x.shape[0]), numpyro.handlers.scale(scale=scale):
            h = jax.nn.relu(second(jax.nn.relu(first(x))))
            numpyro.sample("z", dist.Normal(loc(h), jnp.exp(log_scale(h))).to_event(1))

    return model, guide


def _bnn(case: Case) -> tuple[Any, Any]:
    widths = (13, 50, 1) if case.kind == "bnn" else (PIXELS, 400, 400, CLASSES)
    noisy, scale = case.kind == "bnn", case.scale

    def model(x: Any, y: Any) -> None:
        h = x
        for i, (m, n) in enumerate(pairwise(widths)):
            w = numpyro.sample(f"w{i}", dist.Normal(jnp.zeros((m, n)), 1.0).to_event(2))
            b = numpyro.sample(f"b{i}", dist.Normal(jnp.zeros(n), 1.0).to_event(1))
            h = (h if i == 0 else jax.nn.relu(h)) @ w + b
        noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0)) if noisy else None
        density = dist.Categorical(logits=h) if noise is None else dist.Normal(h[:, 0], noise)
        with numpyro.handlers.scale(scale=scale), numpyro.plate("data", x.shape[0]):
            numpyro.sample("y", density, obs=y)

    return model, autoguide.AutoNormal(model, init_loc_fn=init_to_uniform(radius=0.1), init_scale=0.02)


def _svi(case: Case, use_optax: bool) -> Any:
    model, guide = _vae(case) if case.kind == "vae" else _bnn(case)
    optimiser = optax.adam(LR) if use_optax else numpyro.optim.Adam(LR)
    if case.importance:
        return SVI(model, guide, optimiser, RenyiELBO(alpha=0, num_particles=case.particles))
    return SVI(model, guide, optimiser, Trace_ELBO(num_particles=case.particles))


def numpyro_rival(case: Case, scanned: bool = True, use_optax: bool = False) -> Train:
    """`SVI.update`, jitted for a step or scanned over `case.scan` of them; the loss becomes a float once a block."""
    svi = _svi(case, use_optax)
    data = tuple(jnp.asarray(t.numpy()) for t in case.data)
    many = case.stacked

    def update(state: Any, data: Any, index: Any) -> Any:
        def one(state: Any, index: Any) -> Any:
            return svi.update(state, *(t[index] for t in data))

        return jax.vmap(one)(state, index) if many else one(state, index)

    def scan(state: Any, data: Any, block: Any) -> Any:
        state, losses = jax.lax.scan(lambda state, index: update(state, data, index), state, block)
        return state, losses

    def first(key: Any) -> Any:
        return svi.init(key, *(t[: case.batch] for t in data))

    key = jax.random.PRNGKey(0)
    state = jax.vmap(first)(jax.random.split(key, case.replicas)) if many else first(key)
    run = jax.jit(scan if scanned else update)
    length = case.scan

    def train(block: Tensor) -> float:
        nonlocal state
        indices = np.asarray(block.numpy(), dtype=np.int32)
        parts = np.split(indices, range(length, len(indices), length)) if scanned else indices
        loss: Any = jnp.zeros(())
        for part in parts:
            state, loss = run(state, data, part)
        jax.block_until_ready(state)
        return float(jnp.mean(loss[-1] if scanned else loss))

    return train

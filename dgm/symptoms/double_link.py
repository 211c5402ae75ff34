"""Probabilities given where logits are expected (a softmax or sigmoid twice), or made by clamping a raw output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..dataflow import Chain, Reading, chain_from, chain_of, layer_of
from ..findings import Finding

LINKS = {"Softmax": "softmax", "Sigmoid": "sigmoid", "LogSigmoid": "logsigmoid"}
EDGE = 0.05
"""How near 0 and 1 numbers come that are probabilities, and the share of them that must, at either end."""
LEAST = 50
"""Numbers below which nothing is said of their range."""
ROUNDING = 1e-5
CLAMPED = 0.01
"""Share of probabilities at the clamp's edge, where they have no gradient, from which it is told."""


def look(case: Any) -> Iterator[Finding]:
    yield from double_links(case.after)


def double_links(reading: Reading) -> Iterator[Finding]:
    """Every site of both programs whose logits end in a softmax or sigmoid, or whose probabilities end in a clamp."""
    seen = set()
    for part, name, _, base in reading.sampled():
        inner = getattr(base, "_categorical", base)  # of a one-hot distribution
        given = inner.__dict__
        if (part, name) in seen:
            continue
        seen.add((part, name))
        if "logits" in given and "probs" not in given and not given["logits"].requires_grad:
            yield from _by_numbers(part, name, type(base).__name__, given["logits"])
        elif "logits" in given and "probs" not in given:
            yield from _logits(part, name, type(base).__name__, _unnormalised(chain_of(given["logits"])))
        elif "probs" in given and "logits" not in given:
            yield from _probs(part, name, type(base).__name__, _unnormalised(chain_of(given["probs"])))


def _unnormalised(chain: Chain) -> Chain:
    """What a categorical distribution was given, before its constructor normalised it."""
    if not chain.names and chain.end in ("Sub", "Div"):
        return chain_from(chain.stop.next_functions[0][0])
    return chain


def _logits(part: str, name: str, kind: str, chain: Chain) -> Iterator[Finding]:
    link = chain.names[0] if chain.names else ""
    if link not in LINKS or (link == "LogSigmoid" and kind not in ("Bernoulli", "Binomial", "Geometric")):
        return
    result = getattr(chain.nodes[0], "_saved_result", None)
    if link == "LogSigmoid" or result is None:
        values = "they end in it"
    else:
        low, high = float(result.detach().min()), float(result.detach().max())
        values = f"they lie in [{low:.3g}, {high:.3g}]" + (", and each row sums to 1" if link == "Softmax" else "")
    softened = "between 0.5 and 0.73" if link == "Sigmoid" else "at most e = 2.7 times one another"
    if link == "LogSigmoid":
        softened = "at most 0.5"
    yield Finding(
        name=f"double {'softmax' if link == 'Softmax' else 'sigmoid'}",
        part=part,
        harm=3,
        evidence=f"site {name!r}: the logits of {kind} are the output of a {LINKS[link]}: {values}",
        consequence=f"the probabilities are {softened}, whatever the network says, and the gradients are small",
        cure=f"leave the {LINKS[link]} out, or hand its output in as probs=" + ".exp()" * (link == "LogSigmoid"),
    )


def _by_numbers(part: str, name: str, kind: str, logits: Tensor) -> Iterator[Finding]:
    """Of logits without a graph (a frozen network): they are in [0, 1], and reach both ends, as probabilities do."""
    if logits.numel() < LEAST:
        return
    values = logits
    if kind != "Bernoulli":  # the constructor took a constant from each row, so that only differences are left
        values = logits - logits.mean(-1, keepdim=True) + 1 / logits.shape[-1]
    low, high = float(values.min()), float(values.max())
    ends = [float((values < EDGE).float().mean()), float((values > 1 - EDGE).float().mean())]
    if low < -ROUNDING or high > 1 + ROUNDING or min(ends) < EDGE:
        return
    yield Finding(
        name="double sigmoid" if kind == "Bernoulli" else "double softmax",
        part=part,
        harm=3,
        evidence=f"site {name!r}: all logits of {kind} lie in [{low:.3g}, {high:.3g}], and reach both ends",
        consequence="they look like probabilities: what comes out is nearly the same for every row",
        cure="hand them in as probs=, or leave the last softmax or sigmoid out",
    )


def _probs(part: str, name: str, kind: str, chain: Chain) -> Iterator[Finding]:
    clamps = ("Clamp", "Hardtanh", "Relu", "Hardsigmoid")
    if not chain.names or chain.names[0] not in clamps or len(chain.names) > 1 or chain.stop is None:
        return  # a clamp of a softmax guards against rounding, and is fine
    if not layer_of(chain.stop) and chain.leaf is None:
        return
    raw = getattr(chain.nodes[0], "_saved_self", getattr(chain.nodes[0], "_saved_result", None))
    if raw is None:
        return
    dead = float(((raw.detach() <= 0) | (raw.detach() >= 1)).float().mean())
    if dead < CLAMPED:
        return
    yield Finding(
        name="clamped probabilities",
        part=part,
        harm=2,
        evidence=f"site {name!r}: {100 * dead:.0f} % of the probabilities of {kind} lie at the edge of a clamp",
        consequence="they have no gradient there, and never come back",
        cure="hand the raw output in as logits=",
    )

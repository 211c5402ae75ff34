"""A log-variance or variance given where a standard deviation is expected, read off the graph behind the scale.

Not seen: a variance or log-variance that goes by no name and no square, such as scale = exp(h) where h was meant to be
a log-variance; the two are the same family, and nothing but the author's mind tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributions import Cauchy, Gumbel, HalfCauchy, HalfNormal, Laplace, LogNormal, Normal, StudentT

from ..dataflow import Chain, Reading, chain_of, layer_of
from ..findings import Finding
from ..sites import support_name

SCALED = (Normal, Laplace, StudentT, Cauchy, Gumbel, HalfNormal, HalfCauchy, LogNormal)
LOG_VARIANCE = re.compile(r"log_?(var(iance)?s?|sigma_?(sq|2|squared)|s2)$|ln_?var$", re.IGNORECASE)
VARIANCE = re.compile(r"(^|_)(var|vars|variance|variances|sigma_?(sq|2|squared)|s2)$", re.IGNORECASE)
SIGNED = frozenset({"Add", "Sub", "Rsub", "Mul", "Div", "Neg"})
"""Operations with a constant that leave a number of any sign."""
POSITIVE = frozenset({"Exp", "Softplus", "Sqrt", "Sigmoid", "Square", "Abs"})
FLOORS = frozenset({"Add", "Clamp", "ClampMin"})
"""What keeps a scale away from 0."""
ROOTS = frozenset({"Sqrt", "Rsqrt", "Pow"})


def look(case: Any) -> Iterator[Finding]:
    yield from scale_meanings(case.after)


def scale_meanings(reading: Reading) -> Iterator[Finding]:
    """Every scale of both programs whose graph or name says that it is no standard deviation."""
    for part, name, _, base in reading.sampled():
        scale = getattr(base, "scale", None)
        if not isinstance(base, SCALED) or not isinstance(scale, Tensor):
            continue
        chain = chain_of(scale)
        source, free = _source(reading, chain)
        squared = _squared(chain, _positive_latent(reading, chain))
        found = _meaning(name, type(base).__name__, scale, chain, source, free, squared)
        if found is not None:
            title, harm, evidence, consequence, cure = found
            yield Finding(name=title, part=part, harm=harm, evidence=evidence, consequence=consequence, cure=cure)


def _source(reading: Reading, chain: Chain) -> tuple[str, bool]:
    """The name of the layer, parameter or latent that a chain starts from, and whether that may have any sign."""
    if chain.leaf is not None:
        name = reading.name_of(chain.leaf)
        return name, name != "" and name not in reading.latents
    if chain.stop is None:
        return "", False
    leaves = layer_of(chain.stop)
    named = next((reading.name_of(leaf) for leaf in leaves if reading.name_of(leaf)), "")
    return named.rpartition(".")[0] or named, bool(leaves)


def _meaning(
    site: str, kind: str, scale: Tensor, chain: Chain, source: str, free: bool, squared: bool
) -> tuple[str, int, str, str, str] | None:
    operations, last = chain.names, source.rpartition(".")[2]
    where = f"site {site!r}: the scale of {kind}"
    of = f" of {source!r}" if source else ""
    smallest = float(scale.detach().min())
    if free and all(op in SIGNED for op in operations):
        log_variance = bool(LOG_VARIANCE.search(last))
        return (
            "log-variance as scale" if log_variance else "scale without a bound",
            3,
            f"{where} is the raw output{of}, smallest {smallest:.3g} now",
            ("a log-variance is no standard deviation: " if log_variance else "")
            + "nothing keeps it positive: at the first step below 0 training ends in NaN or an error",
            "(h / 2).exp() of it" if log_variance else "softplus or exp of it",
        )
    if any(op in ROOTS for op in operations) and not squared:
        return None
    inner = [op for op in operations if op not in FLOORS]
    if inner[:1] == ["Exp"] and LOG_VARIANCE.search(last) and not set(inner) & {"Mul", "Div"}:
        return (
            "log-variance as scale",
            1,
            f"{where} is exp(h) with h the output{of}, which its name calls a log-variance; mean scale now "
            f"{float(scale.detach().mean()):.3g}",
            "what is called log-variance is the log of the standard deviation: every number read from it, and every KL "
            "written by hand with it, is off by a factor 2 in the log",
            "(h / 2).exp(), or another name",
        )
    if squared:
        return (
            "variance as scale",
            2,
            f"{where} is the square of a positive number{of}: mean {float(scale.detach().mean()):.3g}, its root "
            f"{float(scale.detach().mean().sqrt()):.3g}",
            "a variance stands where a standard deviation is expected: the density is too sharp below 1, else too wide",
            "hand in the number itself, without the square",
        )
    if source and VARIANCE.search(last) and not LOG_VARIANCE.search(last):
        return (
            "variance as scale",
            2,
            f"{where} is {source!r} without a root, mean {float(scale.detach().mean()):.3g}, its root "
            f"{float(scale.detach().mean().sqrt()):.3g}",
            "a variance stands where a standard deviation is expected, so that its prior means another thing",
            f"{last}.sqrt()",
        )
    return None


def _squared(chain: Chain, positive: bool) -> bool:
    """Whether the last operation squares what was positive already: a sign is no reason for it."""
    if not chain.names or chain.names[0] not in ("Square", "Pow"):
        return False
    if chain.names[0] == "Pow" and float(getattr(chain.nodes[0], "_saved_exponent", 0)) != 2:
        return False
    return chain.names[1] in POSITIVE if len(chain.names) > 1 else positive


def _positive_latent(reading: Reading, chain: Chain) -> bool:
    """Whether a chain starts at a latent that is a scale by its support."""
    name = "" if chain.leaf is None else reading.name_of(chain.leaf)
    if name not in reading.latents:
        return False
    return support_name(reading.model.nodes[name]["fn"].support) in ("positive", "nonnegative")

"""Parameters and buffers of a pair by name: what is kept of it, and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import ModelError
from .pair import Pair
from .programs import owner, preserved_rng, program_name

__all__ = ["load_weights", "weights"]


def weights(pair: Pair) -> dict[str, Tensor]:
    """Parameters and buffers by the names that messages use, each once: "model.", "guide.", and "other." for modules
    that a function closes over. What a first run makes must be there."""
    found: dict[str, Tensor] = {}
    for role, program in (("model", pair.model), ("guide", pair.guide)):
        module = owner(program)
        for name, value in (module.state_dict() if isinstance(module, nn.Module) else {}).items():
            if isinstance(value, Tensor):
                found[f"{role}.{name}"] = value
    held = {value.data_ptr() for value in found.values()}
    for name, value in {**pair.parameters(), **pair.closed_over()}.items():
        if value.data_ptr() not in held:
            found[f"other.{name}"] = value
    return found


def load_weights(pair: Pair, saved: Mapping[str, Tensor], where: object) -> None:
    """Copy weights into a pair.

    Raises:
        ModelError: a name or shape that is not the pair's; the message names the first, and `where` they came from.
    """
    present = weights(pair)
    for name in [*present, *saved]:
        there, here = (tuple(part[name].shape) if name in part else "missing" for part in (saved, present))
        if there != here:
            raise ModelError(
                f"the weights in {where} are not of this pair ({program_name(pair.model)} with "
                f"{program_name(pair.guide)}): {name!r} is {there} there and {here} here; was the model or the guide "
                "changed since?"
            )
    with preserved_rng(), torch.no_grad():
        for role, program in (("model", pair.model), ("guide", pair.guide)):
            module = owner(program)
            if module is not None:  # by its own way to load: a finished posterior then knows that it is one
                names = [name for name in present if name.startswith(f"{role}.")]
                module.load_state_dict({name.removeprefix(f"{role}."): saved[name] for name in names})
        for name, value in present.items():
            if name.startswith("other."):
                value.copy_(saved[name])

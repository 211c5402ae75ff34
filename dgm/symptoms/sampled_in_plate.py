"""A `PyroSample` that is first read inside a plate: one draw for each row, where one for all was meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pyro.nn import PyroModule
from torch import nn

from ..dataflow import Reading
from ..findings import Finding
from ..row_terms import data_frame


def look(case: Any) -> Iterator[Finding]:
    yield from sampled_in_plate(case.after, case.pair.owners, case.plates)


def sampled_in_plate(reading: Reading, home: nn.Module, plates: Iterable[str]) -> Iterator[Finding]:
    """Sites of `PyroSample` attributes that stand in a data plate."""
    named = {
        f"{module._pyro_name}.{attribute}".lstrip("."): attribute
        for module in home.modules()
        if isinstance(module, PyroModule)
        for attribute in module._pyro_samples
    }
    for name in named:
        node = reading.model.nodes.get(name)
        frame = data_frame(node, plates) if node is not None and not node["is_observed"] else None
        if frame is None:
            continue
        own = name.rpartition(".")[2]
        yield Finding(
            name="PyroSample in a plate",
            part="model",
            harm=3,
            evidence=(
                f"site {name!r} is a PyroSample first read inside plate {frame.name!r}: it has {frame.size} draws, one "
                "for each row"
            ),
            consequence=(
                "what was meant as one latent of the model is a local one of each row: its posterior learns from one "
                "row alone, and says nothing of new rows"
            ),
            cure=f"read it before the plate ({own} = self.{own}); if one for each row is meant, use pyro.sample",
        )

"""What each replica has of its own: a table of columns, and the pairs that they start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import GuideError, OptionError
from .feeding import checked_rows
from .options import Options, checked_seed
from .programs import move
from .starting import maker, start_pair

OWN = ("seed", "lr", "kl_weight", "rows")
"""Columns of `replicas` with a meaning of their own; every other one is an argument of the model's maker."""


class Table:
    """What each replica has of its own: one column for each option, `(K,)`.

    Raises:
        OptionError: not a number of replicas or columns of one length; a seed or rate out of its domain.
    """

    def __init__(self, replicas: int | Mapping[str, Sequence[Any]], seed: int, lr: float, kl_weight: float):
        columns: dict[str, list[Any]]
        if isinstance(replicas, Mapping):
            columns = {str(name): list(values) for name, values in replicas.items()}
        elif isinstance(replicas, int) and not isinstance(replicas, bool):
            columns = {"seed": [seed + k for k in range(replicas)]}
        else:
            raise OptionError(
                f"replicas is {replicas!r}, expected a number, or columns such as {{'seed': range(20)}} or "
                "{'seed': [0, 0], 'lr': [1e-3, 1e-2]}"
            )
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) != 1 or not max(lengths.values()):
            raise OptionError(
                f"replicas has columns of {lengths or 'no'} entries, expected as many in each, at least 1"
            )
        self.count = next(iter(lengths.values()))
        self.seeds = [checked_seed(s) for s in columns.get("seed", [seed] * self.count)]
        self.rates = [float(rate) for rate in columns.get("lr", [lr] * self.count)]
        self.kl = [float(weight) for weight in columns.get("kl_weight", [kl_weight] * self.count)]
        if not all(0 <= weight < float("inf") for weight in self.kl):
            raise OptionError(f"replicas['kl_weight'] is {self.kl}, expected numbers >= 0")
        self.rows = columns.get("rows", [None] * self.count)
        self.options = [{n: v[k] for n, v in columns.items() if n not in OWN} for k in range(self.count)]


class Starts:
    """Makes the pair of replica k, as often as it is asked for, always the same."""

    def __init__(self, model: Any, guide: Any, table: Table, data: tuple[Tensor, ...], told: Options):
        self.table, self.data, self.told = table, data, told
        self.pairs: list[tuple[Any, Any]] | None = None
        if isinstance(model, (list, tuple)) or isinstance(guide, (list, tuple)):
            if not (isinstance(model, (list, tuple)) and isinstance(guide, (list, tuple))):
                raise OptionError("give lists of models and guides, or makers of both")
            if not len(model) == len(guide) == table.count:
                raise OptionError(
                    f"{len(model)} models and {len(guide)} guides for {table.count} replicas: one of each for each"
                )
            self.pairs = list(zip(model, guide, strict=True))
            self.first: dict[int, Any] = {}
            return
        if isinstance(guide, nn.Module):
            raise GuideError(
                f"guide is a {type(guide).__name__}, one object for {table.count} replicas: give what makes it, "
                "`(model, *batch) -> guide`, e.g. partial(Global, family=DiagonalNormal)"
            )
        options = any(table.options)
        self.make = model if options and not isinstance(model, nn.Module) else maker(model)
        if options and isinstance(model, nn.Module):
            raise OptionError(
                f"replicas has the column {next(iter(table.options[0]))!r}, which is no option of training: the model "
                "must then be a maker that takes it by name"
            )
        self.guide = guide

    def own(self, k: int) -> tuple[Tensor, ...]:
        """All rows that replica k may see."""
        rows = self.rows(k)
        return self.data if rows is None else tuple(t[rows] for t in self.data)

    def rows(self, k: int) -> Tensor | None:
        """Numbers of the rows that replica k may see; None for all.

        Raises:
            OptionError: they are no row numbers of the data.
        """
        rows = self.table.rows[k]
        if rows is None:
            return None
        first = self.data[0]
        return checked_rows(torch.as_tensor(rows), len(first)).to(first.device)

    def pair(self, k: int) -> tuple[Any, Any]:
        seed = self.table.seeds[k]
        if self.pairs is None:
            whole = self.own(k)
            if self.told.transform is not None:
                whole = self.told.transform(whole, torch.Generator(whole[0].device).manual_seed(seed))
            pair = start_pair(
                self.make, self.guide, seed, whole, self.table.options[k], self.told.device, self.told.dtype
            )
            move(*pair, device=self.told.device, dtype=self.told.dtype)
            return pair
        model, guide = self.pairs[k]
        modules = [m for m in (model, guide) if isinstance(m, nn.Module)]
        if k not in self.first:
            self.first[k] = [{n: v.detach().clone() for n, v in m.state_dict().items()} for m in modules]
        for module, state in zip(modules, self.first[k], strict=True):
            held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
            for name, value in held.items():
                if name in state:
                    value.data = state[name].clone()
        return model, guide


__all__ = ["Starts", "Table"]

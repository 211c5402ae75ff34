"""Log weights: log p(x, z) - log q(z | x). ELBO, importance bounds, ESS and k-hat are all functions of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .errors import GuideError, ModelError, OptionError
from .pair import Pair
from .programs import Program, preserved_rng, program_name
from .row_terms import row_terms
from .runs import Graphs, Runs
from .sites import DATA_PLATE


@dataclass(frozen=True)
class LogWeights:
    """The two parts of log p(x, z, w) - log q(z, w): what belongs to a row, and what belongs to all.

    local: `(S, B)`, sum of the terms inside the data plate, for each row, with every plate scale taken out.
    global_: `(S,)`, sum of the terms outside of it.
    has_local, has_global: whether there are latents inside, outside.
    """

    local: Tensor
    global_: Tensor
    has_local: bool
    has_global: bool

    @property
    def total(self) -> Tensor:
        """`(S,)`: the log weight of all rows and the global latents together."""
        return self.local.sum(-1) + self.global_


def _run_terms(pair: Pair, batch: Sequence[Any], plates: set[str]) -> tuple[Tensor, Tensor]:
    """One sample: (local (B,), global ())."""
    guide_trace = poutine.trace(pair.run_guide).get_trace(*batch)
    model_trace = poutine.trace(poutine.replay(pair.run_model, trace=guide_trace)).get_trace(*batch)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    device = batch[0].device if batch and isinstance(batch[0], Tensor) else None
    like = torch.empty((), device=device)
    local, global_ = row_terms(model_trace, plates, like)
    own_local, own_global = row_terms(guide_trace, plates, like)
    return local - own_local, global_ - own_global


class LogWeightSampler:
    """Draws log weights of a pair for one batch, in chunks of samples.

    A sampler may be kept while training goes on: it draws with the parameters as they are.

    Args:
        model, guide: the pair. batch: data, rows first. plates: names of the data plates.
        graphs: shared with the samplers of other batches, so that batches of equal shape need one trace (`dgm.runs`).
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        *batch: Any,
        plates: Iterable[str] = (DATA_PLATE,),
        graphs: Graphs | None = None,
    ):
        self.pair = Pair(model, guide)
        self.plates = set(plates)
        latents = self.pair.check(batch, self.plates)
        refuse_untrained(self.pair, model, guide)
        self.has_local, self.has_global = bool(latents.local), bool(latents.global_)
        sizes = {p: latents.plates[p].size for p in sorted(self.plates) if p in latents.plates}
        if len(set(sizes.values())) > 1:
            raise ModelError(
                f"log weights are one for each row, and the data plates of {program_name(model)} differ in rows "
                f"({', '.join(f'{p!r}: {n}' for p, n in sizes.items())}): evaluate a model of one stream, or give "
                "batches with as many rows in each"
            )
        self.rows, self.has_rows = next(iter(sizes.values()), 1), bool(sizes)
        self.runs = Runs(self.pair, lambda data: _run_terms(self.pair, data, self.plates), batch, graphs)

    def require_rows(self) -> None:
        """Refuse programs without a data plate, where nothing belongs to a row.

        Raises:
            ModelError: no data plate was opened.
        """
        if not self.has_rows:
            raise ModelError(
                f"{program_name(self.pair.model)} opens none of the data plates "
                f"{', '.join(map(repr, sorted(self.plates)))}, and so there is no bound for each row: write "
                '`with pyro.plate("data", len(x)):` around what is observed, or name its plate (plates=..., in '
                "training sizes=...)"
            )

    @property
    def is_point(self) -> bool:
        """Whether the guide's local latents are points: they have no density, and there is no bound."""
        return self.has_local and self.runs.deterministic

    def chunks(self, num_samples: int, chunk: int | None = None) -> Iterator[LogWeights]:
        """`num_samples` samples in chunks that fit memory."""
        if num_samples < 1:
            raise OptionError(f"num_samples is {num_samples}, expected at least 1")
        for local, global_ in self.runs.passes(num_samples, chunk):
            if not self.has_rows:  # no data plate: everything belongs to all rows
                local = local.new_zeros(len(local), 0)
            yield LogWeights(local, global_, self.has_local, self.has_global)


def refuse_untrained(pair: Pair, model: Program, guide: Program) -> None:
    """A plain function with `pyro.param`s starts anew with its first values: say so instead of using them.

    Raises:
        GuideError: a function program made parameters when it ran.
    """
    for role, given, used in (("model", model, pair.model), ("guide", guide, pair.guide)):
        if used is not given and hasattr(used, "pyro_parameters"):
            raise GuideError(
                f"the {role} {program_name(given)} is a function with pyro.param statements: here they would have "
                f"their initial values; give the trained program, fit.{role} or svi.{role}"
            )


def log_weight_terms(
    model: Program,
    guide: Program,
    *batch: Any,
    num_samples: int = 1,
    seed: int | None = 0,
    plates: Iterable[str] = (DATA_PLATE,),
) -> LogWeights:
    """Both parts of the log weights; see `LogWeights`."""
    with preserved_rng(seed):
        parts = list(LogWeightSampler(model, guide, *batch, plates=plates).chunks(num_samples))
    return LogWeights(
        torch.cat([p.local for p in parts]),
        torch.cat([p.global_ for p in parts]),
        parts[0].has_local,
        parts[0].has_global,
    )


def log_weights(
    model: Program,
    guide: Program,
    *batch: Any,
    num_samples: int = 1,
    seed: int | None = 0,
    plates: Iterable[str] = (DATA_PLATE,),
) -> Tensor:
    """log p(x, z) - log q(z | x) of samples z ~ q, with every plate scale taken out.

    log w_s = log p(x, z_s) - log q(z_s | x),  z_s ~ q. The mean is the ELBO, the log-mean-exp the importance bound
    (Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", 2016).

    Args:
        model, guide: Pyro programs.
        batch: data, rows first.
        num_samples: S, at least 1.
        seed: of these draws; the random stream outside is left as it was. None draws from that stream's state.
        plates: names of the data plates.

    Returns:
        `(S, B)` in nats where every latent is local; `(S,)`, for all rows together, where a latent is global.

    Raises:
        GuideError: the guide does not fit the model.
        OptionError: num_samples < 1.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5 ** 0.5))
    >>> x = torch.tensor([0.0, 1.0, 2.0])
    >>> lw = log_weights(model, guide, x, num_samples=4)
    >>> lw.shape, bool(torch.allclose(lw, dist.Normal(0.0, 2.0 ** 0.5).log_prob(x).expand(4, 3), atol=1e-5))
    (torch.Size([4, 3]), True)
    """
    terms = log_weight_terms(model, guide, *batch, num_samples=num_samples, seed=seed, plates=plates)
    return terms.total if terms.has_global else terms.local

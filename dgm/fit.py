"""Training a pair: batches, schedules, KL warm-up, validation and early stopping around `SVI.step`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, overload

import torch
from tqdm import tqdm

from .checkpoint import Checkpoints
from .errors import OptionError
from .feeding import Transform, _sources
from .fitted import Fit, Interrupted, Terminated
from .nonfinite import Policy
from .options import Options, Plan, checked_seed
from .pace import Compile, steady_choices
from .programs import Program, floating_type, move, preserved_rng, program_name
from .resume import fingerprint
from .schedules import KLSchedule
from .store_run import save_run
from .training import Run


@overload
def fit(model: Program, guide: Program, *data: Any, replicas: None = None, **options: Any) -> Fit: ...


@overload
def fit(
    model: Any, guide: Any, *data: Any, replicas: int | Mapping[str, Sequence[Any]], **options: Any
) -> list[Fit]: ...


def fit(  # type: ignore[misc]  # of the options above the signatures say no more
    model: Program,
    guide: Program,
    *data: Any,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    optim: Any = None,
    lr: float = 1e-3,
    loss: Any = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    kl_warmup: float = 0.0,
    kl_weight: float = 1.0,
    kl_schedule: KLSchedule | None = None,
    validation: float | Any | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    transform: Transform | None = None,
    sizes: Mapping[str, int] | None = None,
    compile: Compile = "auto",
    nonfinite: Policy = "stop",
    skips: int = 10,
    replicas: int | Mapping[str, Sequence[Any]] | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
) -> Any:
    """Train a model and a guide together by stochastic variational inference.

    maximise over theta, phi:  E_q[log p_theta(x, z) - kl_weight * ...]: the ELBO over minibatches, scaled to all rows.

    Args:
        model, guide: Pyro programs; their parameters are trained in place. Freeze one by `requires_grad_(False)`.
        data: arrays with rows first (tensor, numpy, pandas), as the model takes them; or one DataLoader. `np.memmap`
            arrays (`np.load(file, mmap_mode="r")`) are read batch by batch, never as a whole, unless the guide has a
            `finish` (Laplace, SWAG, NUTS, an exact last layer): that is given all training rows in memory.
        epochs, steps: how long, one of them; 100 epochs unless told.
        batch_size: rows in a step; None for all. The last smaller batch is used too.
        optim: a torch optimiser factory, a torch optimiser or a PyroOptim; default Adam with `lr`.
        lr: step size of the default optimiser.
        loss: a Pyro ELBO or one of `dgm.ELBO`, `dgm.ImportanceELBO`, ...; default what the guide asks for, else
            `Trace_ELBO()`.
        schedule: factory of a torch learning-rate scheduler; it moves once an epoch, or once a step if `steps` is
            given.
        clip: largest norm of the gradient.
        kl_warmup: epochs (or steps, if `steps` is given) over which the weight of log p(z) - log q(z) rises from 0 to 1
            (Bowman et al., "Generating sentences from a continuous space", 2016).
        kl_schedule: a function of the time in epochs (or steps) that gives the weight instead of the warm-up:
            `dgm.schedules.cyclical(10)`, or one of your own.
        validation: share of the rows held out, or held-out arrays; their bound stands in the history.
        validate_every: epochs between validations.
        patience: stop by `NoisyPlateau(patience)` on the held-out bound, and keep the best validated parameters.
        seed: of the noise and of the data order; the random stream outside is left as it was.
        device, dtype: where, and in which floating type, to train; default as the programs are: data are converted to
            the type of the model's parameters, else the guide's (replicas, whose guides are not made yet: else the
            data's own, where they are tensors).
        progress: show a progress bar.
        transform: `(batch, generator) -> batch`, applied to every training batch (stochastic binarization).
        sizes: rows of the full data for each data plate; default the number of rows for the plate "data".
        compile: False, "trace", "inductor" or "auto": how a step runs, see `SVI`; the numbers are the same.
        nonfinite: what to do at a step whose loss or gradient is not finite: "stop", or "skip" that step.
        skips: how many steps "skip" may leave out; one more stops.
        kl_weight: weight of log p(z) - log q(z), after the warm-up; 1 for the ELBO.
        replicas: K trainings as one computation: a number (seeds seed, seed + 1, ...), or columns of K values: "seed",
            "lr", "kl_weight", "rows" (index arrays: each replica's split of the data), and any argument of the model's
            maker by name, such as a prior scale. Then `model` makes a model, `guide` makes its guide
            `(model, *batch) -> guide` (or both are lists of K), and the result is a list of K `Fit`s. Replica k is
            the single run with the same seed. One that diverges is frozen; its `error` says so. Pairs that have no
            graph are trained one after another.
        checkpoint: a folder, or `Checkpoints(folder, seconds=..., steps=...)`: the whole state of the training is saved
            there every now and then, when it ends, and on Ctrl-C and SIGTERM. The same call goes on where the folder's
            newest state stands, also in the middle of an epoch, and ends with the bits of a training that was never
            stopped (same machine, same number of threads; `dgm.resume`). A training that has ended is not made again;
            with more epochs it goes on. To give the pair back in another process: `dgm.restore(folder, model, guide)`.

    Returns:
        a `Fit`: the trained pair and its history; with `replicas` a list of them.

    Raises:
        DataError, ModelError, GuideError, OptionError: before the first step, see `SVI.prepare` and `as_tensors`.
        TrainingError: the loss or gradient is not finite; the parameters are those of the last good step, and the
            error's `fit` holds the history.
        Interrupted: Ctrl-C, after the step that was begun (a second Ctrl-C: at once); its `fit` holds the history.
        Terminated: SIGTERM of a training with checkpoints; exit code 143.
        OptionError: the checkpoint's folder is in use, or holds another training; the message names what differs.
        DataError: no checkpoint in the folder can be read.

    >>> import pyro, pyro.distributions as dist
    >>> from pyro.infer.autoguide import AutoNormal
    >>> def model(x):
    ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("x", dist.Normal(m, 1.0), obs=x)
    >>> result = fit(model, AutoNormal(model), torch.ones(20), epochs=5, batch_size=10)
    >>> len(result.history), result.steps
    (5, 10)
    >>> fits = fit(lambda: model, lambda model, x: AutoNormal(model), torch.ones(20), epochs=2, replicas=3)
    >>> [one.seed for one in fits]
    [0, 1, 2]
    """
    told = {name: value for name, value in locals().items() if name in {f.name for f in fields(Options)}}
    options = Options(**told)
    kept = checkpoints(checkpoint)
    if replicas is not None:
        from .fit_replicas import fit_replicas

        return fit_replicas(model, guide, data, replicas, options, kept)
    plan = options.plan(options.seed, options.kl_weight)
    move(model, guide, device=device, dtype=dtype)
    seen = dtype if dtype is not None else floating_type(model, guide)
    source, held_out = _sources(data, validation, batch_size, plan.seed, transform, device, seen)
    run = Run.of(options, model, guide, source, held_out, plan, lr)
    with preserved_rng(plan.seed), tqdm(total=plan.total(source.steps), disable=not progress, unit="step") as bar:
        if kept is None:
            return run.go(schedule, bar)
        run.told = fingerprint(options, source, held_out, model=program_name(model), guide=program_name(guide))
        with kept.open(), steady_choices():
            result = run.go(schedule, bar, kept)
            save_run(kept.folder, {}, result, example=run.example or source.first())
            return result


def checkpoints(where: str | os.PathLike[str] | Checkpoints | None) -> Checkpoints | None:
    """Where a training is kept; None where it is not."""
    if where is None or isinstance(where, Checkpoints):
        return where
    if not isinstance(where, (str, os.PathLike)):
        raise OptionError(f"checkpoint is {where!r}, expected a folder, Checkpoints(folder, ...), or None")
    return Checkpoints(where)


__all__ = ["Fit", "Interrupted", "Options", "Plan", "Terminated", "checked_seed", "fit"]

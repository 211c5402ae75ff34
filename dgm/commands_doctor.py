"""`dgm doctor`: what is wrong with this installation, or with this model, guide and data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .environment import environment

if TYPE_CHECKING:
    from .commands import Source

OK, FOUND = 0, 1
STEPS = 300


def run_environment(thorough: bool) -> int:
    """Print what dgm runs on; 1 where something is to be mended. Nothing is imported that could be broken."""
    found = environment(thorough=thorough)
    print(found)
    return FOUND if found.problems else OK


def run_doctor(
    source: Source,
    *,
    guide: str,
    attach: str,
    epochs: int | None,
    steps: int | None,
    batch_size: int | None,
    lr: float | None,
    seed: int,
) -> int:
    """Train a pair for a while, watch it, and print the findings in order of harm; 1 where there are some.

    Raises:
        DGMError: unknown names, bad data or options, or a pair that cannot be trained at all.
    """
    from .commands import plural, task  # here, because the other command must run where torch does not
    from .errors import OptionError
    from .options import checked_seed
    from .programs import program_name

    if epochs is not None and steps is not None:
        raise OptionError("epochs and steps are both given, expected one of them")
    job, seed = task(source, epochs=epochs, batch_size=batch_size, lr=lr), checked_seed(seed)
    if steps is None:
        steps = STEPS if epochs is None else epochs * -(-len(job.data.train[0]) // job.batch_size)
    ((name, make),) = job.guides([guide], attach).items()
    model, attached = job.pair(make, seed)
    print(f"{program_name(model)} on {job.data.name} with {name}: {plural(steps, 'step')}", flush=True)
    diagnosis = importlib.import_module(".doctor", __package__).doctor(
        model,
        *job.data.train,
        guide=attached,
        batch_size=job.batch_size,
        lr=job.lr,
        steps=steps,
        seed=seed,
        transform=job.data.transform,
    )
    print(diagnosis)
    return FOUND if diagnosis.findings else OK

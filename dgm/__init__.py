"""dgm: deep generative models and Bayesian neural networks on Pyro, trained with any approximate posterior.

Names are imported when they are used, so that `dgm --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "latents": "sites",
    "Packing": "packing",
    "SVI": "svi",
    "ELBO": "objectives",
    "ImportanceELBO": "importance",
    "RenyiELBO": "importance",
    "ReweightedWakeSleep": "importance",
    "fit": "fit",
    "Fit": "fit",
    "Checkpoints": "checkpoint",
    "restore": "restore",
    "start_from": "ladder",
    "log_weights": "weights",
    "log_weight_terms": "weights",
    "doctor": "doctor",
    "Diagnosis": "findings",
    "evaluate": "evaluate",
    "Evaluation": "evaluation",
    "Estimate": "estimate",
    "annealed_bound": "annealing",
    "sandwich": "sandwich",
    "gaps": "gaps",
    "latent_diagnostics": "latent_diagnostics",
    "calibrate": "calibration",
    "sample_chains": "chains",
    "sensitivity": "sensitivity",
    "compare": "compare",
    "Comparison": "compare",
    "load": "datasets",
    "Dataset": "datasets",
}

_MODULES = ("schedules",)

__all__ = [
    "ELBO",
    "SVI",
    "Checkpoints",
    "Comparison",
    "Dataset",
    "Diagnosis",
    "Estimate",
    "Evaluation",
    "Fit",
    "ImportanceELBO",
    "Packing",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "__version__",
    "annealed_bound",
    "calibrate",
    "compare",
    "doctor",
    "evaluate",
    "fit",
    "gaps",
    "latent_diagnostics",
    "latents",
    "load",
    "log_weight_terms",
    "log_weights",
    "restore",
    "sample_chains",
    "sandwich",
    "schedules",
    "sensitivity",
    "start_from",
]

if TYPE_CHECKING:
    from . import schedules
    from .annealing import annealed_bound
    from .calibration import calibrate
    from .chains import sample_chains
    from .checkpoint import Checkpoints
    from .compare import Comparison, compare
    from .datasets import Dataset, load
    from .doctor import doctor
    from .estimate import Estimate
    from .evaluate import evaluate
    from .evaluation import Evaluation
    from .findings import Diagnosis
    from .fit import Fit, fit
    from .gaps import gaps
    from .importance import ImportanceELBO, RenyiELBO, ReweightedWakeSleep
    from .ladder import start_from
    from .latent_diagnostics import latent_diagnostics
    from .objectives import ELBO
    from .packing import Packing
    from .restore import restore
    from .sandwich import sandwich
    from .sensitivity import sensitivity
    from .sites import latents
    from .svi import SVI
    from .weights import log_weight_terms, log_weights


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _WHERE:
        value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dgm' has no attribute {name!r}")


class _Package(ModuleType):
    """`dgm.fit`, `dgm.evaluate`, `dgm.compare` are the functions, whoever imports the modules of these names first."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _WHERE.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

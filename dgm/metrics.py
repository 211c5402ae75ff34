"""How good predictions are: of one number, of several, and of a class, on the original scale of y."""

from __future__ import annotations

from .metrics_categorical import CategoricalPrediction
from .metrics_gaussian import GaussianPrediction
from .metrics_vector import VectorPrediction, energy_score

__all__ = ["CategoricalPrediction", "GaussianPrediction", "VectorPrediction", "energy_score"]

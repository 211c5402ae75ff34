"""Means of scores over the data, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import torch

from .bounds import mean_and_standard_error


def score_means(frame: pd.DataFrame, names: Sequence[str], errors: bool) -> dict[str, float]:
    r"""Mean of each column over its rows, and with `errors` NAME_se; the squared error becomes the rmse.

    .. math:: \mathrm{se}(\mathrm{rmse}) = \mathrm{se}(\mathrm{mse}) / (2\,\mathrm{rmse})

    by the delta method. An error is NaN for one row, or where the mean is infinite.

    >>> score_means(pd.DataFrame({"squared_error": [4.0, 4.0]}), ["squared_error"], errors=True)
    {'rmse': 2.0, 'rmse_se': 0.0}
    """
    out: dict[str, float] = {}
    for name in names:
        mean, error = mean_and_standard_error(torch.tensor(frame[name].tolist(), dtype=torch.float64))
        if name == "squared_error":
            name, mean = "rmse", math.sqrt(mean)
            error = error / (2 * mean) if mean > 0 else 0.0 * error
        out[name] = mean
        if errors:
            out[f"{name}_se"] = error
    return out

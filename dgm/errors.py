"""Errors that name the site or argument, what was expected, what came, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DGMError(Exception):
    """Base of every error that dgm raises on purpose."""

    def __init__(self, *args: object):
        super().__init__(*(without_shapes(a) if isinstance(a, str) else a for a in args))


class DataError(DGMError, ValueError):
    """The data cannot be what the model is meant to see: damaged, empty, misshapen or outside the support."""


class ModelError(DGMError, ValueError):
    """The model program cannot be read, or cannot be used with the guide or loss at hand."""


class GuideError(DGMError, ValueError):
    """The guide does not cover the model's latents, or has nothing to train."""


class OptionError(DGMError, ValueError):
    """An argument or command-line option is out of its domain."""


class TrainingError(DGMError, RuntimeError):
    """Training met a value that is not finite; the last good parameters are kept."""


def without_shapes(text: str) -> str:
    """A message without the table of shapes that Pyro's traces append to every error that passes through them.

    >>> without_shapes("too wide\\nTrace Shapes:\\n Param Sites:")
    'too wide'
    """
    head, found, _ = text.partition("Trace Shapes:")
    return head.rstrip() if found else text


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A sentence that offers the nearest known names, or lists them all.

    >>> did_you_mean("digit", ["digits", "diabetes"])
    "did you mean 'digits'?"
    >>> did_you_mean("xyz", ["b", "a"])
    'known: a, b'
    """
    known = sorted(set(options))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known: " + (", ".join(known) if known else "none")

"""What all pages share: templates that escape every name, and a file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from .errors import OptionError
from .style import svg

__all__ = ["Drawn", "environment", "shown", "write_text"]

Drawn = tuple[str, str, str, Figure]
"""Name (letters and hyphens), title, what it means, and the picture."""


def environment() -> Environment:
    """The templates of this package, with every value escaped."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def shown(drawn: Iterable[Drawn]) -> list[dict[str, Any]]:
    """Pictures as the templates want them."""
    return [
        {
            "name": name,
            "title": title,
            "text": text,
            "narrow": figure.get_size_inches()[0] < 8,
            "svg": Markup(svg(figure, name, f"{title}. {text}")),
        }
        for name, title, text, figure in drawn
    ]


def write_text(page: str, path: str | os.PathLike[str]) -> Path:
    """Write a page; folders are made, an old page is replaced once the new one is complete.

    Raises:
        OptionError: the page cannot be written there.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)  # a link of this name would be followed
        part.write_text(page, encoding="utf-8", errors="replace")
        os.replace(part, target)
    except OSError as error:
        reason = error.strerror or error
        raise OptionError(
            f"report: cannot write {target}: {reason}; choose a path in a folder you can write to"
        ) from error
    finally:
        with suppress(OSError):  # it is gone once the page is in place, or its folder never was
            part.unlink()
    return target

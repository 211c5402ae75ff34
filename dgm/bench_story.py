"""Chapters of a report: what happened, in the order that it is told, with sentences, a table and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from .bench_tables import frame_table, markdown
from .page import Drawn, shown
from .store import write_whole

__all__ = ["Chapter", "chapter_markdown", "chapter_parts", "save_pictures"]


@dataclass(frozen=True)
class Chapter:
    """A part of a story.

    title: its heading. says: pairs of what is told ("symptom", "cure", ...) and the sentence. table: numbers, or None.
    figures: pictures.
    """

    title: str
    says: Sequence[tuple[str, str]] = ()
    table: pd.DataFrame | None = None
    figures: Sequence[Drawn] = field(default_factory=tuple)


def chapter_markdown(chapter: Chapter, base: str = "") -> str:
    """As Markdown; pictures are links to the files of `save_pictures`, in the folder `base`.

    >>> print(chapter_markdown(Chapter("A", [("symptom", "it is flat")])))
    ### A
    <BLANKLINE>
    * **symptom**: it is flat
    """
    said = "\n".join(f"* **{name}**: {_safe(text)}" for name, text in chapter.says)
    parts = [f"### {chapter.title}", said]
    parts += [f"![{title}: {_safe(text)}]({base}{name}.png)" for name, title, text, _ in chapter.figures]
    if chapter.table is not None:
        parts.append(markdown(frame_table("", chapter.table)).removeprefix("### \n\n"))
    return "\n\n".join(part for part in parts if part)


def chapter_parts(chapter: Chapter) -> dict[str, Any]:
    """As the page's template wants it."""
    table = frame_table("", chapter.table) if chapter.table is not None else None
    return {"title": chapter.title, "says": list(chapter.says), "figures": shown(chapter.figures), "table": table}


def save_pictures(chapters: Sequence[Chapter], folder: Path) -> None:
    """Each picture as PNG on white, for pages that show no pictures of their own."""
    for name, _, _, figure in (drawn for chapter in chapters for drawn in chapter.figures):
        write_whole(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=110, facecolor="white"))


def _safe(text: str) -> str:
    return text.replace("<", "&lt;").replace("[", "(").replace("]", ")")

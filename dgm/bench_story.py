"""Chapters of a report: what happened, in the order that it is told, with sentences, a table and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import imread

from .bench_tables import frame_table, markdown
from .errors import DataError
from .page import Drawn, shown
from .store import write_whole

__all__ = ["Chapter", "chapter_markdown", "chapter_parts", "kept", "picture_links", "save_pictures"]

PICTURES = "pictures.json"
DPI = 110


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
    parts += picture_links(chapter.figures, base)
    if chapter.table is not None:
        parts.append(markdown(frame_table("", chapter.table)).removeprefix("### \n\n"))
    return "\n\n".join(part for part in parts if part)


def picture_links(figures: Sequence[Drawn], base: str = "") -> list[str]:
    """Pictures as Markdown: links to the files of `save_pictures`."""
    return [f"![{_safe(title)}: {_safe(text)}]({base}{name}.png)"
            for name, title, text, _ in figures]  # fmt: skip


def chapter_parts(chapter: Chapter) -> dict[str, Any]:
    """As the page's template wants it."""
    table = frame_table("", chapter.table) if chapter.table is not None else None
    return {"title": chapter.title, "says": list(chapter.says), "figures": shown(chapter.figures), "table": table}


def save_pictures(chapters: Sequence[Chapter], figures: Sequence[Drawn], folder: Path) -> None:
    """Each picture as PNG on white, for pages that show none of their own, and `pictures.json`: what each of them is.

    Pictures may need arrays that are not kept beside rows; `kept` finds them again.
    """
    all_ = [(chapter.title, drawn) for chapter in chapters for drawn in chapter.figures]
    all_ += [("", drawn) for drawn in figures]
    for _, (name, _, _, figure) in all_:
        before = Path(str(figure.get_label() or "-"))
        if not before.is_file():
            write_whole(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=DPI, facecolor="white"))
        elif before.resolve() != (folder / f"{name}.png").resolve():
            write_whole(folder / f"{name}.png", partial(shutil.copyfile, before))
    if all_:
        about = [{"chapter": chapter, "name": d[0], "title": d[1], "text": d[2]} for chapter, d in all_]
        text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / PICTURES, lambda part: part.write_text(text, encoding="utf-8"))


def kept(folder: Path | None) -> dict[str, list[Drawn]]:
    """The pictures of a folder by the title of their chapter; "" for those that have none."""
    out: dict[str, list[Drawn]] = {}
    if folder is None or not (folder / PICTURES).is_file():
        return out
    try:
        for one in json.loads((folder / PICTURES).read_text(encoding="utf-8")):
            path = folder / f"{Path(one['name']).name}.png"
            drawn = (str(one["name"]), str(one["title"]), str(one["text"]), _of_file(path))
            out.setdefault(str(one["chapter"]), []).append(drawn)
    except (OSError, ValueError, KeyError, TypeError, SyntaxError) as error:
        raise DataError(f"the pictures of {folder} cannot be read ({PICTURES}): {error}") from error
    return out


def _of_file(path: Path) -> Figure:
    """A picture of a picture; its label is the file."""
    pixels = imread(path)
    figure = Figure(figsize=(pixels.shape[1] / DPI, pixels.shape[0] / DPI), dpi=DPI, label=str(path))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(pixels, interpolation="none", aspect="auto")
    axes.axis("off")
    return figure


def _safe(text: str) -> str:
    return text.replace("<", "&lt;").replace("[", "(").replace("]", ")")

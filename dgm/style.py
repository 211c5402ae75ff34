"""How figures look: one style, colours that follow the order of the guides, and SVG that wears a page's own colours."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

from matplotlib import rc_context
from matplotlib.figure import Figure

# The six colours of Okabe and Ito (Color Universal Design, 2008) that stand out on white and on black alike.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = ("o", "s", "^")
INK = "#808183"  # legible on white and on black
STYLE: Any = {
    "font.size": 9,
    "text.usetex": False,
    "text.parse_math": False,  # a dollar in the name of a guide is a dollar
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.grid": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "figure.facecolor": "none",
    "lines.solid_capstyle": "round",
}
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under our own style, whatever the user's matplotlib is set to, and leave that setting as it was."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def shorten(name: object, width: int = 30) -> str:
    """A name on one line and without control characters, cut to a width in characters.

    >>> shorten("a\\nvery long name", 8)
    'a very …'
    """
    text = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def count(value: float) -> str:
    """A large count in three digits at most, in thousands, millions, ...

    >>> count(300_000), count(1_250_000), count(950)
    ('300 k', '1.2 M', '950')
    """
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * size:
            return (
                f"{value / size:.1f}".removesuffix(".0") + unit if value / size < 9.95 else f"{value / size:.0f}{unit}"
            )
    return f"{value:.0f}"


def share(value: float) -> str:
    """A share of one as a whole percentage that never rounds a few to none, nor most to all.

    >>> share(0.041), share(0.001), share(0.0), share(0.999)
    ('4 %', '<1 %', '0 %', '>99 %')
    """
    if 0 < value < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < value < 1 else f"{100 * value:.0f} %"


def limit(value: float) -> str:
    """A threshold in two digits, halves up as people round.

    >>> limit(0.7), limit(0.565)
    ('0.7', '0.57')
    """
    return f"{value + 1e-9:.2g}"


def ordered(names: Sequence[str], order: Sequence[str] | None) -> list[tuple[int, str]]:
    """(colour number, name) of the names that are there, in the order given, then in their own."""
    full = [*(order or ())]
    full += [name for name in dict.fromkeys(names) if name not in full]
    return [(i, name) for i, name in enumerate(full) if name in set(names)]


def svg(figure: Figure, name: str, label: str = "") -> str:
    """The figure as an SVG element to stand inside an HTML page: no namespace, no address, nothing loaded.

    Grey ink becomes `currentColor` and the n-th colour of the guides `var(--g<n>, ...)`, which the page may set.

    Args:
        figure: made by a function of this module.
        name: letters and hyphens; starts every id of the element, so that two of them can share a page.
        label: what the picture shows, for those who do not see it.

    >>> svg(Figure(), "empty").startswith('<svg class="plot" role="img"')
    True
    """
    buffer = io.StringIO()
    style: Any = {**STYLE, "svg.fonttype": "none", "svg.hashsalt": name}
    with rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has fonts that we have not
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>|<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', " ".join(re.findall(r"<[^>]+>", text))))
    wanted = {a or b for a, b in used}
    text = re.sub(r"<[^>]+>", lambda tag: _page_tag(tag.group(), name, wanted), text)  # names in the text stay as is
    return text.strip().replace('role="img"', f'role="img" aria-label="{html.escape(label or name)}"', 1)


def _page_tag(tag: str, name: str, wanted: set[str]) -> str:
    """One tag of matplotlib's SVG as a page wants it; `wanted` are the ids still to be given, each to one element."""
    if tag.startswith("<svg"):
        box = re.search(r'viewBox="[^"]*"', tag)
        return f'<svg class="plot" role="img" {box.group() if box else ""}>'
    own = re.search(r'\s+id="([^"]*)"', tag)
    if own:
        tag = tag.replace(own.group(), f' id="{name}-{own.group(1)}"' if own.group(1) in wanted else "")
        wanted.discard(own.group(1))
    tag = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', tag).replace("xlink:href=", "href=")
    tag = tag.replace("url(#", f"url(#{name}-")
    tag = re.sub(r"font: ((?:\w+ )*?)([\d.]+px) [^;\"]*", r"font-size: \2; font-family: inherit", tag)
    tag = tag.replace(INK, "currentColor")
    for i, colour in enumerate(COLOURS):
        tag = tag.replace(colour, f"var(--g{i}, {colour})")
    return tag

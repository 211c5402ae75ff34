"""`python -m dgm.benchmarks NAME ...`: measurements of their own by name, and the suites of `dgm bench run`."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path

SUITES = (
    "binarized_mnist",
    "estimators",
    "evidence",
    "exact",
    "families_by_encoder",
    "gaps",
    "gold",
    "guards",
    "posteriordb",
    "speed",
    "targets",
    "uci",
)


def known() -> list[str]:
    """Measurements of their own, and the suites of the runner."""
    from dgm.bench_find import suites

    return sorted({*SUITES, *(name.replace("-", "_") for name in suites())})


def listing() -> str:
    """The suites with the first line of each file."""
    lines = ["usage: python -m dgm.benchmarks SUITE ...   (SUITE --help says more)", ""]
    for name in known():
        source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        lines.append(f"  {name:20s} {(ast.get_docstring(ast.parse(source)) or '').splitlines()[0]}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite that the first word names; 2 where there is none of that name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    name = words[0].replace("-", "_")
    if name not in known():
        print(f"no suite {words[0]!r}\n\n{listing()}", file=sys.stderr)
        return 2
    suite = importlib.import_module(f"dgm.benchmarks.{name}")
    if not hasattr(suite, "main"):  # a suite of the runner
        from dgm.cli import app

        return int(app(["bench", "run", name, *words[1:]], standalone_mode=False) or 0)
    if inspect.signature(suite.main).parameters:
        suite.main(words[1:])
        return 0
    before = sys.argv
    sys.argv = [f"python -m dgm.benchmarks {name}", *words[1:]]  # a suite that reads the command line by itself
    try:
        suite.main()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())

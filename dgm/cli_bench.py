"""The words of `dgm bench`; the work is in `dgm.commands_bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["bench_app"]

HELP = """Benchmark suites: obtained beside published, from one command, resumable.

Start with `dgm bench list`, then `dgm bench run exact --budget smoke`."""

Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter", help="Only cells with name=value,...; several values of one name are alternatives. May be repeated."
    ),
]
Budget = Annotated[str, typer.Option("--budget", help="smoke (a minute), short, or full.")]


def bench_app(go: Callable[..., Any], work: Callable[[str], Any]) -> typer.Typer:
    """The command group; `go` runs work and ends with its exit code, `work` imports a module of commands."""
    bench = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode=None)

    @bench.command("run")
    def run(
        suite: Annotated[str, typer.Argument(help="A suite of `dgm bench list`, or path/to/file.py with a SUITE.")],
        filter: Filters = None,
        jobs: Annotated[int, typer.Option("--jobs", min=1, help="Worker processes with one thread each.")] = 1,
        budget: Budget = "short",
        out: Annotated[
            Path | None,
            typer.Option(
                "--out",
                help="Folder of the results; what it holds is not computed again.",
                show_default="dgm-runs/bench-<suite>-<budget>",
            ),
        ] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Count cells and estimate time, and stop.")] = False,
        renew: Annotated[
            bool, typer.Option("--renew", help="Compute cells again that other code of the library computed.")
        ] = False,
        retry: Annotated[bool, typer.Option("--retry", help="Try cells again that were given up.")] = False,
    ) -> None:
        """Compute what is missing of a suite, and write rows and report."""
        go(
            lambda: work("commands_bench").run_bench(
                suite, filter or [], jobs=jobs, budget=budget, out=out, dry_run=dry_run, renew=renew, retry=retry
            )
        )

    @bench.command("list")
    def list_() -> None:
        """The suites, one line each."""
        go(lambda: work("commands_bench").run_bench_list())

    @bench.command("report")
    def report(
        source: Annotated[
            str | None, typer.Argument(help="A suite (its committed results), or a folder of results.")
        ] = None,
        out: Annotated[
            Path | None,
            typer.Option("--out", help="Folder for rows and report (or, with --all, the file).", show_default="there"),
        ] = None,
        all_: Annotated[
            bool, typer.Option("--all", help="Compose RESULTS.md of all committed results, and their corrections.")
        ] = False,
    ) -> None:
        """Write the report of results anew, from their rows."""
        go(lambda: work("commands_bench").run_bench_report(source, out=out, all_=all_))

    return bench

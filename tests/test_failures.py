"""The table of failures holds all of them, and names tests that exist."""

from __future__ import annotations

import ast
import logging
import re
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import dgm
from dgm.guides.amortized import Amortized
from dgm.models.bayesian_linear_regression import BayesianLinearRegression
from dgm.models.linear_vae import LinearVAE

ROOT = Path(__file__).parents[1]
NOT_YET: tuple[str, ...] = ()
"""Failures whose row names no test so far."""


def rows(text: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Number, the words, and the tests of each row."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if re.fullmatch(r"\|? ?F\d+", cells[0]):
            yield cells[0].strip("| "), cells[1:3], re.findall(r"`([^`]+)`", cells[3] if len(cells) > 3 else "")


@cache
def functions_of(file: str) -> frozenset[str]:
    """Names of the test functions of a file that a run collects."""
    path = ROOT / "tests" / file
    if not path.is_file():
        return frozenset()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return frozenset(n.name for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def faults(text: str) -> list[str]:
    """What is wrong with a table."""
    found, seen = [], []
    for number, words, tests in rows(text):
        seen.append(number)
        if len(words) != 2 or not all(len(word) > 10 for word in words):
            found.append(f"{number} says too little")
        if not tests and number not in NOT_YET:
            found.append(f"{number} names no test")
        for test in tests:
            file, _, name = test.partition("::")
            if name not in functions_of(file):
                found.append(f"{number} names {test}, which does not exist")
    expected = [f"F{i}" for i in range(1, 36)]
    return found + ([] if seen == expected else [f"expected F1 to F35 in their order, found {seen}"])


def table() -> str:
    return (ROOT / "FAILURES.md").read_text(encoding="utf-8")


def test_every_failure_stands_there_with_tests_that_exist() -> None:
    assert faults(table()) == []
    assert len({test for *_, tests in rows(table()) for test in tests}) > 50


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("test_cli.py::test_a_seed_that_is_none_is_bad_usage", "test_cli.py::test_gone"), "which does not exist"),
        (("test_cli.py::test_a_seed_that_is_none_is_bad_usage", "test_gone.py::test_x"), "which does not exist"),
        (("| F7 |", "| F8 |"), "expected F1 to F35"),
        (("| F24 | distributed", "| G24 | distributed"), "expected F1 to F35"),
        (("`test_failures.py::test_nothing_is_distributed`", "none"), "F24 names no test"),
    ],
)
def test_a_wrong_table_is_seen(change: tuple[str, str], told: str) -> None:
    assert change[0] in table()
    assert any(told in fault for fault in faults(table().replace(*change)))


# ------------------------------------------------------------------------------------- failures without a file


def trained() -> Any:
    x = torch.linspace(-1.0, 1.0, 20).reshape(10, 2)
    model = BayesianLinearRegression(2)
    return dgm.fit(model, AutoNormal(model), (x, x.sum(1)), epochs=3, batch_size=4, compile=False)


def test_training_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a connection is opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused, raising=True)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    assert len(trained().history) == 3
    assert dgm.load("digits").kind == "images"
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    dgm.compare(LinearVAE(3, 2), {"a": Amortized}, x, epochs=1, seeds=1, num_samples=100, compile=False)
    with pytest.raises(AssertionError, match="a connection is opened"):
        socket.create_connection(("localhost", 9))  # the guard is one


def test_a_log_that_cannot_be_written_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    handler = logging.StreamHandler(Gone())  # type: ignore[arg-type]
    log = logging.getLogger("dgm")
    log.addHandler(handler)
    try:
        log.warning("told to nobody")
        assert "No space left" in capsys.readouterr().err  # once, by logging itself
        assert len(trained().history) == 3
    finally:
        log.removeHandler(handler)


def test_nothing_is_distributed() -> None:
    files = [file for part in ("dgm", "models", "guides") for file in (ROOT / part).glob("*.py")]
    assert len(files) > 100
    for file in files:
        code = file.read_text(encoding="utf-8")
        assert not re.search(r"torch\.distributed|DistributedDataParallel|init_process_group", code), file.name

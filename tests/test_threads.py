"""A compiled step runs in one thread where others do not pay, and leaves torch's setting as it was."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dgm import threads
from dgm.threads import fewest_threads, one_thread


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def sleeper(alone: float, together: float, calls: list[int]) -> object:
    """A step that takes so many seconds in one thread and in all of them, and counts itself in its input."""

    def step(x: Tensor) -> Tensor:
        calls.append(torch.get_num_threads())
        time.sleep(alone if torch.get_num_threads() == 1 else together)
        return x.add_(1.0)

    return step


@pytest.mark.parametrize(("alone", "together", "chosen"), [(0.004, 0.004, 1), (0.004, 0.001, 2), (0.06, 0.06, 2)])
def test_one_thread_unless_all_are_worth_it(alone: float, together: float, chosen: int) -> None:
    x, calls = torch.zeros(3), list[int]()
    step = fewest_threads(sleeper(alone, together, calls), [x])  # type: ignore[arg-type]
    assert torch.equal(x, torch.zeros(3))  # the trial had copies
    calls.clear()
    step(x)
    assert calls == [chosen] and torch.equal(x, torch.ones(3)) and torch.get_num_threads() == 2


def test_no_trial_where_there_is_one_thread() -> None:
    torch.set_num_threads(1)
    calls = list[int]()
    step = sleeper(0.0, 0.0, calls)
    assert fewest_threads(step, [torch.zeros(1)]) is step and not calls  # type: ignore[arg-type]


def test_the_setting_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), one_thread():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2


def test_a_large_step_is_tried_twice_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "LARGE", 0.0)
    calls = list[int]()
    fewest_threads(sleeper(0.001, 0.001, calls), [torch.zeros(1)])  # type: ignore[arg-type]
    assert calls == [1, 1]

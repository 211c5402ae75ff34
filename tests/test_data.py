"""Conversion to tensors, splits, batches, and the refusal of data that a likelihood cannot have produced."""

from __future__ import annotations

import doctest

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import dgm.data
from dgm.data import as_tensors, batches, check_batch_size, split
from dgm.errors import DataError, OptionError
from dgm.support import check_support

NAN, INF = float("nan"), float("inf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_doctests() -> None:
    result = doctest.testmod(dgm.data)
    assert result.attempted > 0 and result.failed == 0


# ---------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("target", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "value",
    [
        [[0.0, 1.0], [2.0, 3.0]],
        [[0, 1], [2, 3]],
        np.array([[0, 1], [2, 3]], dtype=np.uint8),
        np.array([[0, 1], [2, 3]], dtype=">f8"),
        np.array([[2, 3], [0, 1]], dtype=np.float16)[::-1],
        torch.tensor([[0, 1], [2, 3]]),
        torch.tensor([[0.0, 1.0], [2.0, 3.0]], requires_grad=True),
        pd.DataFrame({"a": [0, 2], "b": [1.0, 3.0]}),
        pd.DataFrame({"a": pd.array([0, 2], dtype="Int64"), "b": [1, 3]}),
    ],
)
def test_every_kind_of_matrix_becomes_the_same_tensor(value: object, target: torch.dtype) -> None:
    (x,) = as_tensors(value, dtype=target)
    assert x.dtype == target and not x.requires_grad
    assert torch.equal(x, torch.tensor([[0, 1], [2, 3]], dtype=target))


def test_default_dtype_and_labels() -> None:
    x, y = as_tensors((np.zeros((3, 2)), [0, 1, 2]))
    assert x.dtype == torch.get_default_dtype() and y.dtype == torch.int64
    assert as_tensors(torch.tensor([True, False]))[0].dtype == torch.int64
    assert as_tensors(pd.Series([1, 2], dtype="Int64"))[0].dtype == torch.int64
    assert as_tensors(pd.Series([True, False]))[0].tolist() == [1, 0]
    assert as_tensors([1.5, 2.5])[0].is_floating_point()


def test_one_or_several_arrays() -> None:
    a = np.zeros((2, 3))
    assert len(as_tensors(a)) == 1
    assert len(as_tensors([a, a])) == 2
    assert len(as_tensors((a, [1.0, 2.0]))) == 2
    assert as_tensors([[1.0, 2.0], [3.0, 4.0]])[0].shape == (2, 2)
    assert as_tensors((1.0, 2.0))[0].shape == (2,)


def test_callers_array_is_copied_and_read_only_arrays_are_fine() -> None:
    a = np.zeros((2, 2))
    a.setflags(write=False)
    (x,) = as_tensors(a)
    x += 1
    assert a.sum() == 0


def test_dtype_must_be_floating() -> None:
    with pytest.raises(OptionError, match=r"torch\.int64"):
        as_tensors([1.0], dtype=torch.int64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            pd.DataFrame({"age": [1, 2, 3, NAN], "b": 0.0}),
            r"^column 'age' \(0\) of x has 1 NaN \(row 3\); drop or impute it$",
        ),
        (pd.DataFrame({"a": [0.0, 1.0], "b": [INF, -INF]}), r"^column 'b' \(1\) of x has 2 inf \(rows 0, 1\)"),
        (pd.DataFrame({"a": pd.array([1, None], dtype="Int64")}), r"^column 'a' \(0\) of x has 1 NaN \(row 1\)"),
        (pd.DataFrame({"a": [0.0], "town": ["Ulm"]}), r"^column 'town' \(1\) of x holds .*'Ulm'.*encode it or drop it"),
        (np.array([[0.0, NAN], [0.0, NAN]]), r"^column 1 of x has 2 NaN \(rows 0, 1\)"),
        (np.full((2, 3), NAN), r"^column 0 of x has 2 NaN \(rows 0, 1\), and so have 2 more columns"),
        (torch.full((9, 2, 2), NAN), r"^x has 36 NaN \(rows 0, 1, 2, 3, 4, \.\.\.\)"),
        ((np.zeros((4, 1)), [0.0, 1.0, 2.0, NAN]), r"^y has 1 NaN \(row 3\)"),
        ((np.zeros((2, 1)), pd.Series([0.0, INF], name="price")), r"^y \(column 'price'\) has 1 inf \(row 1\)"),
        (np.array([[1e300]]), r"^column 0 of x has 1 value too large for torch\.float32 \(row 0\); rescale it"),
        ([], r"^x is empty: its shape is \(0,\)"),
        ((), r"^x is empty"),
        (pd.DataFrame({"a": []}), r"^x is empty"),
        (np.zeros((5, 0)), r"^x is empty: its shape is \(5, 0\)"),
        (torch.tensor(1.0), r"^x is a single number"),
        (3.0, r"^x is a single number"),
        ([[1.0, 2.0], [3.0]], r"^x is no array"),
        ([1.0, None], r"^x is a list and not an array of numbers"),
        (["a", "b"], r"^x is <U1 and not an array of numbers"),
        ((np.zeros(2), None), r"^y is a NoneType and not"),
        (torch.zeros(2, dtype=torch.complex64), r"^x holds complex numbers"),
        ((np.zeros((10, 1)), np.zeros(9)), r"^x has 10 rows, y has 9 rows"),
    ],
)
def test_bad_data_is_named(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_tensors(data)


def test_names_of_the_arguments() -> None:
    with pytest.raises(DataError, match=r"^column 0 of tides has 1 NaN \(row 0\)"):
        as_tensors(np.array([[NAN]]), names=["tides"])
    with pytest.raises(DataError, match=r"^array 2 has 1 NaN"):
        as_tensors(([1.0], [2.0], [NAN]))


# ----------------------------------------------------------------------------------------------- splits and batches


@pytest.mark.parametrize(
    ("n", "size", "lengths"),
    [(1, 1, [1]), (1, None, [1]), (7, 8, None), (8, 8, [8]), (9, 8, [9]), (17, 8, [8, 9]), (18, 8, [8, 8, 2])],
)
def test_batch_edges(n: int, size: int | None, lengths: list[int] | None) -> None:
    if lengths is None:
        with pytest.raises(DataError, match=r"batch_size=8 is larger than the data \(7 rows\); use at most 7"):
            batches(n, size, generator())
        return
    parts = list(batches(n, size, generator()))
    assert [len(p) for p in parts] == lengths
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))


def test_batches_of_one_stay_single() -> None:
    assert [len(p) for p in batches(3, 1, generator())] == [1, 1, 1]


def test_batches_use_their_generator_only() -> None:
    state = torch.get_rng_state()
    g = generator(1)
    first, second = torch.cat(list(batches(50, 10, g))), torch.cat(list(batches(50, 10, g)))
    assert torch.equal(first, torch.cat(list(batches(50, 10, generator(1)))))
    assert not torch.equal(first, second)
    assert torch.equal(torch.cat(list(batches(50, 10))), torch.arange(50))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "8"])
def test_batch_size_must_be_a_positive_whole_number(size: object) -> None:
    with pytest.raises(OptionError, match="batch_size must be a whole number >= 1"):
        check_batch_size(10, size)  # type: ignore[arg-type]


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        check_batch_size(0, None)


def test_split_partitions_and_keeps_rows_together() -> None:
    x = torch.arange(20.0)
    train, valid = split((x, -x), 0.25, generator(3))
    assert len(valid[0]) == 5 and torch.equal(train[0], -train[1]) and torch.equal(valid[0], -valid[1])
    assert torch.equal(torch.cat((train[0], valid[0])).sort().values, x)
    again = split((x, -x), 0.25, generator(3))
    assert torch.equal(again[1][0], valid[0])
    assert not torch.equal(split((x,), 0.25, generator(4))[1][0], valid[0])
    assert len(split((x[:2],), 0.01, generator())[1][0]) == 1
    for fraction in (0.0, 1.0, -0.1, NAN):
        with pytest.raises(OptionError, match="fraction"):
            split((x,), fraction, generator())
    with pytest.raises(DataError, match="1 rows cannot be split"):
        split((x[:1],), 0.5, generator())


# ---------------------------------------------------------------------------------------------------------- support

ONE = torch.ones(4)
GREY = torch.tensor([0.0, 0.5, 0.25, 1.0])
GOOD = [
    (GREY.round(), dist.Bernoulli(0.5 * ONE)),
    (GREY.round().reshape(2, 2), dist.Bernoulli(0.5 * ONE.reshape(2, 2)).to_event(1)),
    (GREY, dist.ContinuousBernoulli(0.4 * ONE)),
    (GREY, dist.Normal(0 * ONE, 1)),
    (torch.tensor([0, 2]), dist.Categorical(torch.ones(2, 3))),
    (torch.eye(3), dist.OneHotCategorical(torch.ones(3, 3))),
    (torch.tensor([[0.2, 0.8]]), dist.Dirichlet(torch.full((1, 2), 0.5))),
    (0 * ONE, dist.Exponential(ONE)),
    (4 * ONE, dist.Poisson(ONE)),
    (torch.tensor([0.1, 0.9]), dist.Beta(torch.ones(2), 2).mask(torch.tensor([True, False]))),
    (ONE, dist.Delta(ONE)),
    (torch.zeros(4, 2), dist.MultivariateNormal(torch.zeros(4, 2), torch.eye(2))),
    (0 * ONE, dist.Uniform(0 * ONE, 1)),
    (torch.tensor(3.0), dist.Normal(0.0, 1.0)),
]


@pytest.mark.parametrize(("value", "fn"), GOOD, ids=lambda a: type(a).__name__)
def test_values_inside_pass(value: Tensor, fn: dist.Distribution) -> None:
    check_support(value, fn, "x")


BERNOULLI = dist.Bernoulli(0.5 * ONE)
BAD = [
    (
        GREY,
        BERNOULLI,
        r"^site 'x': 50 % of the observed values lie outside the support \{0, 1\} of Bernoulli "
        r"\(float32, min 0, max 1\); grey pixels: binarize='batch', 'once' or 'threshold', "
        r"or use a Gaussian or ContinuousBernoulli likelihood$",
    ),
    (255 * GREY, BERNOULLI, r"max 255\); divide by 255 first, then binarize='batch'"),
    (torch.tensor([-1.0, 1, 1, -1]), BERNOULLI, r"50 %.*\(y \+ 1\) / 2"),
    (torch.tensor([-0.3, 1, 1, -1]), BERNOULLI, "use a Gaussian likelihood"),
    (torch.ones(4, dtype=torch.int64), BERNOULLI, r"Bernoulli needs floating values, got torch\.int64"),
    (GREY, dist.Beta(2 * ONE, 2), r"2 observed values \(50 %\) are on the edge of \(0,1\), where the density of Beta"),
    (0 * ONE, dist.Gamma(2 * ONE, 2), r"4 observed values \(100 %\) are on the edge of \(0,inf\)"),
    (ONE, dist.Uniform(0 * ONE, 1), r"edge of \(0,1\), where the density of Uniform"),
    (torch.tensor([[0.0, 1.0]]), dist.Dirichlet(torch.full((1, 2), 0.5)), "edge of the simplex"),
    (torch.tensor([[0.5, 1.0]]), dist.Dirichlet(torch.ones(1, 2)), r"100 %.*sums run from 1\.5 to 1\.5"),
    (9 * GREY, dist.ContinuousBernoulli(0.4 * ONE), r"75 %.*between 0 and 1.*divide by 255"),
    (
        torch.tensor([0, 3]),
        dist.Categorical(torch.ones(2, 3)),
        r"50 %.*\{0, ..., 2\}.*knows 3 classes, the data needs 4",
    ),
    (torch.tensor([1, 3]), dist.Categorical(torch.ones(2, 3)), "labels count from 1: subtract 1"),
    (torch.tensor([-1, 2]), dist.Categorical(torch.ones(2, 3)), "values below 0 mean nothing here"),
    (GREY, dist.Categorical(torch.ones(4, 256)), r"take \(x \* 255\)\.round\(\)"),
    (torch.eye(3) + 1, dist.OneHotCategorical(torch.ones(3, 3)), "one_hot"),
    (GREY, dist.Poisson(ONE), r"50 %.*\{0, 1, \.\.\.\} of Poisson.*whole numbers"),
    (0 * ONE, dist.LogNormal(0 * ONE, 1), "100 %.*LogNormal.*likelihood on all reals"),
    (torch.tensor([0.0, 1, NAN, 2]), dist.Normal(0 * ONE, 1), r"observed value of site 'x' has 1 NaN \(row 2\)"),
    (torch.tensor([0.0, 1, INF, 2]), dist.Normal(0 * ONE, 1), r"observed value of site 'x' has 1 inf \(row 2\)"),
    (torch.tensor(NAN), dist.Normal(0.0, 1.0), r"site 'x' has 1 NaN"),
    (
        ONE[:, None],
        dist.Normal(0 * ONE, 1),
        r"shape \(4, 1\), but Normal has shape \(4,\); pass it with \.squeeze\(-1\)",
    ),
    (ONE, dist.Normal(0 * ONE[:, None], 1), r"shape \(4,\), but Normal has shape \(4, 1\); take \.squeeze\(-1\) of"),
    (ONE, dist.Normal(torch.zeros(4, 4), 1), r"\(N, 1\) met a plate of N rows"),
    (ONE, dist.Normal(torch.zeros(2, 2), 1), r"\.reshape\(\(2, 2\)\)"),
    (ONE[:3], dist.Normal(0 * ONE, 1), "wrong number of rows or columns"),
    (1.0, dist.Normal(0.0, 1.0), "is a float, not a tensor"),
    (torch.ones(0), dist.Normal(torch.zeros(0), 1), "is empty"),
]


@pytest.mark.parametrize("wrap", ["plain", "to_event", "mask", "expanded"])
@pytest.mark.parametrize(("value", "fn", "message"), BAD, ids=lambda a: type(a).__name__)
def test_values_outside_are_refused(value: Tensor, fn: dist.Distribution, message: str, wrap: str) -> None:
    if wrap == "to_event":
        fn = fn.to_event(len(fn.batch_shape))
    elif wrap == "mask":
        fn = fn.mask(torch.ones(fn.batch_shape, dtype=torch.bool))
    elif wrap == "expanded":
        fn = dist.torch_distribution.ExpandedDistribution(fn, fn.batch_shape)
    with pytest.raises(DataError, match=message):
        check_support(value, fn, "x")


def test_a_value_that_pyro_ignores_is_ignored() -> None:
    check_support(torch.tensor([NAN]), dist.Normal(torch.zeros(1), 1.0).mask(False), "x")


def test_a_hidden_row_must_still_be_finite() -> None:
    """Pyro refuses such a value too: the mask is applied after the density."""
    fn = dist.Normal(torch.zeros(2), 1.0).mask(torch.tensor([True, False]))
    with pytest.raises(DataError, match=r"1 NaN \(row 1\)"):
        check_support(torch.tensor([0.0, NAN]), fn, "x")


def test_trailing_dimension_hidden_by_to_event() -> None:
    """The trap itself: under ``.to_event`` Pyro accepts (N, 1) against (N,), with another loss and no message."""

    def model(y: Tensor) -> None:
        pyro.sample("y", dist.Normal(torch.zeros(5), 1.0).to_event(1), obs=y)

    y = torch.arange(5.0)
    right, wrong = (pyro.poutine.trace(model).get_trace(v) for v in (y, y[:, None]))
    assert torch.isfinite(wrong.log_prob_sum()) and not torch.isclose(right.log_prob_sum(), wrong.log_prob_sum())
    check_support(y, right.nodes["y"]["fn"], "y")
    with pytest.raises(DataError, match=r"shape \(5, 1\), but Normal has shape \(5,\)"):
        check_support(y[:, None], wrong.nodes["y"]["fn"], "y")

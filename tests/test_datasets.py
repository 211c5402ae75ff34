"""Data sets by name and from files: shapes, splits, binarization, checksums, and errors that say what to do."""

from __future__ import annotations

import doctest
import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import dgm.datasets
import dgm.files
from dgm.datasets import DataFile, Dataset, find_files, from_file, gap_split, load, names, pbp_split
from dgm.errors import DataError, OptionError

EMBEDDED = ["breast-cancer", "diabetes", "digits", "gap", "moons", "moons-points"]
UCI_ROWS = {
    "uci-boston": (506, 13, 51, 22.5328, 9.1880),
    "uci-concrete": (1030, 8, 103, 35.8180, 16.6976),
    "uci-energy": (768, 8, 77, 22.3072, 10.0836),
    "uci-kin8nm": (8192, 8, 819, 0.7143, 0.2636),
    "uci-naval": (11934, 16, 1193, 0.9750, 0.0147),
    "uci-power": (9568, 4, 957, 454.365, 17.0661),
    "uci-protein": (45730, 9, 4573, 7.7485, 6.1182),
    "uci-wine": (1599, 11, 160, 5.6360, 0.8073),
    "uci-yacht": (308, 6, 31, 10.4954, 15.1359),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DGM_DATA", raising=False)


@pytest.fixture
def real() -> Path:
    """The folder of real data files, where there is one."""
    folder = Path(os.environ.get("DGM_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no folder of real data files (DGM_DATA)")
    return folder


@pytest.mark.parametrize("module", [dgm.files, dgm.datasets], ids=lambda m: m.__name__)
def test_doctests(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0 and result.failed == 0


# -------------------------------------------------------------------------------------------------- by name


def test_names_have_one_line_each() -> None:
    assert set(EMBEDDED) | set(UCI_ROWS) | {"mnist", "fashion-mnist", "binarized-mnist", "omniglot"} <= set(names())
    assert all(about and "\n" not in about for about in names().values())


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_sets(name: str, no_data: None) -> None:
    d = load(name)
    assert str(d).startswith(f"{name}: {d.kind}, ") and str(len(d.train[0])) in str(d)
    for part in (d.train, d.test):
        assert len({len(t) for t in part}) == 1
        assert all(torch.isfinite(t).all() for t in part)
        assert part[0].dtype == torch.get_default_dtype() and part[0].dim() == 2
        assert len(part) == (2 if d.kind in ("regression", "classification") else 1)
    if d.kind == "classification":
        assert d.train[1].dtype == torch.int64 and set(d.train[1].tolist()) == set(range(d.num_classes or 0))


@pytest.mark.parametrize("name", EMBEDDED)
def test_same_request_same_data(name: str) -> None:
    a, b = load(name), load(name)
    assert all(torch.equal(s, t) for s, t in zip((*a.train, *a.test), (*b.train, *b.test), strict=True))


@pytest.mark.parametrize("name", ["diabetes", "breast-cancer"])
def test_train_part_is_standardised(name: str) -> None:
    d = load(name)
    x = d.train[0].double()
    assert torch.allclose(x.mean(0), torch.zeros(x.shape[1], dtype=x.dtype), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.ones(x.shape[1], dtype=x.dtype), atol=1e-5)


def test_diabetes_returns_to_its_original_scale() -> None:
    from sklearn.datasets import load_diabetes

    d = load("diabetes", split=3)
    y = torch.cat((d.train[1], d.test[1])).double() * d.y_std + d.y_mean
    assert np.allclose(np.sort(y.numpy()), np.sort(load_diabetes().target), atol=1e-3)
    assert not torch.equal(d.test[0], load("diabetes", split=4).test[0])


def test_digits_split_is_stratified_and_labels_belong_to_their_images() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    known = {image.tobytes(): label for image, label in zip(bunch.data, bunch.target, strict=True)}
    d = load("digits", split=2, binarize="none").supervised()
    assert d.kind == "classification" and (len(d.train[0]), len(d.test[0]), d.num_classes) == (1437, 360, 10)
    for x, y in (d.train, d.test):
        assert [known[row.tobytes()] for row in (x.double() * 16).numpy()] == y.tolist()
    counts = torch.bincount(d.test[1]) / torch.bincount(torch.cat((d.train[1], d.test[1])))
    assert (counts - 0.2).abs().max() < 0.01
    with pytest.raises(DataError, match="no labels"):
        load("moons-points").supervised()


def test_gap_has_a_gap() -> None:
    d = load("gap")
    x = torch.cat((d.train[0], d.test[0]))[:, 0]
    test = torch.linspace(-4, 4, 200)  # fixes the affine map from standardised to original x
    slope = (x[-1] - x[100]) / 8
    original = (x[:100] - x[100]) / slope - 4
    assert (original.abs() >= 1 - 1e-4).all() and (original.abs() <= 4 + 1e-4).all()
    noise = d.train[1] * d.y_std + d.y_mean - torch.sin(2 * original) - 0.3 * original
    assert abs(float(noise.std()) - 0.1) < 4.5 * 0.1 / np.sqrt(200)
    assert torch.allclose((x[100:] - x[100]) / slope - 4, test, atol=1e-4)


# --------------------------------------------------------------------------------------------- binarization


def test_binarize_modes() -> None:
    grey = load("digits", binarize="none")
    assert grey.transform is None and len(grey.train[0].unique()) == 17
    cut = load("digits", binarize="threshold")
    assert torch.equal(cut.train[0], (grey.train[0] > 0.5).float()) and cut.transform is None
    once = load("digits", binarize="once")
    assert once.transform is None and set(once.train[0].unique().tolist()) == {0.0, 1.0}
    batch = load("digits")
    assert torch.equal(batch.train[0], grey.train[0]), "training images stay grey: they are drawn for each batch"
    assert torch.equal(batch.test[0], once.test[0]), "one seed, one test part"


def test_binarize_seeds() -> None:
    a, b, c = (load("digits", binarize="once", seed=s) for s in (0, 0, 1))
    assert torch.equal(a.train[0], b.train[0]) and not torch.equal(a.train[0], c.train[0])
    assert torch.equal(a.test[0], b.test[0]) and not torch.equal(a.test[0], c.test[0])


def test_batch_redraw() -> None:
    d = load("digits")
    assert d.transform is not None
    g = generator(1)
    first, second = d.transform(d.train, g)[0], d.transform(d.train, g)[0]
    assert torch.equal(first, d.transform(d.train, generator(1))[0]) and not torch.equal(first, second)
    x, extra = d.transform((d.train[0], torch.arange(len(first))), g)
    assert torch.equal(extra, torch.arange(len(x)))
    draws = torch.stack([d.transform((d.train[0][:50],), g)[0] for _ in range(400)])
    p = d.train[0][:50]
    error = (draws.mean(0) - p) / (p * (1 - p) / 400).sqrt().clamp_min(1e-9)
    assert error.abs().max() < 4.5 and torch.equal(draws.mean(0)[(p == 0) | (p == 1)], p[(p == 0) | (p == 1)])


def test_loading_leaves_global_random_state_alone() -> None:
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    for name in EMBEDDED:
        load(name, binarize="once" if name == "digits" else None)
    pbp_split(100, 3)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(legacy, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("digit", {}, DataError, "no data set 'digit': did you mean 'digits'"),
        ("mnits", {}, DataError, "did you mean .*'mnist'"),
        ("digits", {"binarize": "bacth"}, OptionError, "did you mean 'batch'"),
        ("diabetes", {"binarize": "once"}, OptionError, "is for images"),
        ("digits", {"split": -1}, OptionError, "whole number >= 0"),
        ("digits", {"split": "gap-0"}, OptionError, "whole number >= 0; got 'gap-0'"),
        ("moons", {"split": 1}, OptionError, r"0 \(its only one\)"),
        ("mnist", {"data_dir": "no-such-folder"}, DataError, "data folder 'no-such-folder' does not exist"),
    ],
)
def test_bad_requests(name: str, options: dict, error: type[Exception], message: str, no_data: None) -> None:
    with pytest.raises(error, match=message):
        load(name, **options)


# --------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("n", [308, 506, 1599])
def test_pbp_split_is_the_published_rule(n: int) -> None:
    """The rule word for word, on numpy's legacy global stream, gives the same rows."""
    state = np.random.get_state()
    np.random.seed(1)
    try:
        for i in range(20):
            order = np.random.choice(range(n), n, replace=False)
            train, test = pbp_split(n, i)
            assert np.array_equal(order[: round(0.9 * n)], train) and np.array_equal(order[round(0.9 * n) :], test)
            assert np.array_equal(np.sort(np.concatenate((train, test))), np.arange(n))
    finally:
        np.random.set_state(state)


def test_gap_split_takes_the_middle_third() -> None:
    column = np.array([3.0, 0.0, 5.0, 1.0, 4.0, 2.0])
    train, test = gap_split(column)
    assert sorted(column[test]) == [2.0, 3.0] and sorted(column[train]) == [0.0, 1.0, 4.0, 5.0]
    assert gap_split(np.zeros(6))[1].tolist() == [2, 3], "ties keep the order of the file"


# -------------------------------------------------------------------------------------- files by their checksum

CONTENT = b"the pixels of one afternoon"
SUM = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("where", ["set/part.bin", "part.bin"])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_file_is_found(where: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / where).write_bytes(CONTENT)
    monkeypatch.setenv("DGM_DATA", os.fspath(tmp_path / "elsewhere" if how == "argument" else tmp_path))
    found = find_files([DataFile("set", "part.bin", SUM)], tmp_path if how == "argument" else None)
    assert found == [tmp_path / where]


def test_a_damaged_file_is_refused(tmp_path: Path, no_data: None) -> None:
    path = tmp_path / "part.bin"
    path.write_bytes(CONTENT[:-1])
    found = hashlib.sha256(CONTENT[:-1]).hexdigest()
    with pytest.raises(DataError, match=f"part.bin is damaged.*expected sha256 {SUM}, found {found}"):
        find_files([DataFile("set", "part.bin", SUM)], tmp_path)


def test_a_file_is_verified_at_each_use(tmp_path: Path, no_data: None) -> None:
    path, file = tmp_path / "part.bin", DataFile("set", "part.bin", SUM)
    path.write_bytes(CONTENT)
    find_files([file], tmp_path)
    path.write_bytes(CONTENT.upper())
    with pytest.raises(DataError, match="damaged"):
        find_files([file], tmp_path)


@pytest.mark.parametrize("name", ["frey-faces", "omniglot", "uci-yacht"])
def test_a_missing_file_says_what_to_put_where(name: str, tmp_path: Path, no_data: None) -> None:
    with pytest.raises(
        DataError, match=r"(?s)no address.*<folder>/\S+\.npz  sha256 [0-9a-f]{64}\n.*--data-dir.*DGM_DATA"
    ):
        load(name, data_dir=tmp_path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server on this machine, and an empty cache."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "part.bin").write_bytes(CONTENT)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("DGM_DATA", raising=False)
    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=os.fspath(tmp_path / "www"))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/"
        http.shutdown()
        thread.join()


def test_download_once_into_the_cache(server: str, tmp_path: Path) -> None:
    file = DataFile("set", "part.bin", SUM, server + "part.bin")
    assert find_files([file]) == [tmp_path / "cache" / "set" / "part.bin"]
    (tmp_path / "www" / "part.bin").unlink()
    assert find_files([file])[0].read_bytes() == CONTENT
    (tmp_path / "cache" / "set" / "part.bin").write_bytes(b"damaged")
    with pytest.raises(DataError, match=rf"(?s)download: HTTPError.*<folder>/set/part\.bin  sha256 {SUM}"):
        find_files([file])


def test_downloads_at_once_do_not_disturb_each_other(server: str) -> None:
    file = DataFile("set", "part.bin", SUM, server + "part.bin")
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: find_files([file])[0].read_bytes(), range(4)))
    assert paths == [CONTENT] * 4


def test_a_download_with_another_checksum_is_refused(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)download: ValueError.*does not match the known hash"):
        find_files([DataFile("set", "part.bin", "0" * 64, server + "part.bin")])
    assert not list((tmp_path / "cache").rglob("*.bin"))


# ----------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize("name", UCI_ROWS)
def test_uci_sets(name: str, real: Path) -> None:
    n, columns, n_test, mean, sd = UCI_ROWS[name]
    d = load(name, data_dir=real, split=1)
    assert d.kind == "regression" and d.train[0].shape == (n - n_test, columns) and len(d.test[1]) == n_test
    y = torch.cat((d.train[1], d.test[1])).double() * d.y_std + d.y_mean
    assert float(y.mean()) == pytest.approx(mean, abs=1e-3, rel=1e-4)
    assert float(y.std(correction=0)) == pytest.approx(sd, abs=1e-3, rel=1e-2)
    spread = d.train[0].double().std(0, correction=0)
    constant = spread == 0
    assert constant.sum() == (2 if name == "uci-naval" else 0)
    assert torch.allclose(spread[~constant], torch.ones_like(spread[~constant]), atol=1e-4)


def test_uci_split_options(real: Path) -> None:
    d = load("uci-yacht", data_dir=real, split="gap-5")
    assert len(d.test[0]) == int(2 * 308 / 3) - int(308 / 3) and d.note == "split gap-5"
    column, inside = d.train[0][:, 5], d.test[0][:, 5]
    assert not ((column > inside.min()) & (column < inside.max())).any()
    for split in ("gap-6", "gap", "5", -1, 20, True):
        with pytest.raises(OptionError, match="split of 'uci-yacht' must be 0 to 19"):
            load("uci-yacht", data_dir=real, split=split)
    with pytest.raises(OptionError, match="must be 0 to 4"):
        load("uci-protein", data_dir=real, split=5)


def test_frey_faces(real: Path) -> None:
    d = load("frey-faces", data_dir=real)
    assert d.valid is not None and d.image_shape == (28, 20) and d.transform is None
    whole = torch.cat((d.train[0], d.valid[0], d.test[0]))
    assert whole.shape == (1965, 560) and float(whole.mean()) * 255 == pytest.approx(154.461, abs=1e-2)
    moved = load("frey-faces", data_dir=real, split=1)
    assert torch.equal(moved.train[0][0], whole[197])
    mixed = load("frey-faces", data_dir=real, split="random", seed=1)
    assert "random" in mixed.note and not torch.equal(mixed.test[0], d.test[0])
    step = (whole[1:] - whole[:-1]).square().mean()
    assert step < 0.5 * (mixed.train[0][1:] - mixed.train[0][:-1]).square().mean(), "the video is in order"


@pytest.mark.slow
def test_mnist_and_fashion_mnist(real: Path) -> None:
    for name, mean, first in (("mnist", 0.130660, [7, 2, 1, 0, 4]), ("fashion-mnist", 0.286041, [9, 2, 1, 1, 6])):
        d = load(name, data_dir=real, binarize="none")
        assert d.valid is not None and d.labels is not None
        assert (len(d.train[0]), len(d.valid[0]), len(d.test[0])) == (55000, 5000, 10000)
        whole = torch.cat((d.train[0], d.valid[0]))
        assert float(whole.double().mean()) == pytest.approx(mean, abs=1e-5)
        assert d.labels["test"][:5].tolist() == first
        assert load(name, data_dir=real).transform is not None


@pytest.mark.slow
def test_omniglot(real: Path) -> None:
    d = load("omniglot", data_dir=real, binarize="none")
    assert (d.train[0].shape, d.test[0].shape) == ((24345, 784), (8115, 784))
    assert float(torch.cat((d.train[0], d.test[0])).double().mean()) == pytest.approx(0.08051, abs=1e-4)


@pytest.mark.slow
def test_binarized_mnist_from_either_file(real: Path, tmp_path: Path, no_data: None) -> None:
    d = load("binarized-mnist", data_dir=real)
    assert d.valid is not None
    for part, name, mean in ((d.train, "train", 0.130562), (d.valid, "valid", 0.131127), (d.test, "test", 0.132512)):
        assert float(part[0].double().mean()) == pytest.approx(mean, abs=1e-6)
        text = np.full((len(part[0]), 1568), ord(" "), dtype=np.uint8)
        text[:, ::2] = part[0].numpy().astype(np.uint8) + ord("0")
        text[:, -1] = ord("\n")
        text.tofile(tmp_path / f"binarized_mnist_{name}.amat")
    again = load("binarized-mnist", data_dir=tmp_path)  # the official files: the checksums are theirs
    assert again.valid is not None and torch.equal(again.valid[0], d.valid[0]) and torch.equal(again.test[0], d.test[0])


# ------------------------------------------------------------------------------------------------ own files


@pytest.fixture
def tides(tmp_path: Path) -> Path:
    g = np.random.default_rng(0)
    frame = pd.DataFrame(g.normal(5.0, 2.0, (50, 3)), columns=["moon", "wind", "height"])
    frame["harbour"] = g.choice(["Brest", "Calais"], 50)
    frame["stars"] = g.integers(1, 4, 50)
    frame.to_csv(tmp_path / "tides.csv", index=False)
    frame[["moon", "wind", "height"]].to_csv(tmp_path / "numbers.csv", index=False)
    return tmp_path


def test_csv_without_target(tides: Path) -> None:
    d = from_file(tides / "numbers.csv")
    assert (d.kind, d.name) == ("table", "numbers.csv") and (d.train[0].shape, d.test[0].shape) == ((40, 3), (10, 3))
    frame = pd.read_csv(tides / "numbers.csv").to_numpy()
    rows = torch.cat((d.train[0], d.test[0])).double().numpy()
    assert np.allclose(np.sort(rows, axis=0), np.sort(frame, axis=0), atol=1e-5)
    assert torch.equal(d.test[0], from_file(tides / "numbers.csv").test[0])
    assert not torch.equal(d.test[0], from_file(tides / "numbers.csv", seed=1).test[0])
    assert len(from_file(tides / "numbers.csv", fraction=0.5).test[0]) == 25


def test_csv_regression(tides: Path) -> None:
    d = from_file(tides / "numbers.csv", target="height")
    assert d.kind == "regression" and d.train[0].shape == (40, 2)
    y = torch.cat((d.train[1], d.test[1])) * d.y_std + d.y_mean
    frame = pd.read_csv(tides / "numbers.csv")
    assert float(y.mean()) == pytest.approx(frame["height"].mean(), rel=1e-5)


def test_csv_classification(tides: Path) -> None:
    frame = pd.read_csv(tides / "tides.csv").drop(columns="stars")
    frame.to_csv(tides / "town.csv", index=False)
    d = from_file(tides / "town.csv", target="harbour")
    assert (d.kind, d.num_classes) == ("classification", 2) and d.note.endswith("classes Brest, Calais")
    assert int(torch.cat((d.train[1], d.test[1])).sum()) == (frame["harbour"] == "Calais").sum()
    stars = pd.read_csv(tides / "tides.csv").drop(columns="harbour")
    stars.to_csv(tides / "stars.csv", index=False)
    assert from_file(tides / "stars.csv", target="stars").num_classes == 3
    assert from_file(tides / "stars.csv", target="stars", kind="regression").kind == "regression"


def test_npz_and_pt(tmp_path: Path) -> None:
    x, y = np.random.default_rng(1).random((20, 4)), np.arange(20.0)
    np.savez(tmp_path / "a.npz", x=x, y=y[:, None], x_test=x[:5], y_test=y[:5, None])
    d = from_file(tmp_path / "a.npz")
    assert d.kind == "regression" and len(d.train[0]) == 20 and d.note == "the file's own split"
    assert torch.allclose(d.train[0][:5], d.test[0]) and torch.allclose(d.train[1][:5], d.test[1])
    np.savez(tmp_path / "b.npz", train=x, test=x[:3])
    assert len(from_file(tmp_path / "b.npz").test[0]) == 3
    np.savez(tmp_path / "c.npz", heights=x[:, 0])
    assert from_file(tmp_path / "c.npz").train[0].shape == (16,)
    torch.save(torch.tensor(x), tmp_path / "d.pt")
    assert from_file(tmp_path / "d.pt").kind == "table"
    torch.save((torch.tensor(x), torch.arange(20) % 3), tmp_path / "e.pt")
    assert from_file(tmp_path / "e.pt").num_classes == 3
    torch.save({"x": torch.tensor(x), "price": torch.tensor(y)}, tmp_path / "f.pt")
    assert from_file(tmp_path / "f.pt", target="price").kind == "regression"


def test_own_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", np.random.default_rng(2).integers(0, 256, (10, 3, 5), dtype=np.uint8))
    d = from_file(tmp_path / "a.npz", binarize="batch")
    assert (d.kind, d.image_shape, d.train[0].shape) == ("images", (3, 5), (8, 15)) and d.transform is not None
    assert set(d.test[0].unique().tolist()) == {0.0, 1.0} and 0 <= d.train[0].min() and d.train[0].max() <= 1
    np.savez(tmp_path / "b.npz", np.full((10, 3, 5), 200.0))
    assert float(from_file(tmp_path / "b.npz").train[0].max()) == 200.0
    with pytest.raises(DataError, match=r"run from 200 to 200; binarize= needs them in \[0, 1\]"):
        from_file(tmp_path / "b.npz", binarize="once")


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("number.csv", {}, r"no data file .*number\.csv'; did you mean 'numbers\.csv'"),
        ("tides.csv", {}, r"column 'harbour' \(3\) of x holds str, not numbers"),
        ("numbers.csv", {"target": "heigth"}, "no column 'heigth' to predict; did you mean 'height'"),
        ("tides.csv", {"target": "harbour", "kind": "regression"}, "target 'harbour' holds str, not numbers"),
        ("numbers.csv", {"target": "moon", "kind": "classification"}, "target 'moon' holds fractions"),
        ("many.csv", {"target": "id"}, "target 'id' has 101 different values; a classification needs 2 to 100"),
        ("hole.csv", {}, r"^column 'wind' \(1\) of x has 1 NaN \(row 7\)"),
        ("hole.csv", {"target": "wind"}, r"^target 'wind' has 1 NaN \(row 7\)"),
        ("nobody.csv", {"target": "harbour"}, r"^target 'harbour' has 1 missing \(row 7\)"),
        ("empty.csv", {}, r"empty\.csv cannot be read as \.csv data: No columns"),
        ("header.csv", {}, "x is empty"),
        ("bad.npz", {}, r"bad\.npz cannot be read as \.npz data"),
        ("bad.pt", {}, r"bad\.pt cannot be read as \.pt data"),
        ("objects.npz", {}, r"objects\.npz cannot be read as \.npz data: it is damaged, or holds Python objects"),
        ("notes.txt", {}, r"ending '\.txt'; a data file is \.csv, \.npz or \.pt"),
        ("none.npz", {}, "holds no arrays"),
        ("short.npz", {}, "x has 4 rows, target 'y' has 3 rows"),
        ("wide.npz", {}, r"target 'y' has shape \(4, 2\)"),
    ],
)
def test_bad_files(file: str, options: dict, message: str, tides: Path) -> None:
    frame = pd.read_csv(tides / "numbers.csv")
    frame.loc[7, "wind"] = np.nan
    frame.to_csv(tides / "hole.csv", index=False)
    frame["wind"], frame["harbour"] = 0.0, ["Brest", "Calais"] * 25
    frame.loc[7, "harbour"] = None
    frame.to_csv(tides / "nobody.csv", index=False)
    for name in ("empty.csv", "notes.txt"):
        (tides / name).write_text("")
    (tides / "header.csv").write_text("a,b\n")
    pd.DataFrame({"a": 0.0, "id": [f"row {i}" for i in range(101)]}).to_csv(tides / "many.csv", index=False)
    for name in ("bad.npz", "bad.pt"):
        (tides / name).write_bytes(b"PK\x03\x04 but then nothing")
    np.savez(tides / "objects.npz", x=np.array([{}], dtype=object))
    np.savez(tides / "none.npz")
    np.savez(tides / "short.npz", x=np.zeros((4, 2)), y=np.zeros(3))
    np.savez(tides / "wide.npz", x=np.zeros((4, 2)), y=np.zeros((4, 2)))
    with pytest.raises(DataError, match=message):
        from_file(tides / file, **options)


def test_bad_options_of_files(tides: Path) -> None:
    for options in ({"kind": "clustering"}, {"fraction": 1.5}, {"binarize": "once"}):
        with pytest.raises(OptionError):
            from_file(tides / "numbers.csv", **options)  # type: ignore[arg-type]


def test_dataset_is_frozen() -> None:
    d = Dataset("a", "points", (torch.zeros(2, 2),), (torch.zeros(1, 2),))
    with pytest.raises(AttributeError):
        d.name = "b"  # type: ignore[misc]

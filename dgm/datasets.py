"""Data sets by name: one short function each, registered with its one-line description."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import as_tensors
from .errors import DataError, OptionError, did_you_mean
from .files import DataFile, Dataset, find_files, from_file, images, table

__all__ = ["DataFile", "Dataset", "find_files", "from_file", "gap_split", "load", "names", "pbp_split"]


@dataclass(frozen=True)
class _Ask:
    """What the user asked of one data set."""

    name: str
    data_dir: str | os.PathLike[str] | None = None
    split: int | str = 0
    seed: int = 0
    binarize: str | None = None

    def index(self, count: int | None = None) -> int:
        """The split as a number below ``count``."""
        k = self.split
        if isinstance(k, bool) or not isinstance(k, int) or k < 0 or (count is not None and k >= count):
            domain = ("0 (its only one)" if count == 1 else f"0 to {count - 1}") if count else "a whole number >= 0"
            raise OptionError(f"split of {self.name!r} must be {domain}; got {k!r}")
        return k

    def file(self, file: DataFile) -> Path:
        return find_files([file], self.data_dir)[0]


_REGISTRY: dict[str, tuple[str, Callable[[_Ask], Dataset]]] = {}
_Loader = Callable[[_Ask], Dataset]


def _dataset(name: str, about: str) -> Callable[[_Loader], _Loader]:
    def register(loader: _Loader) -> _Loader:
        _REGISTRY[name] = (about, loader)
        return loader

    return register


def names() -> dict[str, str]:
    """Each data set's name with its one-line description.

    >>> "digits" in names()
    True
    """
    return {name: about for name, (about, _) in sorted(_REGISTRY.items())}


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    split: int | str = 0,
    seed: int = 0,
    binarize: str | None = None,
) -> Dataset:
    """A data set by name; ``names()`` lists them.

    Args:
        data_dir: folder with data files; else the environment variable DGM_DATA, else a download into the user's cache.
        split: which partition of the rows: a number, or for the uci sets ``"gap-<column>"`` (the middle third of that
            column is the test part; Foong, Li, Hernandez-Lobato and Turner, 'In-Between' Uncertainty in Bayesian
            Neural Networks, 2019), or for frey-faces ``"random"``.
        seed: of binarization and of generated points.
        binarize: for images, x ~ Bernoulli(pixel): ``"batch"`` draws the training part anew for each batch (by
            ``transform``) and the rest once, ``"once"`` draws all once, ``"threshold"`` is pixel > 1/2, ``"none"``
            keeps grey pixels; None is the data set's own default.

    Raises:
        DataError: unknown name; a file that is missing or damaged.
        OptionError: split or binarize that this data set does not have.

    >>> load("digits").train[0].shape
    torch.Size([1437, 64])
    """
    if name not in _REGISTRY:
        raise DataError(
            f"no data set {name!r}: {did_you_mean(name, _REGISTRY)} (a file of your own: .csv, .npz or .pt)"
        )
    result = _REGISTRY[name][1](_Ask(name, data_dir, split, seed, binarize))
    if result.kind != "images" and binarize not in (None, "none"):
        raise OptionError(f"binarize={binarize!r} is for images; {name!r} is a {result.kind} data set")
    return result


# ---------------------------------------------------------------------------------------------------- images


def _pictures(
    ask: _Ask, default: str, parts: dict[str, np.ndarray], labels: dict[str, np.ndarray] | None = None, **about: Any
) -> Dataset:
    mode = default if ask.binarize is None else ask.binarize
    return images(ask.name, parts, labels, binarize=mode, seed=ask.seed, **about)


@_dataset("digits", "1797 handwritten digits, 8x8, with labels (scikit-learn)")
def _digits(ask: _Ask) -> Dataset:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    train, test = _stratified(bunch.target, 360, ask.index())
    images = {"train": bunch.images[train] / 16, "test": bunch.images[test] / 16}
    labels = {"train": bunch.target[train], "test": bunch.target[test]}
    return _pictures(ask, "batch", images, labels, num_classes=10, source="Alpaydin and Kaynak, UCI repository, 1998")


def _idx(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        raw = file.read()
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _mnist(files: Sequence[DataFile], source: str, ask: _Ask) -> Dataset:
    x, y, x_test, y_test = map(_idx, find_files(files, ask.data_dir))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(ask.index())).numpy()
    train, valid = order[:-5000], order[-5000:]
    note = "valid is 5000 of the 60000 training images, the last of a permutation seeded by split"
    images, labels = {"train": x[train], "valid": x[valid]}, {"train": y[train], "valid": y[valid]}
    images["test"], labels["test"] = x_test, y_test
    return _pictures(ask, "batch", images, labels, num_classes=10, note=note, source=source)


_IDX_NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_MNIST_SUMS = (
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
_FASHION_SUMS = (
    "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
)


def _idx_files(folder: str, sums: Sequence[str], url: str) -> list[DataFile]:
    files = [f"{stem}-ubyte.gz" for stem in _IDX_NAMES]
    return [DataFile(folder, file, digest, url + file) for file, digest in zip(files, sums, strict=True)]


_dataset("mnist", "70000 handwritten digits, 28x28, with labels")(
    partial(
        _mnist,
        _idx_files("mnist", _MNIST_SUMS, "https://ossci-datasets.s3.amazonaws.com/mnist/"),
        "LeCun, Bottou, Bengio and Haffner, Gradient-based learning applied to document recognition, 1998",
    )
)
_dataset("fashion-mnist", "70000 pictures of clothes, 28x28, with labels")(
    partial(
        _mnist,
        _idx_files("fashion-mnist", _FASHION_SUMS, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"),
        "Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017",
    )
)


_AMAT_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
_AMAT_SUMS = {
    "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
_AMAT = [
    DataFile("binarized-mnist", f"binarized_mnist_{part}.amat", digest, f"{_AMAT_URL}binarized_mnist_{part}.amat")
    for part, digest in _AMAT_SUMS.items()
]
_PACKED = DataFile(
    "binarized-mnist",
    "binarized_mnist_packed.npz",
    "50de2c8299a5a297789293ab2c30f6fc3cb8c359a15e5e88d5501aa18ebb8fa5",
)


@_dataset("binarized-mnist", "70000 digits, 28x28, the fixed binarization that papers compare on; no labels")
def _binarized_mnist(ask: _Ask) -> Dataset:
    ask.index(1)
    packed = _PACKED.locate(ask.data_dir)  # the same pixels, eight in a byte, where someone has put them
    if packed is not None:
        with np.load(packed, allow_pickle=False) as file:
            pixels = {part: np.unpackbits(file[part], axis=1) for part in _AMAT_SUMS}
    else:  # lines "0 1 ... 0\n" of 784 digits
        paths = zip(_AMAT_SUMS, find_files(_AMAT, ask.data_dir), strict=True)
        pixels = {part: np.fromfile(path, np.uint8).reshape(-1, 1568)[:, ::2] - 48 for part, path in paths}
    parts = {part: x.reshape(-1, 28, 28).astype(np.float32) for part, x in pixels.items()}
    note = "the test file is not shuffled: a part of it is every k-th image"
    source = "Larochelle and Murray, The neural autoregressive distribution estimator, 2011"
    return _pictures(ask, "none", parts, note=note, source=source)


_FREY = DataFile("frey-faces", "frey_faces.npz", "3c70375e0a9c4751ad49ad5f1f692bd094c46f133cf4aa8ea77d1cb14e1efcd1")


@_dataset("frey-faces", "1965 frames of a video of one face, 28x20, grey")
def _frey_faces(ask: _Ask) -> Dataset:
    with np.load(ask.file(_FREY), allow_pickle=False) as file:
        frames = file["images"]
    if ask.split == "random":
        frames = np.random.default_rng(ask.seed).permutation(frames)
        note = "random split (by seed): neighbouring frames are alike, so test frames have twins in train"
    else:
        frames = np.roll(frames, -197 * ask.index(10), axis=0)
        note = "contiguous blocks of the video, train 1565, valid 200, test 200, which split moves on by 197 frames"
    parts = {"train": frames[:1565], "valid": frames[1565:1765], "test": frames[1765:]}
    return _pictures(ask, "none", parts, note=note, source="Roweis, Frey face frames")


_OMNIGLOT = DataFile(
    "omniglot", "omniglot28_derived.npz", "46fadc27632c0a907fcb319684329070a64dd7d9521d14d869d3e38ff957e392"
)


@_dataset("omniglot", "1623 characters by 20 drawers, 28x28; not the resampling of the IWAE paper")
def _omniglot(ask: _Ask) -> Dataset:
    with np.load(ask.file(_OMNIGLOT), allow_pickle=False) as file:
        drawn = np.roll(file["images"], -5 * ask.index(4), axis=1)  # (character, drawer, 28, 28)
    parts = {"train": drawn[:, :15].reshape(-1, 28, 28), "test": drawn[:, 15:].reshape(-1, 28, 28)}
    note = "15 of 20 drawers train, 5 test"
    source = "Lake, Salakhutdinov and Tenenbaum, Human-level concept learning, 2015"
    return _pictures(ask, "batch", parts, note=note, source=source)


# ---------------------------------------------------------------------------------------------------- tables


def _stratified(y: np.ndarray, test_size: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(y)), test_size=test_size, stratify=y, random_state=split)
    return train, test


@_dataset("diabetes", "regression: 442 patients, 10 measurements, progression of the disease (scikit-learn)")
def _diabetes(ask: _Ask) -> Dataset:
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(ask.index()).permutation(len(x))
    source = "Efron, Hastie, Johnstone and Tibshirani, Least angle regression, 2004"
    return table(ask.name, x, y, order[:-89], order[-89:], source=source)


@_dataset("breast-cancer", "classification: 569 tumours, 30 measurements, malignant or benign (scikit-learn)")
def _breast_cancer(ask: _Ask) -> Dataset:
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return table(ask.name, x, y, *_stratified(y, 114, ask.index()), source="Wolberg et al., UCI repository, 1995")


@_dataset("moons", "classification: two interleaved half circles in the plane, noise 0.1 (made from seed)")
def _moons(ask: _Ask) -> Dataset:
    from sklearn.datasets import make_moons

    ask.index(1)
    x, y = as_tensors(make_moons(n_samples=2000, noise=0.1, random_state=ask.seed))
    return Dataset(ask.name, "classification", (x[:1000], y[:1000]), (x[1000:], y[1000:]), num_classes=2)


@_dataset("moons-points", "points of two interleaved half circles in the plane, noise 0.1 (made from seed)")
def _moons_points(ask: _Ask) -> Dataset:
    both = _moons(ask)
    return replace(both, kind="points", train=both.train[:1], test=both.test[:1], num_classes=None)


@_dataset(
    "gap", "regression: y = sin(2x) + 0.3x + 0.1e, train x in [-4, -1] and [1, 4], test x in [-4, 4] (made from seed)"
)
def _gap(ask: _Ask) -> Dataset:
    ask.index(1)
    random = np.random.default_rng(ask.seed)
    sides = random.uniform(1, 4, 100) * np.repeat([-1, 1], 50)
    x = np.concatenate((sides, np.linspace(-4, 4, 200)))
    y = np.sin(2 * x) + 0.3 * x + 0.1 * random.standard_normal(300)
    return table(
        ask.name, x[:, None], y, np.arange(100), np.arange(100, 300), note="a quarter of the test part is the gap"
    )


def pbp_split(n: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, test), 90 to 10, of one split of the UCI protocol, as the published files have them.

    Hernandez-Lobato and Adams, Probabilistic backpropagation for scalable learning of Bayesian neural networks, 2015.

    >>> [len(part) for part in pbp_split(506, 0)]
    [455, 51]
    """
    random = np.random.RandomState(1)  # one stream for each data set: split i is its (i + 1)-th draw
    for _ in range(split + 1):
        order = random.choice(n, n, replace=False)
    return order[: round(0.9 * n)], order[round(0.9 * n) :]


def gap_split(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, test) where the test part is the middle third of a column (Foong et al., 2019).

    >>> gap_split(np.array([5.0, 1.0, 3.0]))[1]
    array([2])
    """
    order, n = np.argsort(column, kind="stable"), len(column)
    low, high = int(n / 3), int(2 * n / 3)
    return np.concatenate((order[:low], order[high:])), order[low:high]


_UCI_FILE = DataFile("uci-pbp", "uci_pbp_Xy.npz", "f4388b9bd6f7c7d8e900d5de8039d6071e9b82c7bca72519c928ea5fce462ad5")
_UCI = {
    "uci-boston": ("bostonHousing", "506 x 13, house prices", 20),
    "uci-concrete": ("concrete", "1030 x 8, strength of concrete", 20),
    "uci-energy": ("energy", "768 x 8, heating load of buildings", 20),
    "uci-kin8nm": ("kin8nm", "8192 x 8, a robot arm", 20),
    "uci-naval": ("naval-propulsion-plant", "11934 x 16, decay of a ship's compressor", 20),
    "uci-power": ("power-plant", "9568 x 4, output of a power plant", 20),
    "uci-protein": ("protein-tertiary-structure", "45730 x 9, protein structure", 5),
    "uci-wine": ("wine-quality-red", "1599 x 11, quality of red wine", 20),
    "uci-yacht": ("yacht", "308 x 6, resistance of yachts", 20),
}


def _uci(key: str, count: int, ask: _Ask) -> Dataset:
    with np.load(ask.file(_UCI_FILE), allow_pickle=False) as file:
        x, y = file[f"{key}__X"], file[f"{key}__y"]
    column = str(ask.split).removeprefix("gap-")
    if isinstance(ask.split, str) and column.isdecimal() and int(column) < x.shape[1] and column != ask.split:
        train, test = gap_split(x[:, int(column)])
    elif isinstance(ask.split, str):
        raise OptionError(f"split of {ask.name!r} must be 0 to {count - 1}, or 'gap-0' to 'gap-{x.shape[1] - 1}'")
    else:
        train, test = pbp_split(len(x), ask.index(count))
    note = f"split {ask.split}" + (f" of {count}" if isinstance(ask.split, int) else "")
    return table(ask.name, x, y, train, test, note=note, source="Dua and Graff, UCI machine learning repository")


for _name, (_key, _about, _count) in _UCI.items():
    _dataset(_name, f"regression: {_about}, {_count} published splits")(partial(_uci, _key, _count))

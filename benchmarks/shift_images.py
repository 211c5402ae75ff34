"""Images of the shift suite: those to train on, those held out, corrupted ones, and foreign ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

import dgm
from dgm.errors import DataError

TRAINED = {"MNIST": "mnist", "Fashion-MNIST": "fashion-mnist"}
"""Tasks: what a network is trained on, and the data set's name."""
NEEDED = (*TRAINED.values(), "omniglot")
"""Data sets that every task shows."""
DRAWINGS = "OMNIGLOT"
NOISE = "noise"
SIDE = 28
SEVERITIES = (1, 2, 3, 4, 5)
STEPS: dict[str, tuple[float, ...]] = {
    "rotation": (15.0, 30.0, 45.0, 60.0, 75.0),
    "noise": (0.1, 0.2, 0.3, 0.4, 0.5),
    "blur": (1.0, 1.5, 2.0, 2.5, 3.0),
    "translation": (2.0, 4.0, 6.0, 8.0, 10.0),
}
"""Parameter of each corruption at severities 1 to 5."""
UNITS = {
    "rotation": "degrees, half of the images each way",
    "noise": "standard deviation of normal noise on grey values from 0 to 1, clipped",
    "blur": "standard deviation of a Gaussian kernel, pixels",
    "translation": "pixels, in one of the four directions; what leaves is lost, black comes in",
}


def foreign_of(task: str) -> tuple[str, ...]:
    """What is shown to a network that was trained on something else.

    >>> foreign_of("MNIST")
    ('Fashion-MNIST', 'OMNIGLOT', 'noise')
    """
    return (*(name for name in TRAINED if name != task), DRAWINGS, NOISE)


@lru_cache(maxsize=1)
def training(task: str) -> tuple[Tensor, Tensor]:
    """Images (N, 784) in [0, 1] and class numbers (N,): the data set's training part."""
    images, labels = dgm.load(TRAINED[task], binarize="none").supervised().train
    return images, labels.long()


@lru_cache(maxsize=len(NEEDED))
def kept_images(name: str) -> tuple[Tensor, Tensor]:
    """Test images and class numbers, none of OMNIGLOT; kept, for every guide looks at them."""
    data = dgm.load(name, binarize="none")  # grey as in training
    labels = torch.zeros(0) if data.labels is None else data.labels["test"]
    return data.test[0].clone(), labels.long()


def held_out(task: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` test images and their class numbers."""
    images, labels = kept_images(TRAINED[task])
    return images[:count], labels[:count]


def foreign(name: str, count: int) -> Tensor:
    """The first `count` images of another kind, (count, 784) in [0, 1].

    Of OMNIGLOT every character once before one comes again; of noise independent uniform grey values.
    """
    if name == NOISE:
        return torch.rand(count, SIDE**2, generator=torch.Generator().manual_seed(0))
    images = kept_images(TRAINED.get(name, "omniglot"))[0]
    if name == DRAWINGS:  # character by character, five drawers of each
        images = images.unflatten(0, (-1, 5)).transpose(0, 1).flatten(0, 1)
    return images[:count]


def halved(images: Tensor) -> Tensor:
    """Images (N, 784) by means of 2 x 2 pixels, (N, 196): what a small network is shown.

    >>> halved(torch.ones(3, 784)).shape
    torch.Size([3, 196])
    """
    return F.avg_pool2d(images.unflatten(1, (1, SIDE, SIDE)), 2).flatten(1)


def corrupted(images: Tensor, kind: str, severity: int, seed: int = 0) -> Tensor:
    """Images at a severity of a corruption, 0 to 5; 0 leaves them as they are. The same call gives the same images.

    Args:
        images: (N, 784) in [0, 1].

    Raises:
        DataError: images of another shape or range, an unknown corruption, or another severity.

    >>> corrupted(torch.zeros(3, 784), "blur", 2).shape
    torch.Size([3, 784])
    """
    if images.dim() != 2 or images.shape[1] != SIDE**2 or bool((images < 0).any()) or bool((images > 1).any()):
        raise DataError(f"images: expected shape (N, {SIDE**2}) and values in [0, 1], got {tuple(images.shape)}")
    if kind not in STEPS or severity not in (0, *SEVERITIES):
        raise DataError(f"corruption {kind!r} at {severity!r}: expected one of {sorted(STEPS)}, at severity 0 to 5")
    if severity == 0:
        return images
    generator = torch.Generator().manual_seed(seed)
    pictures = images.unflatten(1, (1, SIDE, SIDE))  # (N, 1, 28, 28)
    found = CORRUPT[kind](pictures, STEPS[kind][severity - 1], generator)
    return found.clamp(0.0, 1.0).flatten(1)


def rotated(pictures: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Each turned about its middle, one way or the other; black comes in at the corners."""
    sign = 2.0 * torch.randint(2, (len(pictures),), generator=generator) - 1.0
    angle = sign * torch.deg2rad(torch.tensor(degrees))
    zero = torch.zeros_like(angle)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin(), zero], -1), torch.stack([angle.sin(), angle.cos(), zero], -1)], 1
    )  # (N, 2, 3)
    where = F.affine_grid(turn, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, where, align_corners=False)


def noisy(pictures: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """With independent normal noise on every pixel."""
    return pictures + scale * torch.randn(pictures.shape, generator=generator)


def blurred(pictures: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Under a Gaussian kernel of total weight one, cut at four standard deviations; black beyond the edge."""
    reach = int(4 * scale + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / scale).square())
    kernel = kernel / kernel.sum()
    down = F.conv2d(pictures, kernel[None, None, :, None], padding=(reach, 0))
    return F.conv2d(down, kernel[None, None, None, :], padding=(0, reach))


def moved(pictures: Tensor, pixels: float, generator: torch.Generator) -> Tensor:
    """Each moved by whole pixels up, down, left or right."""
    by, found = int(pixels), torch.zeros_like(pictures)
    way = torch.randint(4, (len(pictures),), generator=generator)
    for k, (axis, sign) in enumerate(((2, 1), (2, -1), (3, 1), (3, -1))):
        part = pictures[way == k]
        kept = part.narrow(axis, 0 if sign > 0 else by, SIDE - by)
        gone = torch.zeros_like(part).narrow(axis, 0, by)
        found[way == k] = torch.cat([gone, kept] if sign > 0 else [kept, gone], axis)
    return found


CORRUPT: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "rotation": rotated, "noise": noisy, "blur": blurred, "translation": moved,
}  # fmt: skip

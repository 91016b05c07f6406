"""Image classification: labelled images of a file, a folder, the Hub, or scikit-learn's digits, held in memory."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Image
from datasets import Dataset as Table
from torch import Tensor
from torch.utils.data import Dataset

from hf_curriculum_distill.tasks.reading import find_column, num_held_out, read_dataset

DIGITS = "digits"


class Images(Dataset):
    """Images in memory, each channel less its mean and over its standard deviation as they are handed out.

    A row is `{"pixel_values": tensor [channels, size, size], "labels": 3}`.

    Args:
        pixels: `[n, channels, size, size]`, 0 to 255 in uint8.
        labels: `[n]`.
        moments: mean and standard deviation of the channels, `[2, channels]`; those of `pixels` if None.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, moments: Tensor | None = None):
        self.pixels, self.labels = pixels, labels
        if moments is None:
            values = pixels.transpose(0, 1).flatten(1).float()
            moments = torch.stack([values.mean(1), values.std(1)])
        self.moments = moments

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        mean, std = self.moments[..., None, None]
        return {"pixel_values": (self.pixels[index] - mean) / std, "labels": int(self.labels[index])}


def read_images(
    source: str, image_size: int | None = None, train_images: int | None = None, heldout_images: int | None = None
) -> tuple[Images, Images, list[str]]:
    """Read the images to train on and the held-out ones, of one size and as many channels.

    A test set that the data set lacks is held out of the training images, at random by a fixed seed.

    Args:
        source: "digits" (scikit-learn's 1,797 images, 540 of them held out), or see
            [`~hf_curriculum_distill.tasks.reading.read_dataset`].
        image_size: pixels of a side, to which images are resized; None if they are all square and of one size.
        train_images, heldout_images: the largest numbers; the first ones are taken.

    Returns:
        training set, held-out set, and the names of the classes.

    Raises:
        OSError, ValueError: the data cannot be read, or hold no images and labels of this kind.
    """
    if source == DIGITS:
        parts, names = _digits(), [str(digit) for digit in range(10)]
    else:
        parts, names = _tables(source)
        limits = train_images, heldout_images
        parts = [_read(source, part, image_size, limit) for part, limit in zip(parts, limits, strict=True)]
    train, heldout = (
        (_resize(pixels, image_size)[:limit], labels[:limit])
        for (pixels, labels), limit in zip(parts, (train_images, heldout_images), strict=True)
    )
    images = Images(*train)
    return images, Images(*heldout, images.moments), names


def _digits() -> list[tuple[Tensor, Tensor]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("The data set 'digits' is scikit-learn's; pip install scikit-learn.") from error
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))
    pixels = torch.from_numpy((digits.images[order] * 255 / 16).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target[order])
    return [(pixels[540:], labels[540:]), (pixels[:540], labels[:540])]


def _tables(source: str) -> tuple[list[Table], list[str]]:
    """The training and the held-out rows, with the columns `image` and `label`, and the names of the classes."""
    splits = read_dataset(source)
    columns = splits["train"].features
    label = find_column(source, columns, "label_column", None)
    images = [name for name, kind in columns.items() if isinstance(kind, Image)]
    if len(images) != 1:
        raise ValueError(f"{source} needs one column of images, but has {', '.join(images) or 'none'} among {columns}.")
    if "test" not in splits:
        held_out = num_held_out(source, len(splits["train"]), "test")
        splits = splits["train"].train_test_split(test_size=held_out, seed=0)
    kind = columns[label]
    names = kind.names if isinstance(kind, ClassLabel) else list(map(str, range(max(splits["train"][label]) + 1)))
    renamed = {images[0]: "image", label: "label"}
    return [splits[name].select_columns(list(renamed)).rename_columns(renamed) for name in ("train", "test")], names


def _read(source: str, rows: Table, image_size: int | None, limit: int | None) -> tuple[Tensor, Tensor]:
    rows = rows.select(range(min(len(rows), limit or len(rows))))
    images = [row["image"] for row in rows]
    if image_size is not None:
        images = [image.resize((image_size, image_size)) for image in images]
    if len(shapes := {(image.mode, image.size) for image in images}) != 1:
        raise ValueError(f"The images of {source} are of several kinds, {sorted(shapes)[:3]}; set image_size.")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels[:, None] if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)), torch.tensor(rows["label"][:])


def _resize(pixels: Tensor, size: int | None) -> Tensor:
    if size in (None, pixels.shape[-1]):
        return pixels
    return F.interpolate(pixels.float(), (size, size), mode="bilinear").round().byte()

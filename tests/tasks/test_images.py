"""Labelled images, from files and of scikit-learn."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from hf_curriculum_distill.tasks.images import Images, read_images


@pytest.fixture
def folder(tmp_path):
    """A parquet file a split: 12 and 4 images of 6 x 6 pixels in colour, of two classes."""
    features = Features({"img": Image(), "label": ClassLabel(names=["dark", "bright"])})
    draw = np.random.RandomState(0)
    for split, count in (("train", 12), ("test", 4)):
        pixels = [draw.randint(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(count)]
        rows = Dataset.from_dict({"img": pixels, "label": [n % 2 for n in range(count)]}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path


def test_a_folder_of_parquet_files_gives_standardised_images(folder):
    train, heldout, names = read_images(str(folder))
    assert (len(train), len(heldout), names) == (12, 4, ["dark", "bright"])
    pixels = torch.stack([train[index]["pixel_values"] for index in range(12)])
    assert pixels.shape == (12, 3, 6, 6) and [train[n]["labels"] for n in range(4)] == [0, 1, 0, 1]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.transpose(0, 1).flatten(1).std(1), torch.ones(3))
    assert torch.equal(heldout.moments, train.moments)  # of the images to train on


def test_images_are_resized_and_limited(folder):
    train, heldout, _ = read_images(str(folder), image_size=4, train_images=5, heldout_images=2)
    assert train.pixels.shape == (5, 3, 4, 4) and heldout.pixels.shape == (2, 3, 4, 4)


def test_images_of_several_sizes_need_one(tmp_path):
    pixels = [np.zeros((size, size), dtype=np.uint8) for size in (4, 6)] * 6
    features = Features({"image": Image(), "label": ClassLabel(num_classes=2)})
    Dataset.from_dict({"image": pixels, "label": [0, 1] * 6}, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"are of several kinds, .* set image_size"):
        read_images(str(tmp_path))
    train, heldout, _ = read_images(str(tmp_path), image_size=4)
    assert train.pixels.shape[1:] == (1, 4, 4) and len(train) + len(heldout) == 12  # a tenth is held out


def test_a_table_without_images_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(ValueError, match="needs one column of images, but has none"):
        read_images(str(tmp_path))


def test_the_digits_are_the_same_for_every_call_and_no_digit_is_in_both_sets():
    (train, heldout, names), (again, _, _) = (read_images("digits", image_size=8) for _ in range(2))
    assert (len(train), len(heldout), names) == (1257, 540, [str(n) for n in range(10)])
    assert torch.equal(train.pixels, again.pixels) and train.pixels.shape[1:] == (1, 8, 8)
    seen = {pixels.numpy().tobytes() for pixels in train.pixels}
    assert not any(pixels.numpy().tobytes() in seen for pixels in heldout.pixels)
    assert read_images("digits", image_size=16)[0].pixels.shape == (1257, 1, 16, 16)


def test_a_row_is_what_its_docstring_says():
    images = Images(torch.tensor([0, 100], dtype=torch.uint8).reshape(2, 1, 1, 1), torch.tensor([4, 2]))
    row = images[1]
    assert row["labels"] == 2
    torch.testing.assert_close(row["pixel_values"], torch.full((1, 1, 1), 50 / (100 / 2**0.5)))

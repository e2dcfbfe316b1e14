"""CIFAR's binary files: bytes in the published order, and every damaged or misplaced file named."""

import os

import numpy as np
import pytest

from jprune.data import load_cifar, pad_crop_flip


def write(folder, classes, n=6):
    """The files of a small CIFAR; pixel (row, column, channel) of record r is r + 3 row + 5 column + 7 channel."""
    folder.mkdir(parents=True, exist_ok=True)
    channel, row, column = np.meshgrid(np.arange(3), np.arange(32), np.arange(32), indexing="ij")
    names = (
        [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
        if classes == 10
        else ["train.bin", "test.bin"]
    )
    for f, name in enumerate(names):
        data = b""
        for r in range(n):
            head = [(f + r) % 10] if classes == 10 else [r % 20, 90 + r % 10]
            pixels = (r + 3 * row + 5 * column + 7 * channel) % 256
            data += bytes(head) + pixels.astype(np.uint8).tobytes()
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_pixels_and_labels_are_where_they_belong(tmp_path, classes, nested):
    write(tmp_path / {10: "cifar-10-batches-bin", 100: "cifar-100-binary"}[classes] if nested else tmp_path, classes)
    data = load_cifar(tmp_path, classes)
    assert data.num_classes == classes and data.image_shape == (32, 32, 3)
    assert len(data.train) == (30 if classes == 10 else 6) and len(data.test) == 6
    assert data.train.images.shape[1:] == (32, 32, 3) and data.train.images.dtype == np.uint8
    assert data.train.images[4, 10, 20, 2] == 4 + 30 + 100 + 14
    np.testing.assert_array_equal(data.train.labels[:6], np.arange(6) if classes == 10 else 90 + np.arange(6))
    image = data.test.read(np.array([4]))["image"][0, 10, 20, 2]
    mean, std = {10: (0.4465, 0.2616), 100: (0.4409, 0.2762)}[classes]
    np.testing.assert_allclose(image, (148 / 255 - mean) / std, rtol=1e-5)


def test_training_draws_shifted_windows_and_black_borders(tmp_path):
    write(tmp_path, 10)
    train = load_cifar(tmp_path).train
    drawn = train.draw(np.arange(30), np.random.default_rng(0))["image"]
    black = -np.array([0.4914, 0.4822, 0.4465]) / np.array([0.2470, 0.2435, 0.2616])
    np.testing.assert_allclose(drawn.min((0, 1, 2)), black, rtol=1e-5)
    assert drawn.shape == (30, 32, 32, 3) and drawn.dtype == np.float32


def test_pad_crop_flip_gives_windows_of_the_padded_image_all_of_them():
    images = np.arange(1, 1 + 2 * 3 * 4 * 1).reshape(2, 3, 4, 1)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = {}
    for i in range(2):
        for top in range(3):
            for left in range(3):
                window = padded[i, top : top + 3, left : left + 4]
                windows[window.tobytes()] = (i, top, left, False)
                windows[window[:, ::-1].tobytes()] = (i, top, left, True)
    rng = np.random.default_rng(0)
    found = [windows[out.tobytes()] for _ in range(300) for out in pad_crop_flip(rng, images, pad=1)]
    assert [f[0] for f in found] == [0, 1] * 300 and set(found) == set(windows.values())


@pytest.mark.parametrize("cut", [1, 3073 // 2, 6 * 3073])
def test_a_truncated_file_is_named(tmp_path, cut):
    write(tmp_path, 10)
    os.truncate(tmp_path / "data_batch_3.bin", 6 * 3073 - cut)
    with pytest.raises(ValueError, match=r"data_batch_3.bin has \d+ bytes.*unpack cifar-10-binary.tar.gz"):
        load_cifar(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path, 10)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match=r"no file .*data_batch_4.bin: unpack"):
        load_cifar(tmp_path)


def test_a_missing_or_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no data_batch_1.bin in .*elsewhere.*cifar.html"):
        load_cifar(tmp_path / "elsewhere")


def test_the_pickled_version_is_recognised(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").touch()
    with pytest.raises(ValueError, match=r"pickled Python version: unpack cifar-10-binary.tar.gz"):
        load_cifar(tmp_path)


def test_the_other_data_set_is_recognised(tmp_path):
    np.full(3073 * 3074, 200, np.uint8).tofile(tmp_path / "train.bin")  # a size that both record lengths divide
    with pytest.raises(ValueError, match=r"train.bin has labels that CIFAR-100 does not"):
        load_cifar(tmp_path, 100)
    with pytest.raises(ValueError, match="10 or 100"):
        load_cifar(tmp_path, 20)

"""Image folders: known pixels through the evaluation path, random windows within their bounds, bad files named."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jprune.data import ImageFolder, Preprocess, epoch_batches, eval_batches, load_image_folder
from jprune.data.images import normalise, random_window

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def picture(seed, width=40, height=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of three images in each part: one class PNG, the other JPEG."""
    for p, part in enumerate(("train", "val")):
        for c, (name, ending) in enumerate((("cat", "png"), ("dog", "JPEG"))):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(picture(100 * p + 10 * c + i)).save(tmp_path / part / name / f"{i}.{ending}")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_classes_are_numbered_by_name(folder):
    data = load_image_folder(folder, 24, 32)
    assert data.num_classes == 2 and data.image_shape == (24, 24, 3)
    assert data.train.classes == ("cat", "dog") and data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_evaluation_without_scaling_is_the_normalised_centre(folder):
    image = load_image_folder(folder, 24, 32).test.read(np.array([1]))["image"][0]
    expected = (picture(101)[4:28, 8:32] / 255 - MEAN) / STD
    np.testing.assert_allclose(image, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_scales_the_shorter_side(tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, 128)[None, :, None], (64, 128, 3)).astype(np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(ramp).save(tmp_path / "a" / "ramp.png")
    image = ImageFolder(tmp_path, 28, 32).read(np.array([0]))["image"][0]
    pixels = (image * STD + MEAN) * 255
    columns = 2 * (np.arange(28) + 18) + 0.5  # centres of the scaled pixels in the old image
    np.testing.assert_allclose(pixels[14, :, 0], columns * 255 / 127, atol=1.5)


def test_grey_images_have_three_channels_and_any_shape_fits(tmp_path):
    (tmp_path / "a").mkdir()
    for i, size in enumerate([(1, 1), (300, 5), (5, 300), (33, 32)]):
        Image.new("L", size, 128).save(tmp_path / "a" / f"{i}.png")
    split = ImageFolder(tmp_path, 28, 32)
    for batch in (split.read(np.arange(4)), split.draw(np.arange(4), np.random.default_rng(0))):
        np.testing.assert_allclose(batch["image"], normalise(np.full((4, 28, 28, 3), 128, np.uint8)))


def test_training_is_random_but_repeatable(folder):
    train = load_image_folder(folder, 24, 32).train
    a, b = epoch_batches(train, 3, seed=0, epoch=0), epoch_batches(train, 3, seed=0, epoch=0)
    np.testing.assert_array_equal(a[1]["image"], b[1]["image"])
    assert not np.array_equal(a[1]["image"], epoch_batches(train, 3, seed=0, epoch=1)[1]["image"])
    same = train.draw(np.array([0, 0, 0]), np.random.default_rng(0))["image"]
    assert not np.array_equal(same[0], same[1]) and not np.array_equal(same[1], same[2])
    assert len(eval_batches(train, 4)) == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**32 - 1))
def test_random_windows_lie_inside_the_image(width, height, seed):
    left, top, right, bottom = random_window(np.random.default_rng(seed), width, height)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_random_windows_have_the_areas_and_ratios_of_the_recipe():
    rng = np.random.default_rng(0)
    boxes = np.array([random_window(rng, 1000, 1000) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / 1e6, w / h
    assert 0.079 < area.min() < 0.1 and 0.9 < area.max() <= 1.0
    assert 0.74 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.35
    np.testing.assert_allclose(np.log(ratio).mean(), 0, atol=0.02)  # log-uniform: wide as often as tall
    wide = random_window(rng, 1000, 10)
    assert wide[3] - wide[1] <= 10 and (wide[2] - wide[0]) / (wide[3] - wide[1]) < 1.6


def test_a_torn_image_is_named(folder):
    file = folder / "train" / "dog" / "1.JPEG"
    os.truncate(file, file.stat().st_size // 2)
    train = load_image_folder(folder, 24, 32).train
    with pytest.raises(ValueError, match=r"cannot decode .*dog/1.JPEG .*replace or remove"):
        train.read(np.arange(6))


def test_missing_folders_and_classes_are_named(folder):
    with pytest.raises(ValueError, match=r"no folder .*nowhere/train"):
        load_image_folder(folder / "nowhere")
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(folder / "train" / "cat")
    with pytest.raises(ValueError, match="resize 16"):
        ImageFolder(folder / "train", 24, 16)
    (folder / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match="emu holds no images"):
        load_image_folder(folder)
    Image.fromarray(picture(0)).save(folder / "train" / "emu" / "0.png")
    with pytest.raises(ValueError, match="'emu' is in only one"):
        load_image_folder(folder)


# -- what a published model wants of its images ---------------------------------------------------------------------


def test_a_model_says_how_its_images_are_made(folder):
    wanted = Preprocess(24, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")
    split = wanted.folder(folder / "val")
    batch = split.read(np.array([1, 4]))
    expected = (picture(101)[4:28, 8:32] / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.3, 0.4)
    np.testing.assert_allclose(batch["image"][0], expected, rtol=1e-4, atol=1e-5)  # the shorter side is 32 already
    assert batch["label"].tolist() == [0, 1] and split.classes == ("cat", "dog")
    np.testing.assert_array_equal(wanted([Image.fromarray(picture(101))])[0], batch["image"][0])


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolation_and_squashing(name):
    image = Image.fromarray(picture(3, 50, 20))
    scaled = np.asarray(image.resize((10, 10), getattr(Image.Resampling, name.upper())))
    squashed = Preprocess(8, 10, interpolation=name, squash=True).pixels(image)
    np.testing.assert_array_equal(squashed, scaled[1:9, 1:9])
    kept = Preprocess(8, 10, interpolation=name).pixels(image)
    scaled = np.asarray(image.resize((25, 10), getattr(Image.Resampling, name.upper())))
    np.testing.assert_array_equal(kept, scaled[1:9, 8:16])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]), st.booleans())
def test_pictures_of_any_size_and_mode_fit(width, height, mode, squash):
    image = Image.new(mode, (width, height))
    assert Preprocess(8, 9, squash=squash)([image]).shape == (1, 8, 8, 3)


def test_pictures_without_labels(tmp_path):
    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    split = Preprocess(24, 32).folder(tmp_path)
    assert len(split) == 3 and split.classes == () and split.labels.size == 0
    batch = eval_batches(split, 2)[1]
    assert set(batch) == {"image", "weight"} and batch["weight"].tolist() == [1.0, 0.0]
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="holds both pictures and folders"):
        Preprocess(24, 32).folder(tmp_path)


def test_labels_may_be_numbered_as_the_model_has_them(folder):
    split = Preprocess(24, 32).folder(folder / "val", classes=("ant", "dog", "elk", "cat"))
    assert split.labels.tolist() == [3, 3, 3, 1, 1, 1] and split.classes == ("ant", "dog", "elk", "cat")
    with pytest.raises(ValueError, match=r"val/dog is named like none of the 2 classes"):
        Preprocess(24, 32).folder(folder / "val", classes=("ant", "cat"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 300}, "size 300 must be positive and no larger than resize 256"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic': use one of nearest, bilinear"),
        ({"std": (1.0, 0.0, 1.0)}, "with std positive"),
        ({"mean": (0.5,)}, "must be of three channels"),
    ],
)
def test_preprocessing_that_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


def test_folders_without_anything(tmp_path):
    with pytest.raises(ValueError, match="no class folders"):
        Preprocess().folder(tmp_path)
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        Preprocess().folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        ImageFolder(tmp_path, labelled=False)

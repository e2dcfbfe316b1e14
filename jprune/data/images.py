"""ImageNet-style folders: one folder a class, image files in it, decoded when a batch is read.

    folder/train/<class>/*.jpg      folder/val/<class>/*.jpg

Training takes a random area (8 to 100 %) and aspect ratio (3/4 to 4/3) of the image, resized to a square, mirrored
half of the time; evaluation resizes the shorter side to `resize` and takes the centre. Classes are numbered in the
order of their sorted folder names, as everywhere.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image

from jprune.data.dataset import Batch, Dataset

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
# Channel means and deviations of ImageNet's training images, pixels in [0, 1]: what published weights expect.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """A split read from `folder`/<class>/<image>, (size, size, 3) float32, normalised by ImageNet's statistics."""

    folder: Path
    size: int = 224
    resize: int = 256
    files: tuple[Path, ...] = dataclasses.field(init=False, repr=False)
    labels: Int[np.ndarray, " n"] = dataclasses.field(init=False, repr=False)
    classes: tuple[str, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        folder = Path(self.folder)
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size {self.size} must be positive and no larger than resize {self.resize}")
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}: give the one that holds a folder for each class")
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise ValueError(f"{folder} has no class folders: images belong into {folder}/<class>/<image>")
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in ENDINGS)
            if not found:
                raise ValueError(f"{folder / name} holds no images ({', '.join(sorted(ENDINGS))}): fill or remove it")
            files += found
            labels += [label] * len(found)
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "files", tuple(files))
        object.__setattr__(self, "labels", np.array(labels, np.int32))
        object.__setattr__(self, "classes", tuple(classes))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Int[np.ndarray, " b"]) -> Batch:
        """The images resized and cut at the centre."""
        return self._batch(indices, [None] * len(indices))

    def draw(self, indices: Int[np.ndarray, " b"], rng: np.random.Generator) -> Batch:
        """Random resized windows of the images, half of them mirrored."""
        return self._batch(indices, rng.spawn(len(indices)))

    def _batch(self, indices: Int[np.ndarray, " b"], rngs: Sequence[np.random.Generator | None]) -> Batch:
        pixels = np.stack(list(_threads().map(self._decode, (self.files[i] for i in indices), rngs)))
        return {"image": normalise(pixels), "label": self.labels[indices]}

    def _decode(self, file: Path, rng: np.random.Generator | None) -> UInt8[np.ndarray, "s s 3"]:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:  # Pillow's for everything from a missing file to a torn one
            raise ValueError(f"cannot decode {file} ({error}): replace or remove it") from error
        if rng is None:
            return centre(image, self.size, self.resize)
        window = random_window(rng, *image.size)
        small = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=window))
        return small[:, ::-1] if rng.random() < 0.5 else small


def load_image_folder(folder: str | Path, size: int = 224, resize: int = 256) -> Dataset:
    """The data set in `folder`/train and `folder`/val; ValueError for missing folders or classes that differ."""
    train, test = (ImageFolder(Path(folder) / part, size, resize) for part in ("train", "val"))
    if odd := set(train.classes) ^ set(test.classes):
        raise ValueError(
            f"the class {min(odd)!r} is in only one of {train.folder} and {test.folder}: complete the other"
        )
    return Dataset(train, test, len(train.classes), (size, size, 3), f"images({Path(folder).name}, size={size})")


def random_window(rng: np.random.Generator, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a window with area and aspect ratio drawn from AREA and RATIO.

    After ten draws that do not fit, the largest centred window whose ratio is allowed.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * RATIO[1]))), min(height, max(1, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre(image: Image.Image, size: int, resize: int) -> UInt8[np.ndarray, "s s 3"]:
    """The central size x size pixels of the image scaled so that its shorter side has `resize` pixels."""
    scale = resize / min(image.size)
    width, height = (max(resize, int(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def normalise(pixels: UInt8[np.ndarray, "b h w 3"]) -> Float32[np.ndarray, "b h w 3"]:
    """Pixels 0..255 to the range published weights expect."""
    mean, std = 255 * np.array(MEAN, np.float32), 255 * np.array(STD, np.float32)
    return (pixels.astype(np.float32) - mean) / std


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

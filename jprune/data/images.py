"""ImageNet-style folders: one folder a class, image files in it, decoded when a batch is read.

    folder/train/<class>/*.jpg      folder/val/<class>/*.jpg

Training takes a random area (8 to 100 %) and aspect ratio (3/4 to 4/3) of the image, resized to a square, mirrored
half of the time; evaluation resizes the shorter side to `resize` and takes the centre. Classes are numbered in the
order of their sorted folder names, as everywhere. `Preprocess` is what else a published model may want of its images,
and reads a folder of classes, or of pictures without any, for it.
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


FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a model wants its images: scaled, the central square cut out, each channel shifted and divided.

    Attributes:
      size: side of the square in pixels.
      resize: what the shorter side is scaled to before; `squash`: both sides are, whatever the aspect ratio.
      mean, std: per channel, of pixels in [0, 1].
      interpolation: one of FILTERS.
    """

    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    interpolation: str = "bilinear"
    squash: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(f"size {self.size} must be positive and no larger than resize {self.resize}")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation is {self.interpolation!r}: use one of {', '.join(FILTERS)}")
        finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if len(self.mean) != 3 or len(self.std) != 3 or not finite or min(self.std) <= 0:
            raise ValueError(
                f"mean {self.mean} and std {self.std} must be of three channels, finite, with std positive"
            )

    def pixels(self, image: Image.Image) -> UInt8[np.ndarray, "s s 3"]:
        """The scaled and cut picture, 0..255."""
        image = image.convert("RGB")
        return centre(image, self.size, self.resize, self.interpolation, self.squash)

    def __call__(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "b s s 3"]:
        """Pictures of any size and mode as a batch."""
        return normalise(np.stack([self.pixels(image) for image in images]), self.mean, self.std)

    def folder(self, folder: str | Path, classes: Sequence[str] | None = None) -> ImageFolder:
        """The pictures of a folder: of its class folders, or, if it has none, its own, without labels.

        Args:
          folder: holds class folders, or pictures.
          classes: names of a model's classes, whose numbers the labels are to be; None: of the sorted folder names.

        Raises:
          ValueError: neither class folders nor pictures, or both; a folder named like none of `classes`.
        """
        folder = Path(folder)
        inside = list(folder.iterdir()) if folder.is_dir() else []
        own = any(p.suffix.lower() in ENDINGS and p.is_file() for p in inside)
        deeper = any(p.is_dir() and not p.name.startswith(".") for p in inside)
        if own and deeper:
            raise ValueError(f"{folder} holds both pictures and folders: move the pictures into a folder each class")
        return ImageFolder(folder, **dataclasses.asdict(self), labelled=not own, numbering=classes)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFolder:
    """A split read from `folder`/<class>/<image>, (size, size, 3) float32, normalised by ImageNet's statistics.

    Attributes:
      folder: where the images are.
      size, resize, mean, std, interpolation, squash: as in `Preprocess`.
      labelled: False: the pictures lie in `folder` itself and have no class; then batches have no "label".
      numbering: names of all classes, of which the folders may be some; None: the folders' sorted names.
      files, labels, classes: what was found.
    """

    folder: Path
    size: int = 224
    resize: int = 256
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    interpolation: str = "bilinear"
    squash: bool = False
    labelled: bool = True
    numbering: Sequence[str] | None = dataclasses.field(default=None, repr=False)
    files: tuple[Path, ...] = dataclasses.field(init=False, repr=False)
    labels: Int[np.ndarray, " n"] = dataclasses.field(init=False, repr=False)
    classes: tuple[str, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        folder = Path(self.folder)
        Preprocess(self.size, self.resize, self.mean, self.std, self.interpolation)  # raises if they do not fit
        if not folder.is_dir():
            wanted = "a folder for each class" if self.labelled else "the pictures"
            raise ValueError(f"there is no folder {folder}: give the one that holds {wanted}")
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        classes = classes if self.labelled else []
        if self.labelled and not classes:
            raise ValueError(f"{folder} has no class folders: images belong into {folder}/<class>/<image>")
        numbers = {name: i for i, name in enumerate(self.numbering or classes)}
        files: list[Path] = []
        labels: list[int] = []
        for name in classes or [None]:
            if name is not None and name not in numbers:
                raise ValueError(f"{folder / name} is named like none of the {len(numbers)} classes: rename it")
            place = folder / (name or "")
            found = sorted(p for p in place.iterdir() if p.suffix.lower() in ENDINGS)
            if not found:
                raise ValueError(f"{place} holds no images ({', '.join(sorted(ENDINGS))}): fill or remove it")
            files += found
            labels += [numbers[name]] * len(found) if name is not None else []
        object.__setattr__(self, "folder", folder)
        object.__setattr__(self, "files", tuple(files))
        object.__setattr__(self, "labels", np.array(labels, np.int32))
        object.__setattr__(self, "classes", tuple(numbers))

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
        batch = {"image": normalise(pixels, self.mean, self.std)}
        return {**batch, "label": self.labels[indices]} if self.labelled else batch

    def _decode(self, file: Path, rng: np.random.Generator | None) -> UInt8[np.ndarray, "s s 3"]:
        image = read_image(file)
        if rng is None:
            return centre(image, self.size, self.resize, self.interpolation, self.squash)
        window = random_window(rng, *image.size)
        small = np.asarray(image.resize((self.size, self.size), FILTERS[self.interpolation], box=window))
        return small[:, ::-1] if rng.random() < 0.5 else small


def read_image(file: str | Path) -> Image.Image:
    """The picture of a file, in RGB; raises ValueError if there is none, or it is torn or too large to be one."""
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types for damaged files
        raise ValueError(f"cannot decode {file} ({error}): replace or remove it") from error


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


def centre(
    image: Image.Image, size: int, resize: int, interpolation: str = "bilinear", squash: bool = False
) -> UInt8[np.ndarray, "s s 3"]:
    """The central size x size pixels of the image scaled so that its shorter side (or both) has `resize` pixels."""
    scale = resize / min(image.size)
    width, height = (resize if squash else max(resize, int(side * scale)) for side in image.size)
    scaled = image.resize((width, height), FILTERS[interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def normalise(
    pixels: UInt8[np.ndarray, "b h w 3"], mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> Float32[np.ndarray, "b h w 3"]:
    """Pixels 0..255 to the range published weights expect."""
    shift, scale = 255 * np.array(mean, np.float32), 255 * np.array(std, np.float32)
    return (pixels.astype(np.float32) - shift) / scale


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

"""Data sets as two splits of deterministic, resumable batches, and text; downloads nothing and knows no model."""

from jprune.data.augment import pad_crop_flip
from jprune.data.cifar import load_cifar
from jprune.data.dataset import (
    ArraySplit,
    Augmentation,
    Batch,
    Dataset,
    Split,
    epoch_batches,
    eval_batches,
    steps_per_epoch,
    stream,
)
from jprune.data.digits import load_digits
from jprune.data.images import ImageFolder, Preprocess, load_image_folder

__all__ = [
    "ArraySplit",
    "Augmentation",
    "Batch",
    "Dataset",
    "ImageFolder",
    "Preprocess",
    "Split",
    "epoch_batches",
    "eval_batches",
    "load_cifar",
    "load_digits",
    "load_image_folder",
    "pad_crop_flip",
    "steps_per_epoch",
    "stream",
]

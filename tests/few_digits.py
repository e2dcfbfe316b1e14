"""Some of the digits, for fast tests: their programs are not optimised and take milliseconds for every image."""

import dataclasses

from jprune.data import load_digits


def few_digits(train, test, seed=0):
    """The first images of both splits."""
    digits = load_digits(seed)
    few = (
        dataclasses.replace(split, images=split.images[:n], labels=split.labels[:n])
        for split, n in ((digits.train, train), (digits.test, test))
    )
    return dataclasses.replace(digits, **dict(zip(("train", "test"), few, strict=True)))

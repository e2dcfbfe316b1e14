"""The same decoder in other codebases' trees: logical matrices by name and layer, conversion, slicing by kept units."""

from jprune.checkpoint.layouts.codebases import (
    EASYLM,
    GEMMA,
    HF,
    LAYOUTS,
    LEVANTER,
    LINEN,
    LINEN_SCAN,
    MAXTEXT,
    MAXTEXT_SCAN,
    PEFT,
    TUNIX,
    custom,
    gemma,
)
from jprune.checkpoint.layouts.convert import convert
from jprune.checkpoint.layouts.kept import Kept, kept_of_plan, slice_kept
from jprune.checkpoint.layouts.layout import ROLES, Layout, Site, update, view, views

__all__ = [
    "EASYLM",
    "GEMMA",
    "HF",
    "LAYOUTS",
    "LEVANTER",
    "LINEN",
    "LINEN_SCAN",
    "MAXTEXT",
    "MAXTEXT_SCAN",
    "PEFT",
    "ROLES",
    "TUNIX",
    "Kept",
    "Layout",
    "Site",
    "convert",
    "custom",
    "gemma",
    "kept_of_plan",
    "slice_kept",
    "update",
    "view",
    "views",
]

"""PyTorch and its pruning and model libraries, importable together on a CPU, for side-by-side comparisons.

torchvision's wheels hold compiled operators for one build of torch only. Beside another build the Python part works -
none of the classifiers compared here uses those operators - but its import stops at their declarations; declaring them
first lets it through.
"""

from __future__ import annotations

import importlib
from types import ModuleType

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def peer(name: str) -> ModuleType:
    """The module torch, torchvision, timm, transformers or torch_pruning.

    Raises:
      ImportError: the "reference" extra is not installed.
    """
    try:
        torch = importlib.import_module("torch")
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            global _declared
            _declared = torch.library.Library("torchvision", "DEF")  # lives as long as the operators are wanted
            for operator in OPERATORS:
                _declared.define(operator)
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{error}; comparisons need: python -m pip install -e '.[reference]'") from error

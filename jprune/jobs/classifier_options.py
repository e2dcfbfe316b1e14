"""What decides the outcome of a run of the main job: its options, checked, and the data set they name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jprune.data import Dataset, load_cifar, load_digits, load_image_folder
from jprune.methods.channels.names import method
from jprune.training import TrainConfig

DATA = {
    "digits": "scikit-learn's 1797 handwritten digits, 8x8, embedded",
    "cifar10": "CIFAR-10 in its binary format (--data-dir)",
    "cifar100": "CIFAR-100 in its binary format (--data-dir)",
    "imagenet-folder": "train/ and val/ with a folder of images per class (--data-dir)",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that decides the outcome of a run.

    Attributes:
      model, data, data_dir, method: names; see `jprune list`.
      target: fraction to keep, in (0, 1), of `quantity` ("macs", "params" or "bytes").
      scope: "global", "uniform" or "isomorphic".
      steps, schedule: prune in that many steps, "one_shot", "linear" or "cubic", fine-tuning after each.
      multiple_of: kept widths are multiples of this.
      min_keep: units every group keeps.
      epochs, finetune_epochs: of the baseline (and of each sparse phase), and after pruning in all. Methods that
        start from scratch train the small network for `epochs`, as long as the baseline they are compared with.
      learning_rate, finetune_learning_rate, batch_size, weight_decay: of SGD with Nesterov momentum 0.9.
      strength: of the penalty of slimming and masksparsity; 0 means what the schedule needs (`suggest_s`).
      threshold, sparsity: of masksparsity, which has no target: channels whose scales end at or below the threshold go;
        with a sparsity the mask is of the channels whose scales are smallest, that fraction of all listed ones.
      seed: of everything.
    """

    model: str = "resnet20"
    data: str = "digits"
    data_dir: str | None = None
    method: str = "magnitude-l2"
    target: float = 0.5
    quantity: str = "macs"
    scope: str = "global"
    steps: int = 1
    schedule: str = "linear"
    multiple_of: int = 1
    min_keep: int = 1
    epochs: int = 20
    finetune_epochs: int = 15
    learning_rate: float = 0.05
    finetune_learning_rate: float = 0.02
    batch_size: int = 64
    weight_decay: float = 5e-4
    strength: float = 0.0
    threshold: float = 0.01
    sparsity: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules = [
            ("data", self.data in DATA, f"one of {', '.join(DATA)}"),
            ("quantity", self.quantity in ("macs", "params", "bytes"), "macs, params or bytes"),
            ("target", 0 < self.target < 1, "a fraction to keep, between 0 and 1"),
            ("scope", self.scope in ("global", "uniform", "isomorphic"), "global, uniform or isomorphic"),
            ("schedule", self.schedule in ("one_shot", "linear", "cubic"), "one_shot, linear or cubic"),
            ("steps", self.steps >= 1, "at least 1"),
            ("multiple_of", self.multiple_of >= 1, "at least 1"),
            ("min_keep", self.min_keep >= 1, "at least 1"),
            ("finetune_epochs", self.finetune_epochs >= 0, "at least 0"),
            ("strength", self.strength >= 0, "at least 0"),
            ("threshold", self.threshold > 0, "above 0"),
            ("sparsity", self.sparsity is None or 0 < self.sparsity < 1, "a fraction to remove, between 0 and 1"),
            ("data_dir", self.data == "digits" or self.data_dir is not None, f"the folder that holds {self.data}"),
        ]
        for name, holds, allowed in rules:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {allowed}")
        chosen = method(self.method)
        if self.quantity not in chosen.quantities:
            allowed = " or ".join(chosen.quantities)
            raise ValueError(f"quantity is {self.quantity!r}: method {self.method!r} aims at {allowed}")
        for field in dataclasses.fields(self):
            if field.name in chosen.fixed and (value := getattr(self, field.name)) != field.default:
                raise ValueError(f"{field.name} is {value!r}: method {self.method!r} has no such choice; leave it out")

    def recipe(self, epochs: int, learning_rate: float) -> TrainConfig:
        """The training recipe of a phase."""
        return TrainConfig(epochs=epochs, batch_size=self.batch_size, learning_rate=learning_rate,
                           weight_decay=self.weight_decay, seed=self.seed)  # fmt: skip


def load_data(options: Options) -> Dataset:
    """The data set the options name; ValueError if its folder is not what it should be."""
    folder = Path(options.data_dir or "")
    if options.data == "digits":
        return load_digits(options.seed)
    if options.data == "imagenet-folder":
        return load_image_folder(folder)
    return load_cifar(folder, 10 if options.data == "cifar10" else 100)

"""One training loop and one evaluation for the whole library."""

from jprune.training.config import TrainConfig, learning_rates, sgd, with_own_updates
from jprune.training.evaluate import Evaluation, evaluate
from jprune.training.forward import Forward, as_forward
from jprune.training.loop import train
from jprune.training.loss import Loss, cross_entropy, mean_cross_entropy
from jprune.training.recalibrate import recalibrate

__all__ = [
    "Evaluation",
    "Forward",
    "Loss",
    "TrainConfig",
    "as_forward",
    "cross_entropy",
    "evaluate",
    "learning_rates",
    "mean_cross_entropy",
    "recalibrate",
    "sgd",
    "train",
    "with_own_updates",
]

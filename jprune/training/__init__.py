"""One training loop, one evaluation and one run folder for the whole library; what is trained, and why, others decide."""

from jprune.training.config import TrainConfig, TuningConfig, learning_rates, sgd, with_own_updates
from jprune.training.evaluate import Evaluation, evaluate
from jprune.training.fit import fit
from jprune.training.forward import Forward, as_forward
from jprune.training.gradients import accumulated, clipped
from jprune.training.loop import train
from jprune.training.loss import Loss, cross_entropy, mean_cross_entropy
from jprune.training.recalibrate import recalibrate
from jprune.training.steps import Epochs, run_steps

__all__ = [
    "Epochs",
    "Evaluation",
    "Forward",
    "Loss",
    "TrainConfig",
    "TuningConfig",
    "accumulated",
    "as_forward",
    "clipped",
    "cross_entropy",
    "evaluate",
    "fit",
    "learning_rates",
    "mean_cross_entropy",
    "recalibrate",
    "run_steps",
    "sgd",
    "train",
    "with_own_updates",
]

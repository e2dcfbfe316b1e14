"""What the command line runs, one file a kind of model: they measure, write and report; how much goes where is a method's."""

from jprune.jobs.classifier import ClassifierConfig, ClassifierRun
from jprune.jobs.decoder import DecoderConfig, DecoderRun
from jprune.jobs.load import load_plan, load_pruned

__all__ = ["ClassifierConfig", "ClassifierRun", "DecoderConfig", "DecoderRun", "load_plan", "load_pruned"]

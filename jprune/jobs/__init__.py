"""The main job: train, prune (or start small), fine-tune, measure, and leave a folder that says it all.

    phases/..          checkpoints and metrics of every phase, for resuming
    checkpoint/        the pruned model: orbax arrays and metadata to rebuild it (`load_pruned`)
    plan.json          what was removed, to repeat on another copy of the weights (where something was removed)
    metrics.jsonl      every step and epoch of every phase
    summary.json       before and after
    report.html, *.png

Every phase is a pure function of the options, so an interrupted run that is resumed ends with the same bits.
"""

from jprune.jobs.classifier import Run, rows
from jprune.jobs.classifier_options import DATA, Options, load_data
from jprune.jobs.load import load_plan, load_pruned

__all__ = ["DATA", "Options", "Run", "load_data", "load_plan", "load_pruned", "rows"]

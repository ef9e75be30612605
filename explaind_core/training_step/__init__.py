"""One training step, described so that it can be made again: batch, forward pass, loss, recipe, machine.

It may import errors, naming, tensors, trees and data; it knows no run.
"""

from __future__ import annotations

from explaind_core.training_step.batch import Batch, MicroBatch
from explaind_core.training_step.batch_content import BatchContent
from explaind_core.training_step.environment import differences, environment, git_commit, provenance, threads
from explaind_core.training_step.fingerprints import fingerprint
from explaind_core.training_step.forward_state import ForwardState, random_state
from explaind_core.training_step.input_rows import InputRows, PerRow, Shared
from explaind_core.training_step.losses import LossFunction, describe_loss, rebuild_loss
from explaind_core.training_step.model import ModelCall, ParameterInfo, run_model
from explaind_core.training_step.model_parts import different_parts, model_parts
from explaind_core.training_step.optimizers import constructor_arguments, rebuild_optimizer
from explaind_core.training_step.output_entries import differ_beyond_rounding, keeps_outputs, output_entries
from explaind_core.training_step.recipe import GradientFunction, Recipe, candidates, different
from explaind_core.training_step.reread import read_again
from explaind_core.training_step.sample_losses import SampleLosses
from explaind_core.training_step.transformers_losses import loss_of, returned

__all__ = [
    "Batch",
    "BatchContent",
    "ForwardState",
    "GradientFunction",
    "InputRows",
    "LossFunction",
    "MicroBatch",
    "ModelCall",
    "ParameterInfo",
    "PerRow",
    "Recipe",
    "SampleLosses",
    "Shared",
    "candidates",
    "constructor_arguments",
    "describe_loss",
    "differ_beyond_rounding",
    "differences",
    "different",
    "different_parts",
    "environment",
    "fingerprint",
    "git_commit",
    "keeps_outputs",
    "loss_of",
    "model_parts",
    "output_entries",
    "provenance",
    "random_state",
    "read_again",
    "rebuild_loss",
    "rebuild_optimizer",
    "returned",
    "run_model",
    "threads",
]

"""The run that the study is about: trained, recorded, opened; and its samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import xarray as xr
from torch import Tensor

import explaind_core as explaind
from explaind_studies import demo
from explaind_studies.grokking.setting import GrokkingSetting
from explaind_studies.grokking.stages import Stages, find_stages
from explaind_studies.modular_addition import LAYERS, ModularAddition, ModularTransformer, modular_addition
from explaind_studies.workbook import Workbook

__all__ = ["OUTER", "Subject", "names_of", "trained"]

#: Groups of layers by the paper's abbreviations.
OUTER = {
    "Emb.": ("embedding",),
    "Decoder": ("decoder",),
    "Emb.+Dec.": ("embedding", "decoder"),
    "Emb.+Lin2+Dec.": ("embedding", "linear 2", "decoder"),
    "All but att.": ("embedding", "linear 1", "linear 2", "decoder"),
    "Att.": ("attention encoder", "attention decoder"),
    "Att.+Lin1": ("attention encoder", "attention decoder", "linear 1"),
}


def names_of(layers: Iterable[str], model: torch.nn.Module) -> list[str]:
    """The parameters of some of the six layers.

    Example:
        >>> names_of(["decoder"], ModularTransformer(5))
        ['decoder.weight']
    """
    prefixes = tuple(LAYERS[layer].removesuffix("*") for layer in layers)
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


@dataclass(frozen=True)
class Subject:
    """A grokked run and its data.

    Attributes:
        setting: of the study.
        run: the recorded run, with its model.
        task: training and test samples.
    """

    setting: GrokkingSetting
    run: explaind.Run
    task: ModularAddition

    @cached_property
    def metrics(self) -> xr.Dataset:
        """Accuracies after every step."""
        return self.run.metrics

    @cached_property
    def stages(self) -> Stages:
        """Found from the accuracies."""
        return find_stages(self.metrics)

    @property
    def explained(self) -> Tensor:
        """The test samples whose predictions are explained."""
        return self.task.test_inputs[: self.setting.explained]

    def model(self, step: int | None = None) -> ModularTransformer:
        """A model of its own, as after ``step`` (or as it is made, where nothing is said)."""
        made = ModularTransformer(self.task.vocabulary)
        if step is not None:
            with torch.no_grad():
                theta = self.run.theta(step)
                for name, parameter in made.named_parameters():
                    parameter.copy_(theta[name])
        return made


def trained(book: Workbook, setting: GrokkingSetting) -> Subject:
    """Train and record, or continue, or open what is there; its time is the part ``training``."""
    path = book.folder / "run"

    def train() -> xr.Dataset:
        demo.train(setting, path, progress=book.progress)
        return explaind.open_run(path).metrics[["train_accuracy", "test_accuracy"]]

    book.part("training", train, f"{setting.train} samples, betas {setting.betas}")
    task = modular_addition(setting.p, setting.train, setting.test, seed=setting.seed)
    run = explaind.open_run(path, model=ModularTransformer(task.vocabulary))
    return Subject(setting, run, task)

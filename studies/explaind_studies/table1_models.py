"""The models of Table 1: how each is trained and recorded, and what is asked about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import xarray as xr
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_studies import demo
from explaind_studies.cifar import cifar2
from explaind_studies.digits import Images, Schedule, digits, train_cnn
from explaind_studies.modular_addition import ModularTransformer, modular_addition
from explaind_studies.resnet import ResNet9, generated_images

__all__ = ["MODELS", "Setting", "Subject", "subjects"]

#: What ``experiments`` may name, in the order in which they are run.
MODELS = ("transformer", "cnn", "resnet9")


@dataclass(frozen=True)
class Setting:
    """Of the study of Table 1.

    Attributes:
        experiments: which of ``MODELS``.
        seed: of data, initialisation and order of samples.
        data: the folder of CIFAR-10, for the CNN; None where it learns scikit-learn's digits.
        nodes: the rules of quadrature, of the Transformer and the CNN.
        tolerance: of the adaptive one.
        explained: how many test samples are rebuilt.
        p: the modulus of the Transformer's task.
        train: how many training samples the Transformer has.
        test: how many test samples the Transformer has.
        most_steps: where the Transformer's training stops at the latest.
        cnn_width: channels of the CNN's first layer.
        cnn_epochs: the CNN's passes over its data.
        cnn_batch: samples in a batch of digits.
        cifar_batch: samples in a batch of CIFAR-2.
        resnet_width: channels of the first layer of the ResNet, which is the check of size, an epoch long.
        resnet_images: how many images it is trained on.
        resnet_batch: samples in one of its batches.
        resnet_explained: how many test images are rebuilt.
        resnet_nodes: the rules of quadrature they are rebuilt with.
    """

    experiments: tuple[str, ...] = MODELS
    seed: int = demo.PAPER.seed
    data: str | None = None
    nodes: tuple[int | str, ...] = ("midpoint:10", "midpoint:100", "adaptive", 1, 2)
    tolerance: float = demo.PAPER.tolerance
    explained: int = 100
    p: int = demo.PAPER.p
    train: int = demo.PAPER.train
    test: int = demo.PAPER.test
    most_steps: int = demo.PAPER.most_steps
    cnn_width: int = 8
    cnn_epochs: int = 12
    cnn_batch: int = 64
    cifar_batch: int = 256
    resnet_width: int = 64
    resnet_images: int = 10_000
    resnet_batch: int = 256
    resnet_explained: int = 10
    resnet_nodes: tuple[int | str, ...] = ("adaptive",)


@dataclass(frozen=True)
class Subject:
    """A model of the table.

    Attributes:
        name: what ``experiments`` calls it.
        title: what the page calls it.
        data: what it is trained on, for the page.
        nodes: the rules of quadrature it is rebuilt with.
        train: trains it, recorded at a path.
        make: makes the bare model.
        inputs: returns the test samples to explain.
    """

    name: str
    title: str
    data: str
    nodes: Sequence[int | str]
    train: Callable[[Path], None]
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]

    def trained(self, path: Path) -> xr.Dataset:
        """Train and record it at ``path``, unless a whole run is there: its size, and how well it does."""
        if not (path / "closed.json").exists():
            self.train(path)
        run = explaind.open_run(path)
        last = run.metrics.isel(step=-1)
        return xr.Dataset(
            {
                "steps": len(run.steps),
                "parameters": sum(p.shape.numel() for p in run.parameters.values()),
                "train_accuracy": float(last.train_accuracy),
                "test_accuracy": float(last.test_accuracy),
            }
        )

    def verified(self, path: Path, nodes: int | str, tolerance: float, *, progress: bool) -> xr.Dataset:
        """Rebuild the predictions of the run at ``path`` and compare them with the model's.

        Args:
            path: where the recorded run lies.
            nodes: the rule of quadrature.
            tolerance: of the adaptive one.
            progress: whether to show bars.

        Returns:
            The numbers of the verification; ``residual`` is the largest of each step.
        """
        run = explaind.open_run(path, model=self.make())
        start = perf_counter()
        check = explaind.verify(run, self.inputs(), nodes=nodes, tolerance=tolerance, progress=progress)
        seconds = perf_counter() - start
        residual = abs(check.residual).max(["test", "output"])
        return xr.Dataset(
            {
                "residual": ("step", residual.values.astype("float64")),
                "agreement": check.agreement,
                "kl": float("nan") if check.kl is None else check.kl,
                "max_error": check.max_error,
                "largest_output": check.largest_output,
                "update_error": check.update_error,
                "closure": float(explaind.closure_error(check.result)) / check.largest_output,
                "nodes_used": check.nodes_used,
                "nodes_evaluated": check.nodes_evaluated,
                "missed": int((~check.result.converged).sum()),
                "samples": check.samples,
                "seconds": seconds,
            },
            coords={"step": residual.step.values},
        )


def subjects(setting: Setting, *, progress: bool = True) -> list[Subject]:
    """Those that the setting names, in the order of ``MODELS``.

    Raises:
        QuestionError: it names others.

    Example:
        >>> [subject.title for subject in subjects(Setting(experiments=("cnn", "transformer")))]
        ['Transformer', 'ResNet9, width 8']
    """
    if unknown := [name for name in setting.experiments if name not in MODELS]:
        raise QuestionError(
            f"the study has no experiment {unknown[0]!r}", where="table1", expected=list(MODELS), got=unknown
        )
    makers = {"transformer": _transformer, "cnn": _cnn, "resnet9": _resnet9}
    return [makers[name](setting, progress) for name in MODELS if name in setting.experiments]


def _transformer(setting: Setting, progress: bool) -> Subject:
    asked = demo.Setting(
        p=setting.p, train=setting.train, test=setting.test, seed=setting.seed, most_steps=setting.most_steps
    )

    def train(path: Path) -> None:
        demo.train(asked, path, progress=progress)

    def inputs() -> Tensor:
        task = modular_addition(setting.p, setting.train, setting.test, seed=setting.seed)
        return task.test_inputs[: setting.explained]

    return Subject(
        "transformer", "Transformer", f"MOD-{setting.p}", setting.nodes, train,
        lambda: ModularTransformer(setting.p + 2), inputs,
    )  # fmt: skip


def _cnn(setting: Setting, progress: bool) -> Subject:
    batch = setting.cnn_batch if setting.data is None else setting.cifar_batch
    schedule = Schedule(epochs=setting.cnn_epochs, batch=batch)

    def task() -> Images:
        if setting.data is None:
            return digits(setting.seed)
        found = cifar2(Path(setting.data))
        return Images(found.train_images, found.train_targets, found.test_images, found.test_targets)

    def make() -> ResNet9:
        return ResNet9(setting.cnn_width, *((10, 0.2, 1) if setting.data is None else (2, 0.2, 3)))

    return Subject(
        "cnn", f"ResNet9, width {setting.cnn_width}", "digits" if setting.data is None else "CIFAR-2", setting.nodes,
        lambda path: _train(task(), path, make, schedule, setting.seed, progress), make,
        lambda: task().test_images[: setting.explained],
    )  # fmt: skip


def _resnet9(setting: Setting, progress: bool) -> Subject:
    schedule = Schedule(epochs=1, batch=setting.resnet_batch, rate=0.01, peak_epoch=None, whole=True)

    def unseen() -> tuple[Tensor, Tensor]:
        return generated_images(max(500, setting.resnet_explained), seed=setting.seed + 1)

    def make() -> ResNet9:
        return ResNet9(setting.resnet_width)

    def train(path: Path) -> None:
        task = Images(*generated_images(setting.resnet_images, seed=setting.seed), *unseen())
        _train(task, path, make, schedule, setting.seed, progress)

    return Subject(
        "resnet9", f"ResNet9, width {setting.resnet_width}", "generated images", setting.resnet_nodes, train, make,
        lambda: unseen()[0][: setting.resnet_explained],
    )  # fmt: skip


def _train(
    task: Images, path: Path, make: Callable[[], nn.Module], schedule: Schedule, seed: int, progress: bool
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    train_cnn(task, path, model, schedule, seed=seed, progress=progress)

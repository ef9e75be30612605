"""The losses that models of ``transformers`` compute themselves, as functions of what they return and the labels.

Each takes the model's whole output or its logits alone, and is the mean over one batch. By which factor a framework
multiplies it (accumulated batches, counted tokens) is the batch's weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from explaind_core.errors import RecordingError

__all__ = ["classification", "loss_of", "multi_label", "next_token", "regression", "returned"]

#: Tokens with this label do not count.
IGNORED = -100


def classification(output: Any, labels: Tensor) -> Tensor:
    """Cross entropy over classes, of sequences or of tokens.

    Args:
        output: what the model returned, or its logits ``[..., C]`` alone.
        labels: ``[...]``, int64; :data:`IGNORED` does not count.

    Returns:
        The mean, ``[]``.

    Example:
        >>> classification(torch.zeros(1, 2, 4), torch.tensor([[3, IGNORED]])).exp()
        tensor(4.)
    """
    logits = _logits(output)
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def next_token(output: Any, labels: Tensor) -> Tensor:
    """Cross entropy of a causal language model: the logits at t predict the label at t + 1.

    Args:
        output: what the model returned, or its logits ``[n, T, V]`` alone.
        labels: ``[n, T]``, int64; :data:`IGNORED` does not count.

    Returns:
        The mean, ``[]``.

    Example:
        >>> next_token(torch.zeros(1, 2, 4), torch.tensor([[IGNORED, 3]])).exp()
        tensor(4.)
    """
    logits = _logits(output)
    return classification(logits[:, :-1], labels[:, 1:])


def regression(output: Any, labels: Tensor) -> Tensor:
    """Mean squared error.

    Args:
        output: what the model returned, or its logits ``[n, 1]`` or ``[n, K]`` alone.
        labels: ``[n]`` or ``[n, K]``.

    Returns:
        The mean, ``[]``.

    Example:
        >>> regression(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    logits = _logits(output)
    return functional.mse_loss(logits, labels.reshape(logits.shape))


def multi_label(output: Any, labels: Tensor) -> Tensor:
    """Binary cross entropy of every label on its own.

    Args:
        output: what the model returned, or its logits ``[n, C]`` alone.
        labels: ``[n, C]``, 0 or 1.

    Returns:
        The mean, ``[]``.

    Example:
        >>> multi_label(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).exp()
        tensor(2.)
    """
    return functional.binary_cross_entropy_with_logits(_logits(output), labels)


#: By their names, as a recorded run keeps them.
LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    loss.__name__: loss for loss in (classification, next_token, regression, multi_label)
}


def loss_of(model: Any) -> Callable[[Any, Tensor], Tensor]:
    """Which of these a model of ``transformers`` computes, by its class and ``config.problem_type``.

    Args:
        model: of ``transformers``.

    Returns:
        One of the losses of this module.

    Raises:
        RecordingError: it is none of them.
    """
    kind = getattr(model, "loss_type", None)
    if kind is None and _takes_the_default(model):
        kind = "ForCausalLM"
    if kind == "ForSequenceClassification":
        config = model.config
        problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        return {
            "regression": regression,
            "single_label_classification": classification,
            "multi_label_classification": multi_label,
        }[problem]
    known = {
        "ForTokenClassification": classification,
        "ForMaskedLM": classification,
        "ForCausalLM": next_token,
        "ForImageClassification": classification,
    }
    if kind not in known:
        raise RecordingError(
            "which loss this model is trained on is not known",
            where=type(model).__name__,
            expected=f"a model with a loss_type among {sorted([*known, 'ForSequenceClassification'])}",
            got=kind,
            remedy="pass it: RecorderCallback(..., loss=lambda output, targets: ...)",
        )
    return known[kind]


def _takes_the_default(model: Any) -> bool:
    """Whether a class of no known name leaves its loss to transformers (``GPT2LMHeadModel``), and computes none (T5).

    The default then is that of causal language models.
    """
    try:
        return "self.loss_function(" in inspect.getsource(type(model).forward)
    except (OSError, TypeError, AttributeError):
        return False


def returned(output: Any) -> Any:
    """What a loss is a function of.

    Args:
        output: what a model returned.

    Returns:
        The logits, where it returned several things by name; else all that it returned.
    """
    logits = output.get("logits") if isinstance(output, dict) else None
    return output if logits is None else logits


def _logits(output: Any) -> Tensor:
    logits: Tensor = returned(output)
    # As autocast does for losses.
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits

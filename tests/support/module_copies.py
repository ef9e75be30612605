"""What tells a copy of a model from the model, and small models to be copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["Base", "Data", "X", "Y", "alike", "assert_untouched", "independent", "state_of"]

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1])


def alike(copied: nn.Module, model: nn.Module) -> None:
    """Same structure, values and ties; nothing of the one is of the other."""
    assert [(n, type(m)) for n, m in copied.named_modules(remove_duplicate=False)] == [
        (n, type(m)) for n, m in model.named_modules(remove_duplicate=False)
    ]
    ours, theirs = copied.state_dict(keep_vars=True), model.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.requires_grad == theirs[name].requires_grad, name
        if tensor.numel():
            assert tensor.data_ptr() != theirs[name].data_ptr(), name
    tied = [[m is n for m in s.values() for n in s.values()] for s in (ours, theirs)]
    assert tied[0] == tied[1]
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}


def state_of(model: nn.Module) -> Any:
    """What a model is, to be compared before and after something that must not touch it."""
    tensors = {n: (t, t.detach().clone(), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    attributes = {n: {k: v for k, v in vars(m).items() if k != "training"} for n, m in model.named_modules()}
    sizes = {n: {k: len(v) for k, v in a.items() if isinstance(v, list | dict)} for n, a in attributes.items()}
    return tensors, attributes, sizes, {n: m.training for n, m in model.named_modules()}


def assert_untouched(before: Any, model: nn.Module) -> None:
    after = state_of(model)
    for name, (tensor, value, version) in before[0].items():
        assert after[0][name][0] is tensor
        assert after[0][name][2] == version
        assert torch.equal(value, tensor)
    for name, attributes in before[1].items():
        assert attributes.keys() == after[1][name].keys()
        assert all(after[1][name][key] is value for key, value in attributes.items()), name
    assert before[2:] == after[2:]


def independent(copied: nn.Module, model: nn.Module, *inputs: Any) -> None:
    """The copy computes what the model does, from its own weights alone."""
    with torch.no_grad():
        before = model(*inputs)
        assert torch.equal(copied(*inputs), before)
        for parameter in copied.parameters():
            parameter.mul_(2).add_(1)
        assert not torch.equal(copied(*inputs), before)
        assert torch.equal(model(*inputs), before)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Data(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = [torch.zeros(1000)] * 10

    def __deepcopy__(self, _memo: Any) -> Data:
        raise AssertionError("the data set is not to be copied")

"""Language models as the Hugging Face Trainer leaves them: recomputed activations, losses by default."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

import explaind_core as explaind
from explaind_core.integrations.huggingface import RecorderCallback
from explaind_core.training_step.transformers_losses import classification, loss_of, next_token
from support.huggingface_training import PAD, Sequences, arguments, gpt, pad, tiny


def causal(rows):
    tokens = pad(rows)["input_ids"]
    return {"input_ids": tokens, "labels": torch.where(tokens == PAD, -100, tokens)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_as_it_stands_after_the_trainer(tmp_path, reentrant):
    new = "activation_checkpointing"  # its name in later versions
    name = new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    options = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
    model = gpt()
    training = arguments(tmp_path, max_steps=3, **options)
    callback = RecorderCallback(tmp_path / "run")
    Trainer(model, training, train_dataset=Sequences(), data_collator=causal, callbacks=[callback]).train()
    tokens = torch.tensor([[3, 7, 2, 5], [1, 1, 4, 9]])

    def kernel(opened, strategy):
        run = explaind.open_run(tmp_path / "run", model=opened, loss=loss_of(opened))
        return explaind.attribute(
            run, {"input_ids": tokens}, keep=("layer", "train", "test"), strategy=strategy, nodes=2, progress=False,
            output=lambda call, inputs: call(inputs).logits[:, -1, :2],
        )  # fmt: skip

    plain = kernel(gpt(), "features")  # the same function, and nothing is computed twice
    for strategy in ("features", "adjoint"):
        found = kernel(model, strategy)
        assert found.attrs["sample_gradients"] == "autograd"
        largest = float(abs(plain["kernel"]).max())
        assert float(abs(found["kernel"] - plain["kernel"]).max()) < 1e-5 * largest  # 3e-7


@pytest.mark.parametrize(("make", "kind"), [(gpt, next_token), (tiny, classification)])
def test_the_loss_that_a_class_leaves_to_transformers(make, kind):
    assert loss_of(make()) is kind

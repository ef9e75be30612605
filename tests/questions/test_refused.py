"""What opening and asking refuse: early and clearly. The wording is tested."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.testing import record_example


@pytest.fixture
def run():
    return record_example(steps=4)


def test_not_a_run(tmp_path):
    with pytest.raises(errors.StoreError, match=r"not a recorded run[\s\S]*no manifest.json[\s\S]*explaind.Recorder"):
        explaind.open_run(tmp_path)


def test_another_version(run):
    run.store.write_json("manifest.json", run.manifest | {"version": 99})
    with pytest.raises(errors.StoreError, match=r"another version[\s\S]*\(1, 2\)[\s\S]*version 99, written by"):
        explaind.open_run(run.path)


def test_another_model(run):
    wrong = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with pytest.raises(errors.StoreError, match=r"another model: 3 p[\s\S]*'0.weight'[\s\S]*\(5, 4\)[\s\S]*\(6, 4\)"):
        explaind.open_run(run.path, model=wrong)


def test_a_truncated_step_is_named_and_the_steps_before_it_open(run):
    path = run.store.step_path(3)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(errors.StoreError, match=r"truncated[\s\S]*000003[\s\S]*bytes[\s\S]*until=2"):
        explaind.open_run(run.path, model=run.model)
    assert len(explaind.open_run(run.path, model=run.model, until=2).steps) == 2


@pytest.mark.parametrize("missing", [2, 4])
def test_a_missing_step_is_noticed_in_the_middle_and_at_the_end(run, missing):
    run.store.step_path(missing).unlink()
    with pytest.raises(errors.StoreError, match=f"step {missing} is missing"):
        explaind.open_run(run.path)


def test_a_file_of_something_else(run):
    run.store.step_path(2).write_bytes(b"junk that is long enough to look like a header")
    with pytest.raises(errors.StoreError, match="truncated or not a safetensors file"):
        explaind.open_run(run.path)


def test_every_file_of_a_store_is_safetensors_or_json(run):
    for path in run.path.rglob("*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.is_file():
            [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else json.loads(
                path.read_text()
            )


def test_an_unknown_optimizer_class_is_never_imported(run):
    run.store.write_json("manifest.json", run.manifest | {"optimizer": "antigravity.Optimizer"})
    with pytest.raises(errors.StoreError, match=r"antigravity\.Optimizer is not known here"):
        list(explaind.decompose(explaind.open_run(run.path)))
    assert "antigravity" not in sys.modules


# ------------------------------------------------------------------ asking
X = torch.ones(2, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("question", "kind", "wording"),
    [
        ({"layers": ["decoder"]}, errors.LayerError, r"'decoder' matches no parameter[\s\S]*one of 0.weight"),
        ({"layers": {"a": "0.*", "b": "0.bias"}}, errors.LayerError, r"overlap[\s\S]*'0.bias'[\s\S]*\['a', 'b'\]"),
        ({"layers": {"a": {"0.bias": slice(9, 12)}}}, errors.LayerError, "is empty"),
        ({"layers": {"a": {"0.bias": 9}}}, errors.LayerError, "does not fit"),
        ({"train": [99]}, errors.QuestionError, "of no sample that was trained on"),
        ({"keep": ("stp",)}, errors.QuestionError, "there is no axis 'stp'"),
        ({"steps": slice(1, 99)}, errors.QuestionError, r"outside the run[\s\S]*within 1..4"),
        ({"steps": [0]}, errors.QuestionError, "no step 0"),
        ({"steps": [3, 2]}, errors.QuestionError, "must rise"),
        ({"steps": []}, errors.QuestionError, "no step is asked for"),
        ({"nodes": 0}, errors.QuestionError, r"'adaptive', 'left', 'midpoint:q' or an integer >= 1[\s\S]*0"),
        ({"tolerance": 0.0}, errors.QuestionError, "not positive"),
        ({"engine": "abacus"}, errors.QuestionError, "no such engine"),
        ({"memory": "1KiB"}, errors.QuestionError, r"memory budget[\s\S]*out="),
        ({"memory": "lots"}, errors.QuestionError, "no amount of memory"),
        ({"output": explaind.Activation("9")}, errors.QuestionError, r"no module '9'"),
        ({"output": explaind.Outputs([7])}, errors.QuestionError, "out of range"),
        ({"output": explaind.Loss(torch.zeros(3))}, errors.QuestionError, "same number of samples"),
        ({"output": lambda call, x: call(x).sum()}, errors.QuestionError, "one row per sample"),
        ({"output": lambda call, x: call(x).argmax(1)}, errors.QuestionError, "no derivative"),
        ({"output": lambda call, x: (call(x),)}, errors.QuestionError, "not a tensor"),
    ],
)
def test_questions_that_make_no_sense(run, question, kind, wording):
    options = {"nodes": 1, "progress": False, "memory": "1GiB"} | question
    if question.get("memory") == "1KiB":
        options["keep"] = ("step", "layer", "test", "output")
        inputs = torch.ones(200, 4, dtype=torch.float64)
    else:
        inputs = X
    with pytest.raises(kind, match=wording):
        explaind.attribute(run, inputs, **options)


def test_a_run_opened_without_its_model(run):
    with pytest.raises(errors.QuestionError, match=r"without its model[\s\S]*model=model"):
        explaind.verify(explaind.open_run(run.path), X)


def test_out_refuses_another_question_and_another_folder(run, tmp_path):
    explaind.attribute(run, X, nodes=1, out=tmp_path / "a.zarr", progress=False)
    with pytest.raises(errors.QuestionError, match="result of another question"):
        explaind.attribute(run, X, nodes=2, out=tmp_path / "a.zarr", progress=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.QuestionError):
        explaind.attribute(run, X, nodes=1, out=tmp_path / "b", progress=False)
    assert (tmp_path / "b" / "thesis.tex").exists()

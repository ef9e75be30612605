"""One list of a question's arguments: in signatures, docstrings, calls, and for type checkers."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import Any, Unpack, get_args, get_type_hints

import pytest
import torch

import explaind_core as explaind
from explaind_core.errors import QuestionError
from explaind_core.questions import AttributionArguments, Question, spelled_out
from explaind_core.testing import record_example

INPUTS = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
ASKED = {
    "output": None, "steps": None, "train": None, "shares": "outputs", "layers": None, "test": None,
    "nodes": "adaptive", "tolerance": 1e-3, "max_nodes": 32, "max_update_error": None, "memory": "4GiB", "chunk": 500,
    "random_state": None,
}  # fmt: skip
PATH = {"gradient_steps": None, "chords": 1, "strategy": None, "unattributed": "refuse", "buffers": "recorded"}
KEPT = {"keep": ("step", "layer", "test", "output")}
OF_FUNCTIONS = {
    "attribute": KEPT | ASKED | PATH | {"engine": "local", "progress": True, "out": None},
    "plan": KEPT | ASKED | PATH | {"engine": "local", "progress": True, "out": None},
    "similarity": {"over": ("step", "parameter", "train", "output"), "per": ()} | ASKED | {"progress": True},
    "plan_similarity": {"over": ("step", "parameter", "train", "output"), "per": ()} | ASKED | {"progress": True},
    "kernel_slices": ASKED | {"progress": True},
    "parameter_importance": ASKED | PATH | {"keep": None, "at_once": None, "progress": True},
}


@pytest.fixture(scope="module")
def run():
    return record_example(3)


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_a_signature_shows_every_argument_with_its_default(name):
    parameters = dict(inspect.signature(getattr(explaind, name)).parameters)
    assert [*parameters][:2] == ["run", "inputs"]
    asked = {n: p.default for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert asked == OF_FUNCTIONS[name]
    assert len(parameters) == 2 + len(asked)


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_a_docstring_has_one_entry_an_argument(name):
    function = getattr(explaind, name)
    section = re.search(r"Args:\n(.*?)\n\n", inspect.getdoc(function), re.DOTALL)[1]
    entries = re.findall(r"^    (\S+?): .", section, re.MULTILINE)
    assert sorted(entries) == sorted(inspect.signature(function).parameters)
    assert all(len(line) <= 116 for line in section.splitlines())
    assert "**" not in section


def test_plan_accepts_exactly_what_attribute_accepts():
    plan, attribute = (inspect.signature(f).parameters for f in (explaind.plan, explaind.attribute))
    assert plan == attribute


def test_every_default_is_of_its_type():
    for name, hint in get_type_hints(AttributionArguments, include_extras=True).items():
        kind, argument = get_args(hint)
        accepted = [k for k in (get_args(kind) or [kind]) if isinstance(k, type) and k is not Any]
        if name not in ("keep",) and accepted:
            assert isinstance(argument.default, tuple(accepted)), name


@pytest.mark.parametrize("name", OF_FUNCTIONS)
def test_an_argument_that_is_not_in_the_list_is_a_type_error(name, run):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'node'$"):
        getattr(explaind, name)(run, INPUTS, node=3)
    with pytest.raises(TypeError, match=rf"^{name}\(\) missing a required argument: 'inputs'$"):
        getattr(explaind, name)(run)


def test_what_is_left_out_is_at_its_default(run):
    question = Question.ask(run, INPUTS)
    assert (question.keep, question.memory, question.chords) == (KEPT["keep"], 2**32, 1)
    assert (question.quadrature.nodes, question.quadrature.tolerance) == ("adaptive", 1e-3)
    assert question.function.chunk == 500


def test_a_plan_refuses_an_engine_as_attribute_does(run):
    for ask in (explaind.plan, explaind.attribute):
        with pytest.raises(QuestionError, match="there is no such engine"):
            ask(run, INPUTS, engine="cluster")


def test_a_plan_writes_nothing(run, tmp_path):
    explaind.plan(run, INPUTS, nodes=1, out=tmp_path / "result.zarr", progress=False)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True, "all"])
def test_no_samples_make_no_chunk(run, chunk):
    with pytest.raises(QuestionError, match="chunk is no number of samples"):
        explaind.attribute(run, INPUTS, chunk=chunk)


def test_an_entry_that_a_function_has_itself_stands_for_the_lists(run):
    @spelled_out
    def ask(**question: Unpack[AttributionArguments]) -> int:
        """Ask.

        Args:
            memory: is cheap.
            **question: in short,
                and at length.

        Returns:
            An answer.
        """
        return len(question)

    assert ask() == len(OF_FUNCTIONS["attribute"])
    assert ask.__doc__.count("memory: ") == 1
    assert "at length" not in ask.__doc__
    assert re.search(r"\n            out: a zarr folder(.|\n)*\n\n        Returns:", ask.__doc__)


CALLS = """
from typing import Any
import explaind_core as explaind

def calls(run: explaind.Run, inputs: Any) -> None:
    explaind.attribute(run, inputs, keep=("step",), nodes=2, out="result.zarr")
    explaind.plan(run, inputs, chords=2, engine="local")
    explaind.similarity(run, inputs, per="layer", memory=2**30)
    explaind.attribute(run, inputs, node=2)
    explaind.attribute(run, inputs, tolerance="small")
    explaind.plan(run, inputs, chords="two")
    explaind.similarity(run, inputs, keep=("step",))
    explaind.plan_similarity(run, inputs, nodes=None)
    explaind.kernel_slices(run, inputs, max_nodes="many")
    explaind.parameter_importance(run, inputs, keep=("step",))
    explaind.attribute(run, inputs).kernels()
"""


@pytest.mark.slow
def test_a_type_checker_checks_calls(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--cache-dir",
        str(tmp_path / "cache"),
        str(tmp_path / "calls.py"),
    ]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    lines = sorted(int(line.split(":")[1]) for line in told.splitlines() if "calls.py:" in line and "error" in line)
    assert lines == [9, 10, 11, 12, 13, 14, 15], told

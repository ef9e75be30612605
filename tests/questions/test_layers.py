"""Which parameters make a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core.errors import LayerError
from explaind_core.questions.layers import resolve_layers
from explaind_core.run.run import ParameterInfo
from explaind_core.testing import record_example

SHAPES = {
    "scale": (),
    "encoder.0.weight": (3, 2),
    "encoder.0.bias": (3,),
    "encoder.1.weight": (3, 3),
    "encoder2.weight": (2, 2),
    "head.weight": (4, 3),
}
PARAMETERS = {n: ParameterInfo(torch.Size(shape), torch.float32, True) for n, shape in SHAPES.items()}


def resolve(spec) -> dict[str, list[str]]:
    """Layer -> its parameters, ``(rest)`` included, for a spec without slices."""
    layers, rest = resolve_layers(spec, PARAMETERS)
    everything = [*layers, *([rest] if rest else [])]
    assert all(mask is None for layer in everything for mask in layer.masks.values())
    return {layer.name: list(layer.masks) for layer in everything}


def refused(spec) -> LayerError:
    with pytest.raises(LayerError) as error:
        resolve_layers(spec, PARAMETERS)
    return error.value


def test_by_default_a_layer_is_a_module_that_owns_parameters():
    assert resolve(None) == {
        "(root)": ["scale"],
        "encoder.0": ["encoder.0.weight", "encoder.0.bias"],
        "encoder.1": ["encoder.1.weight"],
        "encoder2": ["encoder2.weight"],
        "head": ["head.weight"],
    }


def test_a_prefix_matches_whole_path_parts():
    assert resolve(["encoder"])["encoder"] == ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight"]


def test_a_prefix_may_be_one_parameter():
    assert resolve(["head.weight", "scale"]) == {
        "head.weight": ["head.weight"], "scale": ["scale"],
        "(rest)": ["encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder2.weight"],
    }  # fmt: skip


def test_one_prefix_needs_no_list():
    assert resolve("encoder") == resolve(["encoder"])


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.bias", ["encoder.0.bias"]),
        ("encoder*.weight", ["encoder.0.weight", "encoder.1.weight", "encoder2.weight"]),
        ("encoder.?.weight", ["encoder.0.weight", "encoder.1.weight"]),
        ("encoder.[1-9].*", ["encoder.1.weight"]),
    ],
)
def test_a_pattern_matches_whole_parameter_names(pattern, names):
    assert resolve({"layer": pattern})["layer"] == names
    assert resolve([pattern])[pattern] == names


def test_a_layer_may_join_several_patterns():
    assert resolve({"ends": ["encoder.0", "head"]})["ends"] == ["encoder.0.weight", "encoder.0.bias", "head.weight"]


def test_what_no_layer_names_is_the_rest():
    assert resolve(["encoder", "scale"])["(rest)"] == ["encoder2.weight", "head.weight"]


def test_nothing_is_left_where_all_is_named():
    assert resolve_layers(["scale", "encoder", "encoder2", "head"], PARAMETERS)[1] is None


def test_layers_keep_the_order_in_which_they_are_named():
    assert list(resolve(["head", "scale", "encoder"])) == ["head", "scale", "encoder", "(rest)"]


def test_a_slice_is_a_mask_and_the_rest_is_its_complement():
    layers, rest = resolve_layers({"unit": {"head.weight": 2, "encoder.0.*": slice(1, 3)}}, PARAMETERS)
    masks = layers[0].masks
    assert masks["head.weight"].nonzero().tolist() == [[2, 0], [2, 1], [2, 2]]
    assert masks["encoder.0.bias"].tolist() == [0, 1, 1]
    assert masks["encoder.0.weight"].tolist() == [[0, 0], [1, 1], [1, 1]]
    assert rest is not None
    assert rest.masks["encoder2.weight"] is None
    for name, mask in masks.items():
        assert torch.equal(mask + rest.masks[name], torch.ones(SHAPES[name]))


def test_disjoint_slices_of_one_parameter_are_layers():
    layers, rest = resolve_layers(
        {"left": {"head.weight": (slice(None), 0)}, "right": {"head.weight": (slice(None), slice(1, None))}}, PARAMETERS
    )
    assert torch.equal(layers[0].masks["head.weight"] + layers[1].masks["head.weight"], torch.ones(4, 3))
    assert rest is not None
    assert "head.weight" not in rest.masks


def test_the_share_of_an_update_is_zero_outside_the_slices():
    layers, rest = resolve_layers({"unit": {"head.weight": (0, 1)}}, PARAMETERS)
    update = {n: torch.randn(shape, dtype=torch.float64) for n, shape in SHAPES.items()}
    assert rest is not None
    share, left = layers[0].share(update), rest.share(update)
    assert list(share) == ["head.weight"]
    assert share["head.weight"].nonzero().tolist() == [[0, 1]]
    assert all(torch.equal(left[n] + share.get(n, 0), update[n]) for n in update)


def test_a_share_leaves_out_parameters_that_were_not_updated():
    layers, _ = resolve_layers(["encoder"], PARAMETERS)
    assert list(layers[0].share({"encoder.0.bias": torch.zeros(3)})) == ["encoder.0.bias"]


@pytest.mark.parametrize(
    "spec",
    [
        {"a": "encoder", "b": "*.bias"},
        {"a": "head", "b": {"head.weight": 0}},
        {"a": {"head.weight": 0}, "b": {"head.weight": (slice(None), 0)}},
    ],
    ids=["names", "a slice of a whole", "slices that cross"],
)
def test_layers_that_overlap_are_refused(spec):
    error = refused(spec)
    assert error.what == "layers overlap: their shares would be counted twice"
    assert error.got == ["a", "b"]
    assert error.where in ("parameter 'encoder.0.bias'", "parameter 'head.weight'")
    assert error.remedy == "make the layers disjoint, or ask twice"


@pytest.mark.parametrize("pattern", ["enc", "decoder", "encoder.0.w", "*.gain", "", "encoder."])
def test_a_layer_that_matches_nothing_is_refused(pattern):
    error = refused({"layer": ["head", pattern]})
    assert error.what == "the layer 'layer' matches no parameter"
    assert error.where == f"pattern {pattern!r}"
    assert error.got == pattern
    assert all(name in error.expected for name in SHAPES)
    assert "whole path parts" in error.remedy


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (slice(2, 2), "a slice of the layer 'unit' is empty"),
        (slice(9, 12), "a slice of the layer 'unit' is empty"),
        (4, "a slice of the layer 'unit' does not fit: index 4 is out of bounds"),
        ((0, 0, 0), "a slice of the layer 'unit' does not fit: too many indices"),
        ("first", "a slice of the layer 'unit' does not fit"),
    ],
)
def test_a_slice_that_does_not_fit_is_refused(where, what):
    error = refused({"unit": {"head.weight": where}})
    assert error.what.startswith(what)
    assert (error.where, error.expected, error.got) == ("parameter 'head.weight'", (4, 3), where)


def test_two_layers_of_the_same_name_are_refused():
    assert refused(["head", "encoder", "head"]).what == "two layers have the same name"


@pytest.mark.parametrize("spec", [[], {}])
def test_no_layer_at_all_is_refused(spec):
    error = refused(spec)
    assert error.what == "no layer is named"
    assert error.remedy == "leave layers out, or name at least one"


@pytest.mark.parametrize("value", [[], {}])
def test_a_layer_of_nothing_is_refused(value):
    assert refused({"empty": value}).what == "the layer 'empty' names no parameter"


@pytest.mark.parametrize("value", [3, None, [3]])
def test_what_names_no_layer_is_refused(value):
    error = refused({"layer": value})
    assert error.what == "the layer 'layer' is neither a prefix, a pattern nor slices"
    assert error.got == value


# ------------------------------------------------------------------ types of modules
class Tied(nn.Module):
    """The embedding is the output layer, too; and a layer owns another one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(5, 3), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(()))


def of_types(spec, model=None) -> dict[str, list[str]]:
    model = Tied() if model is None else model
    parameters = {n: ParameterInfo(p.shape, p.dtype, True) for n, p in model.named_parameters()}
    layers, rest = resolve_layers(spec, parameters, model)
    return {layer.name: list(layer.masks) for layer in [*layers, *([rest] if rest else [])]}


def test_a_type_stands_for_what_modules_of_it_own():
    """A tied weight is known by its first name, whichever of its modules is meant."""
    assert of_types([nn.Linear, nn.LayerNorm]) == {
        "Linear": ["embedding.weight", "inner.0.weight", "inner.0.bias"],
        "LayerNorm": ["inner.1.weight", "inner.1.bias"],
        "(rest)": ["scale"],
    }
    assert of_types(nn.Embedding)["Embedding"] == ["embedding.weight"]
    assert of_types({"all linear": nn.Linear, "rest": ["inner.1", "scale"]}) == {
        "all linear": ["embedding.weight", "inner.0.weight", "inner.0.bias"],
        "rest": ["inner.1.weight", "inner.1.bias", "scale"],
    }
    assert of_types({"norms and scale": [nn.LayerNorm, "scale"]})["norms and scale"] == [
        "inner.1.weight", "inner.1.bias", "scale",
    ]  # fmt: skip


def test_a_type_stands_for_its_subclasses_and_for_what_it_owns_itself():
    assert of_types([nn.Module])["Module"] == [n for n, _ in Tied().named_parameters()]
    assert of_types({"own": Tied})["own"] == ["scale"]  # not its children's


def test_slices_of_all_modules_of_a_type():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    parameters = {n: ParameterInfo(p.shape, p.dtype, True) for n, p in model.named_parameters()}
    layers, _ = resolve_layers({"first units": {nn.Linear: 0}}, parameters, model)
    assert {n: mask.sum(1).tolist() for n, mask in layers[0].masks.items()} == {
        "0.weight": [3, 0], "1.weight": [2, 0],
    }  # fmt: skip


@pytest.mark.parametrize("model", [None, Tied()], ids=["no model", "model"])
def test_a_type_that_matches_nothing_is_refused(model):
    with pytest.raises(LayerError) as error:
        resolve_layers({"layer": ["head", nn.Conv2d]}, PARAMETERS, model)
    assert error.value.what == "the layer 'layer' matches no parameter"
    assert (error.value.where, error.value.got) == ("pattern 'Conv2d'", "Conv2d")


def test_types_that_overlap_are_refused():
    """By the tied weight."""
    with pytest.raises(LayerError, match="layers overlap") as error:
        of_types([nn.Linear, nn.Embedding])
    assert (error.value.where, error.value.got) == ("parameter 'embedding.weight'", ["Linear", "Embedding"])


@pytest.mark.parametrize("keep", [("layer", "test"), ("layer", "train"), ("layer", "parameter")])
def test_layers_by_type_are_the_layers_by_name(keep):
    run = record_example(2)
    inputs, options = torch.ones(2, 4, dtype=torch.float64), {"keep": keep, "nodes": 1, "progress": False}
    by_type = explaind.attribute(run, inputs, layers={"all": nn.Linear}, **options)
    by_name = explaind.attribute(run, inputs, layers={"all": ["0", "2"]}, **options)
    assert by_type.identical(by_name)
    assert by_type.layer.values.tolist() == ["all"]

"""The paper's CNN against a straightforward implementation of it, and the images to try it on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import explaind_core as explaind
from explaind_studies.resnet import ResNet9, generated_images
from support.attribution_oracles import assert_equal, dense, modules, record


def size(model):
    return sum(p.numel() for p in model.parameters())


def reference(model, images):
    """Every convolution written out: unfold the patches, multiply, rectify."""
    w = dict(model.named_parameters())

    def layer(x, name, kernel=3, stride=1, padding=1):
        patches = F.unfold(x, kernel, stride=stride, padding=padding)
        values = torch.einsum("oi,nip->nop", w[f"{name}.0.weight"].flatten(1), patches)
        values = (values + w[f"{name}.0.bias"][:, None]).clamp(min=0)
        side = (x.shape[2] + 2 * padding - kernel) // stride + 1
        return values.unflatten(2, (side, side))

    def residual(x, name):
        return x + layer(layer(x, f"{name}.block1"), f"{name}.block2")

    x = layer(images, "layer1")
    x = residual(layer(x, "layer2", 5, 2, 2), "residual1")
    x = layer(x, "layer3")
    x = x.unflatten(3, (8, 2)).unflatten(2, (8, 2)).amax((3, 5))
    x = layer(residual(x, "residual2"), "layer4", padding=0)
    logits = 0.2 * x.flatten(2).max(2).values @ w["head.weight"].T
    return logits - logits.exp().sum(1, keepdim=True).log()


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("classes", [2, 10])
def test_the_model_is_the_papers_resnet(width, classes):
    torch.manual_seed(width)
    model = ResNet9(width, classes).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too
    images = generated_images(4)[0].double()
    values = model(images)
    assert values.shape == (4, classes)
    # Sums of at most some hundred products, in float64.
    torch.testing.assert_close(values, reference(model, images), rtol=1e-12, atol=1e-12)


def test_five_layers_and_two_residual_blocks_of_two_convolutions():
    model = ResNet9()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [64, 128, 128, 128, 256, 256, 256, 128]
    assert [type(m).__name__ for m in model.children()].count("Residual") == 2
    assert size(model) == 2_272_512
    assert not list(model.buffers())  # no normalisation


@settings(deadline=None, max_examples=20)
@given(parameters=st.floats(1, 3e5), classes=st.integers(2, 10))
def test_a_size_may_be_asked_for(parameters, classes):
    """No neighbouring width comes nearer."""
    model = ResNet9.of_size(parameters, classes)
    width = model.layer1[0].out_channels
    others = [w for w in (width - 1, width + 1) if w > 0]
    assert model.head.out_features == classes
    assert all(abs(size(model) - parameters) <= abs(size(ResNet9(w, classes)) - parameters) for w in others)


def test_the_papers_size_is_the_default():
    assert size(ResNet9.of_size(2.3e6)) == size(ResNet9())
    assert abs(size(ResNet9()) - 2.3e6) < 0.02 * 2.3e6


def test_samples_do_not_see_each_other():
    torch.manual_seed(0)
    model, images = ResNet9(4).double(), generated_images(5)[0].double()
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=0, atol=1e-14)
    torch.testing.assert_close(alone.exp().sum(1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("width", [8, 64])
def test_the_signal_neither_dies_nor_explodes_at_the_start(width):
    torch.manual_seed(0)
    logits = ResNet9(width)(generated_images(50)[0]).detach()
    assert 0.03 < float((logits[:, 0] - logits[:, 1]).std()) < 0.5


def test_images_depend_on_the_seed_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    images, targets = generated_images(20, seed=3)
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    again = generated_images(20, seed=3)
    assert torch.equal(images, again[0])
    assert torch.equal(targets, again[1])
    assert not torch.equal(images, generated_images(20, seed=4)[0])
    assert (images.shape, images.dtype, targets.dtype) == ((20, 3, 32, 32), torch.float32, torch.int64)
    assert set(generated_images(100)[1].tolist()) == {0, 1}


def test_the_gratings_rise_to_one_side():
    """Without noise, neighbours along one diagonal are alike and along the other they are not."""
    images, targets = generated_images(200, noise=0.0)
    down = (images[:, :, 1:, 1:] - images[:, :, :-1, :-1]).square().mean((1, 2, 3))
    up = (images[:, :, 1:, :-1] - images[:, :, :-1, 1:]).square().mean((1, 2, 3))
    assert torch.equal(up < down, targets == 0)
    assert float(images.std((2, 3)).max()) < 0.75
    noisy = generated_images(200, noise=0.5)[0]
    assert 0.49 < float((noisy - images).std()) < 0.51


def test_the_classes_are_learned_by_the_network_and_by_no_linear_function():
    images, targets = generated_images(384, seed=0)
    unseen, truth = generated_images(256, seed=1)
    fitted = torch.linalg.lstsq(images.flatten(1), 2.0 * targets - 1).solution
    assert float(((unseen.flatten(1) @ fitted > 0) == truth).double().mean()) < 0.65
    torch.manual_seed(0)
    model = ResNet9(width=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-3)
    for _ in range(7):
        for ids in torch.randperm(384).split(64):
            optimizer.zero_grad()
            F.nll_loss(model(images[ids]), targets[ids]).backward()
            optimizer.step()
    assert float((model(unseen).argmax(1) == truth).double().mean()) > 0.9


def test_its_influences_by_layer_equal_the_oracle(tmp_path):
    """A narrow one, in float64; kinks do not matter, for both use the same nodes."""
    torch.manual_seed(0)
    images, targets = generated_images(8)
    run = record(
        tmp_path / "run", ResNet9(width=1).double(),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=5e-3), images.double(), targets,
        loss=torch.nn.NLLLoss(), steps=2, batch=4,
    )  # fmt: skip
    truth = dense(run, images[:2].double(), 2)
    result = explaind.attribute(run, images[:2].double(), nodes=2, progress=False)
    assert_equal(result, truth.expected(("step", "layer", "test", "output"), modules(truth), run.steps))
    assert result.sizes["layer"] == 9  # eight convolutions and the head: the nine of its name

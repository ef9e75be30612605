"""Loops whose gradient is of several calls of the model: refused at once, with a remedy that works, or recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from support.one_batch_loops import IDS, A, N, P, Y, made_by, network, one_step

TRIPLET, COSINE = nn.TripletMarginLoss(), nn.CosineEmbeddingLoss()


def nt_xent(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """SimCLR's loss of two views."""
    views = nn.functional.normalize(torch.cat([first, second]), dim=1)
    alike = (views @ views.T / 0.5).masked_fill(torch.eye(len(views), dtype=torch.bool), -1e9)
    return nn.functional.cross_entropy(alike, torch.arange(len(views)).roll(len(first)))


#: loss, how the loop calls the model, what it declares.
LOOPS = {
    "triplet": (TRIPLET, lambda model: TRIPLET(model(A), model(P), model(N)), (A, P, N)),
    "siamese": (COSINE, lambda model: COSINE(model(A), model(P), torch.ones(8)), (A, P)),
    "two views": (nt_xent, lambda model: nt_xent(model(A), model(A + 0.1)), (A, A + 0.1)),
    "twice the same": (nn.MSELoss(), lambda model: (model(A) - 2 * model(A + 0.1)).square().mean(), A),
    "real and fake": (nn.MSELoss(), lambda model: model(A).mean() - model(P).mean(), A),
    "step by step": (nn.MSELoss(), lambda model: sum(model(x).mean() for x in (A, P, N, A)), A),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_several_calls_for_one_batch_are_refused_at_the_first_step(tmp_path, name, wrapped):
    loss, value, inputs = LOOPS[name]
    model = nn.DataParallel(network()) if wrapped else network()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(errors.RecordingError, match="several calls of the model for one declared batch") as refused:
        one_step(tmp_path / "run", model, loss, lambda model: value(model).backward(), inputs)
    assert "step 1" in str(refused.value)
    assert "ModuleList" not in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["triplet", "siamese", "two views"])
def test_what_the_refusal_says_works(tmp_path, name):
    loss, value, inputs = LOOPS[name]
    with pytest.raises(errors.RecordingError) as refused:
        one_step(tmp_path / "refused", network(), loss, lambda model: value(model).backward(), inputs)
    together = made_by(refused.value.remedy, "Together")(network())
    rest = (torch.ones(8),) if name == "siamese" else ()

    def loss_of(outputs: Any, _targets: Any) -> torch.Tensor:
        return loss(*outputs, *(r[: len(outputs[0])] for r in rest))

    run = one_step(tmp_path / "run", together, loss_of, lambda model: loss_of(model(*inputs), None).backward(), inputs)
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        value(plain).backward()
        optimizer.step()
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(run.theta(2)[f"model.{key}"], parameter.detach())
    test = tuple(x[:2] for x in inputs)
    output = lambda call, x: call(x)[0]  # noqa: E731
    assert explaind.verify(run, test, output=output, progress=False).agreement > 0.999
    result = explaind.attribute(run, test, output=output, keep=("step", "train", "test"), nodes=2, progress=False)
    assert result.sizes["train"] == 8
    assert explaind.closure_error(result) < 1e-4
    if name == "two views":  # of one pair alone it is a constant
        return
    losses = explaind.attribute(
        run, test, output=explaind.Loss(None, loss_of), keep=("train", "test"), nodes=2, progress=False
    )
    assert explaind.closure_error(losses) < 1e-4


class Counted(nn.Module):
    """A loop's model that is part of what it is called by."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) + self.model(2 * x)


def in_parts(model: nn.Module) -> None:
    nn.functional.cross_entropy(torch.cat([model(x) for x in A.split(3)]), Y).backward()


def with_evaluations(model: nn.Module) -> None:
    with torch.no_grad():
        model(P)
    model(P)  # nobody asks for its gradient
    nn.functional.cross_entropy(model(A), Y).backward()
    loss = nn.functional.cross_entropy(model(P), Y)
    torch.autograd.grad(loss, list(model.parameters()))  # to be printed


def after_a_trial(model: nn.Module) -> None:
    nn.functional.cross_entropy(model(P), Y).backward()
    model.zero_grad()
    nn.functional.cross_entropy(model(A), Y).backward()


def checkpointed(model: nn.Module) -> None:
    outputs = torch.utils.checkpoint.checkpoint(model, A, use_reentrant=False)
    nn.functional.cross_entropy(outputs, Y).backward()


def accumulated(model: nn.Module) -> None:
    for x, y in zip(A.split(2), Y.split(2), strict=True):
        (nn.functional.cross_entropy(model(x), y) / 4).backward()


@pytest.mark.parametrize("backward", [in_parts, with_evaluations, after_a_trial, checkpointed, accumulated])
@pytest.mark.parametrize("make", [network, Counted])
def test_other_calls_are_no_matter(tmp_path, backward, make):
    run = one_step(tmp_path / "run", make(), nn.CrossEntropyLoss(), backward, A, Y)
    result = explaind.attribute(run, A[:2], keep=("train", "test"), nodes=2, progress=False)
    assert explaind.closure_error(result) < 1e-4


def test_a_closure_that_is_evaluated_again_calls_again(tmp_path):
    model, loss = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss) as recorder:

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(model(A), Y)
            value.backward()
            return value

        for _ in range(2):
            recorder.batch(A, Y, ids=IDS)
            optimizer.step(closure)
    assert len(explaind.open_run(tmp_path / "run", model=model).steps) > 2


# ------------------------------------------------------------------ recorded as they are
def bce(outputs: torch.Tensor, value: float) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], torch.full((len(outputs),), value))


def gan(path: Any, clear: Any, **options: Any) -> Any:
    """A discriminator that is recorded; its generator's updates call it, too."""

    def real_or_fake(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], targets)

    discriminator, generator = network(), nn.Linear(4, 4)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=0.01, betas=(0.5, 0.999))
    others = torch.optim.Adam(generator.parameters(), lr=0.01)
    with explaind.Recorder(path, discriminator, optimizer, real_or_fake, **options) as recorder:
        for _ in range(3):
            fake = generator(P)
            real_loss, fake_loss = bce(discriminator(A), 1.0), bce(discriminator(fake.detach()), 0.0)
            clear(discriminator)
            real_loss.backward()
            recorder.batch(A, torch.ones(8), ids=IDS)
            fake_loss.backward()
            if options.get("train_axis", True):
                recorder.batch(fake.detach(), torch.zeros(8), ids=IDS + 8)
            optimizer.step()
            others.zero_grad()
            bce(discriminator(fake), 1.0).backward()
            others.step()
    return explaind.open_run(path, model=discriminator, loss=real_or_fake), discriminator


CLEARED = {"set to none": lambda model: model.zero_grad(), "zeros": lambda model: model.zero_grad(set_to_none=False)}


@pytest.mark.parametrize("clear", CLEARED)
def test_a_discriminator_is_recorded_for_questions_without_the_train_axis(tmp_path, clear):
    run, model = gan(tmp_path / "run", CLEARED[clear], train_axis=False)
    assert [run.step_header(s)["calls"] for s in run.steps] == [2, 2, 2]
    for name, parameter in model.named_parameters():
        assert torch.equal(run.theta(3)[name], parameter)
    for keep in (("step", "test"), ("layer", "test"), ("step", "gradient_step", "test")):
        result = explaind.attribute(run, A[:2], keep=keep, progress=False)
        assert explaind.closure_error(result) < 1e-3
    assert explaind.verify(run, A[:2], progress=False).agreement > 0.999
    with pytest.raises(errors.RecordingError, match=r"several calls[\s\S]*keep only axes other than train"):
        explaind.attribute(run, A[:2], keep=("train", "test"), progress=False)
    carried = explaind.attribute(run, A[:2], keep=("train", "test"), unattributed="carry", progress=False)
    assert explaind.closure_error(carried) < 1e-3


@pytest.mark.parametrize("clear", CLEARED)
def test_batches_that_are_declared_one_by_one_are_one_call_each(tmp_path, clear):
    """The generator's update reaches the discriminator, too; that gradient is cleared."""
    run, _ = gan(tmp_path / "run", CLEARED[clear])
    assert len(run.steps) == 3
    assert explaind.closure_error(explaind.attribute(run, A[:2], keep=("train", "test"), progress=False)) < 1e-3
    assert all("calls" not in run.step_header(s) for s in run.steps)


def test_one_step_of_several_calls_among_others(tmp_path):
    """Only questions about that step's samples are refused."""
    model, loss = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.Recorder(tmp_path / "run", model, optimizer, loss, train_axis=False) as recorder:
        for step in (1, 2, 3):
            optimizer.zero_grad()
            value = loss(model(A), Y) + (model(P).square().mean() if step == 2 else 0)
            value.backward()
            recorder.batch(A, Y, ids=IDS)
            optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    with pytest.raises(errors.RecordingError, match="step 2"):
        explaind.attribute(run, A[:2], keep=("train", "test"), progress=False)
    before = explaind.open_run(tmp_path / "run", model=model, until=1)
    assert explaind.attribute(before, A[:2], keep=("train", "test"), progress=False).sizes["train"] == 8


def adversarial(model: nn.Module) -> None:
    """A perturbation by gradients that are cleared, then the training's own pass."""
    x = A.clone()
    for _ in range(3):
        x.requires_grad_()
        nn.functional.cross_entropy(model(x), Y).backward()
        x = (x + 0.01 * x.grad.sign()).detach()
    model.zero_grad(set_to_none=False)
    nn.functional.cross_entropy(model(A), Y).backward()


def printed_and_clipped(model: nn.Module) -> None:
    nn.functional.cross_entropy(model(A), Y).backward()
    torch.autograd.grad(nn.functional.cross_entropy(model(P), Y), list(model.parameters()))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


def failed_and_tried_again(model: nn.Module) -> None:
    def fail(_gradient: torch.Tensor) -> None:
        raise MemoryError

    outputs = model(A)
    model[0].weight.register_hook(fail).remove()
    handle = outputs.register_hook(fail)
    with pytest.raises(MemoryError):
        nn.functional.cross_entropy(outputs, Y).backward()
    handle.remove()
    nn.functional.cross_entropy(model(A), Y).backward()


def two_views(model: nn.Module) -> None:
    """As SimCLR calls its encoder: once, with both views of a batch behind each other."""
    views = model(torch.cat([A, A + 0.1])).reshape(2, 8, -1)
    (views[0] - views[1]).square().mean().backward()


@pytest.mark.parametrize("backward", [adversarial, printed_and_clipped, failed_and_tried_again, two_views])
def test_gradients_that_are_not_fed_do_not_count(tmp_path, backward):
    run = one_step(tmp_path / "run", network(), nn.CrossEntropyLoss(), backward, A, Y)
    assert len(run.steps) == 2
    assert all("calls" not in run.step_header(s) for s in run.steps)


def test_a_gradient_of_ones_own_may_be_of_several_calls(tmp_path):
    """Where gradients are computed again by a function that was given, it calls as the loop does."""
    triplet = nn.TripletMarginLoss()

    def gradient(model: nn.Module, micro: Any) -> None:
        triplet(*(model(x) for x in micro.inputs)).backward()

    backward = lambda model: triplet(model(A), model(P), model(N)).backward()  # noqa: E731
    options = {"mode": "parameters", "gradient": gradient, "train_axis": False}
    one_step(tmp_path / "run", network(), triplet, backward, (A, P, N), **options)
    run = explaind.open_run(tmp_path / "run", model=network(), loss=triplet, gradient=gradient)
    assert explaind.verify(run, A[:2], progress=False).agreement > 0.999

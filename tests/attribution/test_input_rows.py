"""Inputs that belong to no sample, or of which each sample owns some rows: against autograd over the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind_core as explaind
from explaind_core import PerRow, Shared
from explaind_core.errors import QuestionError, RecordingError

N, LR = 4, 0.3


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Masked(nn.Module):
    """Self-attention with a mask that all samples share, as long as there are samples."""

    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x, mask):
        weights = (self.q(x) @ x.transpose(1, 2)).masked_fill(~mask, -torch.inf).softmax(-1)
        return self.out((weights @ x).mean(1))


class Nodes(nn.Module):
    """Samples are the nodes of one graph: neighbours are summed along edges."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, edges):
        h = self.a(x)
        return self.b(torch.tanh(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])))


class Adjacent(nn.Module):
    """The same with a sparse adjacency."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, adjacency):
        return self.b(torch.tanh(torch.sparse.mm(adjacency, self.a(x))))


class Graphs(nn.Module):
    """Graphs batched by their nodes: features and edges of all, and whose graph each node is of."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, nodes, edges, graph):
        h = torch.tanh(self.a(nodes))
        h = h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        return self.b(h.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, h))


class Bags(nn.Module):
    """Bags of tokens, one behind the other, with the offsets where each begins."""

    def __init__(self):
        super().__init__()
        self.e, self.b = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, tokens, offsets):
        bag = torch.bucketize(torch.arange(len(tokens)), offsets, right=True) - 1
        h = self.e(tokens)
        return self.b(torch.tanh(h.new_zeros(len(offsets), 4).index_add(0, bag, h)))


EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])
ADJACENCY = torch.sparse_coo_tensor(EDGES, torch.ones(5, dtype=torch.float64), (N, N), check_invariants=True).coalesce()
GRAPH = torch.tensor([0, 0, 1, 2, 2, 2, 3])
INSIDE = torch.tensor([[0, 3, 4, 5], [1, 4, 5, 3]])
TOKENS, OFFSETS = torch.tensor([1, 2, 3, 1, 1, 6, 0, 2]), torch.tensor([0, 2, 3, 6])
BAG = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3])

#: name -> (model, inputs as the model takes them, inputs as they are declared)
CASES = {
    "a mask": (Masked, (seeded(N, N, 3), torch.ones(N, N).tril().bool()), lambda x, m: (x, Shared(m))),
    "edges between samples": (Nodes, (seeded(N, 3), EDGES), lambda x, e: (x, Shared(e))),
    "a sparse adjacency": (Adjacent, (seeded(N, 3), ADJACENCY), lambda x, a: (x, Shared(a))),
    "graphs by their nodes": (
        Graphs, (seeded(7, 3), INSIDE, GRAPH), lambda x, e, g: (PerRow(x, g), Shared(e), PerRow(g, g))
    ),
    "bags by their tokens": (Bags, (TOKENS, OFFSETS), lambda t, o: (PerRow(t, BAG), o)),
    "by keyword": (
        Masked, {"x": seeded(N, N, 3), "mask": torch.ones(N, N).tril().bool()},
        lambda x, mask: {"x": x, "mask": Shared(mask)},
    ),
}  # fmt: skip


def declared(inputs, how):
    return how(**inputs) if isinstance(inputs, dict) else how(*inputs)


def call(model, inputs):
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def recorded(path, name, **options):
    make, inputs, how = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer, targets = torch.optim.SGD(model.parameters(), lr=LR), torch.arange(N) % 2
    terms = F.cross_entropy(call(model, inputs), targets, reduction="none") / N
    shares = [torch.autograd.grad(t, list(model.parameters()), retain_graph=True, allow_unused=True) for t in terms]
    with explaind.Recorder(path, model, optimizer, nn.CrossEntropyLoss(), **options) as recorder:
        F.cross_entropy(call(model, inputs), targets).backward()
        recorder.batch(declared(inputs, how), targets, ids=range(N))
        optimizer.step()
    run = explaind.open_run(path, model=model, loss=nn.CrossEntropyLoss())
    return run, model, before, shares


def brute_force(model, before, shares, inputs):
    """[train, test, output] of one step at t = 0."""
    for n, p in model.named_parameters():
        p.data.copy_(before[n])
    f, parameters = call(model, inputs), list(model.parameters())
    kernel = torch.zeros(N, *f.shape, dtype=torch.float64)
    for x in range(f.shape[0]):
        for j in range(f.shape[1]):
            rows = torch.autograd.grad(f[x, j], parameters, retain_graph=True, allow_unused=True)
            for k, share in enumerate(shares):
                pairs = [(a, b) for a, b in zip(rows, share, strict=True) if a is not None and b is not None]
                kernel[k, x, j] = -LR * sum(float((a * b).sum()) for a, b in pairs)
    return kernel


@pytest.mark.parametrize("strategy", ["adjoint", "features"])
@pytest.mark.parametrize("mode", ["steps", "snapshots"])
@pytest.mark.parametrize("name", CASES)
def test_shares_are_those_of_the_whole_batch(tmp_path, name, mode, strategy):
    run, model, before, shares = recorded(tmp_path / "run", name, mode=mode)
    _, inputs, how = CASES[name]
    result = explaind.attribute(
        run, declared(inputs, how), keep=("train", "test", "output"), strategy=strategy, nodes="left", progress=False
    )
    expected = brute_force(model, before, shares, inputs)
    assert abs(torch.from_numpy(result.kernel.values) - expected).max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("strategy", ["forward", "reverse"])
@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_the_whole_batch(tmp_path, name, strategy):
    run, model, before, shares = recorded(tmp_path / "run", name)
    _, inputs, how = CASES[name]
    given = declared(inputs, how)
    ask = {"keep": ("test", "output"), "strategy": strategy, "nodes": "left", "progress": False}
    result = explaind.attribute(run, given, **ask)
    expected = brute_force(model, before, shares, inputs).sum(0)
    assert abs(torch.from_numpy(result.kernel.values) - expected).max() <= 1e-13 * expected.abs().max()
    some = explaind.attribute(run, given, **ask, test=[2, 0])  # of the same batch
    assert abs(some.kernel.values - result.kernel.values[[2, 0]]).max() <= 1e-15
    assert abs(some.final.values - result.final.values[[2, 0]]).max() <= 1e-15


def test_what_was_said_is_kept(tmp_path):
    run, *_ = recorded(tmp_path / "run", "graphs by their nodes")
    (micro,) = run.batch(1).micro
    assert micro.rows.shared == {1}
    assert {i: o.tolist() for i, o in micro.rows.owners.items()} == {0: GRAPH.tolist(), 2: GRAPH.tolist()}
    assert torch.equal(micro.inputs[0], seeded(7, 3))


def test_a_row_of_no_sample_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Graphs().double()
    with explaind.Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1)) as recorder:
        nodes = (PerRow(seeded(7, 3), GRAPH), Shared(INSIDE), PerRow(GRAPH, GRAPH))
        with pytest.raises(RecordingError, match="Shared") as refused:
            recorder.batch((seeded(7, 3), INSIDE, GRAPH), None, ids=range(N))
        assert "PerRow" in str(refused.value)
        with pytest.raises(QuestionError, match="a row belongs to a sample that is not in the batch"):
            recorder.batch(nodes, None, ids=range(N - 1))
        recorder.discard_batch()


@pytest.mark.parametrize("owners", [torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([-1, 0])])
def test_owners_are_one_position_per_row(owners):
    with pytest.raises(QuestionError, match="whose sample each row is"):
        PerRow(torch.zeros(2, 3), owners)


def test_test_inputs_of_different_lengths_name_the_ways_to_say_it(tmp_path):
    run, *_ = recorded(tmp_path / "run", "edges between samples")
    with pytest.raises(QuestionError, match="not a batch") as refused:
        explaind.attribute(run, (seeded(N, 3), EDGES), progress=False)
    assert "explaind.Shared" in str(refused.value)


def test_a_graph_of_more_nodes_than_pass_together(tmp_path):
    """600 nodes in a ring: no part of them passes without the others."""
    torch.manual_seed(0)
    model, count = Nodes().double(), 600
    x, ring = seeded(count, 3), torch.stack([torch.arange(count), torch.arange(count).roll(300)])
    targets, optimizer = torch.arange(count) % 2, torch.optim.SGD(model.parameters(), lr=LR)
    with explaind.Recorder(tmp_path / "run", model, optimizer, nn.CrossEntropyLoss()) as recorder:
        F.cross_entropy(model(x, ring), targets).backward()
        recorder.batch((x, Shared(ring)), targets, ids=range(count))
        optimizer.step()
    run = explaind.open_run(tmp_path / "run", model=model)
    result = explaind.attribute(run, (x, Shared(ring)), keep=("test", "output"), nodes=4, progress=False)
    assert abs(torch.from_numpy(result.final.values) - model(x, ring).detach()).max() <= 1e-14
    assert explaind.verify(run, (x, Shared(ring)), progress=False).agreement == 1.0

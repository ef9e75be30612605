"""Damages stored files at random and asks what becomes of it: nothing, or an error that names the file.

Small runs are recorded. In every round one file of one of them is damaged (a bit, some bytes, a block of zeros, cut
off, extended, deleted, swapped with another, replaced by the same file of another run), everything is read and an
attribution is made. The outcome must be identical results or a StoreError that names the file. Then the run is opened
with ``damaged=True``, and every step whose own file is intact must still be read.

    python benchmarks/damage.py [ROUNDS [SEED]]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import explaind_core as explaind
from explaind_core import trees
from explaind_core.errors import StoreError
from explaind_core.store import RunStore, damages

STEPS = 6


# ------------------------------------------------------------------ runs
def perceptron() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).double()


def normalised() -> nn.Module:
    """Two layers with running statistics between them."""
    return nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).double()


Make = Callable[[Any], torch.optim.Optimizer]
KINDS: dict[str, tuple[Callable[[], nn.Module], Make, dict[str, Any], int]] = {
    "AdamW": (perceptron, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), {}, 1),
    "SGD, buffers, micro-batches": (normalised, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {}, 2),
    "AdamW, snapshots, no compression": (
        perceptron,
        lambda p: torch.optim.AdamW(p, lr=0.01),
        {"snapshot_every": 2, "compression": None},
        1,
    ),
}


def record(path: Path, kind: str, seed: int) -> nn.Module:
    """Record a small run; the model is returned."""
    make_model, make_optimizer, options, parts = KINDS[kind]
    torch.manual_seed(seed)
    model, loss = make_model(), nn.CrossEntropyLoss()
    optimizer = make_optimizer(model.parameters())
    inputs, targets = torch.randn(32, 8, dtype=torch.float64), torch.randint(3, (32,))
    with explaind.Recorder(path, model, optimizer, loss, train_size=32, **options) as recorder:
        for _ in range(STEPS):
            optimizer.zero_grad()
            for ids in torch.randperm(32)[:8].chunk(parts):
                (loss(model(inputs[ids]), targets[ids]) / parts).backward()
                recorder.batch(inputs[ids], targets[ids], ids=ids, weight=1 / parts)
            optimizer.step()
            recorder.log(norm=sum(float(p.detach().norm()) for p in model.parameters()))
    return model


# ------------------------------------------------------------------ what a run holds
def pieces(run: explaind.Run) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """All that can be read: name, step (0: none), and how."""
    yield "theta", 0, lambda: run.theta(0)
    for s in run.steps:
        yield "theta", s, lambda s=s: run.theta(s)
        yield "gradients", s, lambda s=s: run.gradients(s)
        yield "hyper", s, lambda s=s: (run.hyper(s), run.gradient_factor(s), run.sample_ids(s))
        yield "buffers", s, lambda s=s: run.buffers(s)
        yield "batch", s, lambda s=s: [[m.ids, m.inputs, m.targets, m.weight] for m in run.batch(s).micro]
    yield "metrics", 0, lambda: {n: torch.from_numpy(v.values) for n, v in run.metrics.items()}
    yield "states", 0, lambda: {str(s): run.optimizer_state(s) for s in run.snapshots()}
    yield "attribution", 0, lambda: attribution(run)


def attribution(run: explaind.Run) -> dict[str, Tensor]:
    """A small one: shares of layers and steps, which need parameters, gradients and states."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 8, dtype=torch.float64)
    result = explaind.attribute(run, inputs, keep=("step", "layer"), nodes=1, progress=False)
    return {name: torch.from_numpy(result[name].values) for name in ("kernel", "regularization", "residual")}


def same(a: Any, b: Any) -> bool:
    """Whether two pieces are the same, bit by bit."""
    first, second = trees.leaves(a), trees.leaves(b)
    shape = [repr(trees.map_tensors(lambda t: (t.dtype, t.shape), tree)) for tree in (a, b)]
    return shape[0] == shape[1] and all(map(torch.equal, first, second))


# ------------------------------------------------------------------ damage
def flip_bit(data: bytearray, rng: random.Random) -> bytearray:
    """One bit."""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def flip_bytes(data: bytearray, rng: random.Random) -> bytearray:
    """Up to 64 bytes in a row."""
    begin = rng.randrange(len(data))
    for at in range(begin, min(begin + rng.randint(1, 64), len(data))):
        data[at] ^= rng.randint(1, 255)
    return data


def zero_block(data: bytearray, rng: random.Random) -> bytearray:
    """A block, as a lost sector leaves it."""
    begin = rng.randrange(len(data))
    end = min(begin + rng.choice([16, 64, 512, 4096]), len(data))
    data[begin:end] = bytes(end - begin)
    return data


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    """Cut off anywhere."""
    return data[: rng.randrange(len(data))]


def extend(data: bytearray, rng: random.Random) -> bytearray:
    """Some bytes behind the end."""
    return data + rng.randbytes(rng.randint(1, 100))


CHANGES = {"a bit": flip_bit, "some bytes": flip_bytes, "zeros": zero_block, "cut off": truncate, "extended": extend}
DAMAGES = (*CHANGES, "deleted", "swapped", "of another run")


def damage(kind: str, run: Path, other: Path, rng: random.Random) -> list[Path]:
    """Damage one file, or swap two; returns which."""
    files = sorted(p for p in run.rglob("*") if p.is_file())
    # As many manifests, logs and the like as steps and batches: there are few of them.
    folder = rng.choice(sorted({p.parent for p in files}))
    target = rng.choice([p for p in files if p.parent == folder])
    if kind in CHANGES:
        target.write_bytes(CHANGES[kind](bytearray(target.read_bytes()), rng))
    elif kind == "deleted":
        target.unlink()
    elif kind == "swapped":
        second = rng.choice([p for p in files if p != target])
        first_bytes, second_bytes = target.read_bytes(), second.read_bytes()
        target.write_bytes(second_bytes)
        second.write_bytes(first_bytes)
        return [target, second]
    else:
        foreign = other / target.relative_to(run)
        if not foreign.exists():  # a batch: its name tells its content
            foreign = rng.choice(sorted((other / "batches").iterdir()))
        target.write_bytes(foreign.read_bytes())
    return [target]


def outcome(run: Path, model: nn.Module, reference: dict[tuple[str, int], Any], damaged: list[Path]) -> str:
    """What becomes of a damaged run."""
    try:
        opened = explaind.open_run(run, model=model)
        found = {(name, s): read() for name, s, read in pieces(opened)}
    except StoreError as error:
        words = "error names the file" if any(p.name in str(error) for p in damaged) else "ERROR NAMES NO FILE"
    except Exception as error:
        return f"UNCLEAR ERROR ({type(error).__name__}: {error})"
    else:
        alike = found.keys() == reference.keys() and all(same(found[key], reference[key]) for key in reference)
        words = "identical results" if alike else "WRONG RESULT"
    return words


def lost(run: Path, model: nn.Module, reference: dict[tuple[str, int], Any], damaged: list[Path]) -> list[str]:
    """What cannot be read any more though its own file is intact; opened with ``damaged=True``."""
    try:
        opened = explaind.open_run(run, model=model, damaged=True)
    except StoreError:
        both = {"manifest.json", "start.safetensors"} <= {p.name for p in damaged}
        return [] if both else ["the run"]
    missing = [] if len(opened.steps) >= STEPS - sum(p == opened.store.step_path(STEPS) for p in damaged) else ["steps"]
    hit = {s for s in range(STEPS + 1) if opened.store.step_path(s) in damaged}
    batches, keys = {p.stem for p in damaged}, set()
    for name, s, read in pieces(opened):
        if name not in ("theta", "gradients", "hyper", "batch") or s in hit or s == 0:
            continue
        try:
            keys = {entry["key"] for entry in opened._header(s)["batches"]}
            if not same(read(), reference[name, s]):
                missing.append(f"WRONG {name} of step {s}")
        except StoreError:
            if name != "batch" or not keys & batches:
                missing.append(f"{name} of step {s}")
    return missing


def rounds(count: int, seed: int, folder: Path) -> Iterator[tuple[str, str, str, list[str], bool]]:
    """Damage ``count`` times: the run's kind, the damage, the outcome, what was lost, and if the check found it."""
    rng = random.Random(seed)
    runs = {}
    for index, kind in enumerate(KINDS):
        path, other = folder / f"run{index}", folder / f"other{index}"
        model = record(path, kind, seed=index)
        record(other, kind, seed=100 + index)
        reference = {(name, s): read() for name, s, read in pieces(explaind.open_run(path, model=model))}
        runs[kind] = path, other, model, reference, {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for turn in range(count):
        kind, sort = rng.choice(list(KINDS)), DAMAGES[turn % len(DAMAGES)]
        path, other, model, reference, contents = runs[kind]
        damaged = damage(sort, path, other, rng)
        changed = any(not p.exists() or p.read_bytes() != contents[p] for p in damaged)
        said = outcome(path, model, reference, damaged)
        gone = lost(path, model, reference, damaged)
        checked = not changed or bool(damages(RunStore(path)))
        yield kind, f"{sort} ({', '.join(sorted(_sort(p) for p in damaged))})", said, gone, checked
        for p in damaged:
            p.write_bytes(contents[p])


def _sort(path: Path) -> str:
    return {"snapshots": "snapshot", "batches": "batch"}.get(
        path.parent.name, "step" if path.stem.isdecimal() else path.name
    )


def main(count: int = 1000, seed: int = 0) -> int:
    """Print what became of every damage; the exit status is 1 if anything was wrong."""
    table: Counter[tuple[str, str]] = Counter()
    unfound: Counter[str] = Counter()
    bad: list[str] = []
    steps_lost, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for kind, sort, said, gone, checked in rounds(count, seed, Path(folder)):
            table[sort.split(" (")[0], said] += 1
            steps_lost += len(gone)
            if said.startswith(("WRONG", "ERROR", "UNCLEAR")) or gone:
                bad.append(f"{kind}: {sort}: {said}; lost: {gone}")
            if not checked:
                unfound[sort] += 1
    outcomes = sorted({said for _, said in table})
    print(f"{count} damages, {time.perf_counter() - start:.0f} s")
    print(f"{'damage':16}" + "".join(f"{said[:40]:>24}" for said in outcomes))
    for sort in DAMAGES:
        print(f"{sort:16}" + "".join(f"{table[sort, said]:24}" for said in outcomes))
    wrong = sum(n for (_, said), n in table.items() if said.startswith("WRONG"))
    unclear = sum(n for (_, said), n in table.items() if said.startswith(("UNCLEAR", "ERROR")))
    print(f"wrong results accepted: {wrong}; unclear errors: {unclear}; lost beyond the file: {steps_lost}")
    print(f"not found by check_files: {dict(unfound)}")
    print("\n".join(bad))
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

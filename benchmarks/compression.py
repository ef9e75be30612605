"""What compression gains and costs: parameters and gradients of the paper's Transformer while it trains, one core.

python benchmarks/compression.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numcodecs import blosc
from torch import nn

from explaind_core.store import pack, unpack
from explaind_studies.modular_addition import ModularTransformer, modular_addition


def tensors(steps: int = 30) -> dict[str, list[np.ndarray]]:
    """The bytes of float32 parameters and gradients, every fifth step."""
    task = modular_addition()
    torch.manual_seed(0)
    model, loss = ModularTransformer(task.vocabulary), nn.NLLLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=4.0, betas=(0.9, 0.98))
    found: dict[str, list[np.ndarray]] = {"parameters": [], "gradients": []}
    for s in range(steps):
        optimizer.zero_grad()
        loss(model(task.train_inputs), task.train_targets).backward()
        if s % 5 == 4:
            for parameter in model.parameters():
                for name, tensor in (("parameters", parameter), ("gradients", parameter.grad)):
                    found[name].append(tensor.detach().clone().reshape(-1).view(torch.uint8).numpy())
        optimizer.step()
    return found


def best(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some repeats, on a machine that others use too."""
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def main() -> None:
    """Print ratios and speeds: as the store packs, and what else blosc can do."""
    blosc.use_threads = False
    data = tensors()
    rows = {"the store's": lambda x: pack(x, 4) or bytes(x)}
    for codec in (b"lz4", b"zstd"):
        for level, shuffle, name in (
            (5, blosc.SHUFFLE, "byte"),
            (5, blosc.BITSHUFFLE, "bit"),
            (1, blosc.SHUFFLE, "byte"),
        ):
            words = f"{codec.decode()} {level}, {name} shuffle"
            rows[words] = lambda x, a=(codec, level, shuffle): blosc.compress(x.view(np.uint32), *a)
    for words, compress in rows.items():
        line = f"{words:22}"
        for kind, arrays in data.items():
            size = sum(x.nbytes for x in arrays)
            packed = [compress(x) for x in arrays]
            speed = size / best(lambda: [compress(x) for x in arrays]) / 1e6  # noqa: B023 (called at once)
            line += f"  {kind}: {sum(map(len, packed)) / size:.3f} of the size, {speed:5.0f} MB/s"
        print(line)
    pairs = [(pack(x, 4), x) for x in data["gradients"]]
    packed = [(p, x.nbytes) for p, x in pairs if p is not None]
    size = sum(n for _, n in packed)
    print(f"unpacking gradients: {size / best(lambda: [unpack(memoryview(p), n) for p, n in packed]) / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()

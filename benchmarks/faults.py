"""Kills, and what they cost: kill -9 of recordings and of attributions, at random moments or at every write in turn.

    python benchmarks/faults.py recording               200 random kills of a training of 300 steps
    python benchmarks/faults.py attribution             50 random kills of attribute(..., out=)
    python benchmarks/faults.py writes                  a short recording and short attributions, killed at every write
    python benchmarks/faults.py histories 1000 0        so many histories drawn from a seed: recordings, kills, losses
                                                        of power, calls that fail, in any order

After each kill everything that was finished must be readable and what it would have been, and another process takes
it up until the end, where it must be what it would have been without the kill, bit by bit. Exit status 0 means that
nothing was lost, nothing wrong and no error unclear. Children are forked from one process that has imported torch, and
report what they have finished through a pipe, so what a kill costs is measured. Linux only.
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from histories import histories
from killed_attributions import questions
from killed_recordings import Recording, Training
from killing import kills_at_writes, random_kills

import explaind_core as explaind


def recordings(kills: int, steps: int, modes: Sequence[str], seed: int, seeds: int) -> bool:
    """Random kills of recordings; whether nothing was lost."""
    holds = True
    for mode in modes:
        cases = [Recording(Training(seed=seed + i, steps=steps, mode=mode)) for i in range(min(seeds, kills))]
        holds &= random_kills(f"recording, mode {mode!r}: {steps} steps", cases, kills, random.Random(seed))
    return holds


def attributions(kills: int, steps: int, seed: int) -> bool:
    """Random kills of attributions; whether nothing was lost."""
    holds, draw = True, random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="explaind-kills-") as folder:
        for case in questions(Path(folder), steps):
            title = f"attribution, {case.name}: blocks of {case.block} along {case.axis}"
            holds &= random_kills(title, [case], kills // 2, draw)
    return holds


def writes(modes: Sequence[str], stride: int, steps: int = 3) -> bool:
    """Every write of a short recording of each mode, and of a short attribution of each kind."""
    holds = True
    for mode in modes:
        case = Recording(Training(steps=steps, snapshot_every=2, width=8, mode=mode))
        holds &= kills_at_writes(f"recording, mode {mode!r}: {steps} steps", case, stride)
    with tempfile.TemporaryDirectory(prefix="explaind-kills-") as folder:
        for question in questions(Path(folder), 4, 2):
            question = replace(question, block=2 if question.strategy == "forward" else 1)
            each = stride if stride == 1 else 4 * stride  # many, and much alike
            holds &= kills_at_writes(f"attribution, {question.name}: 2 blocks", question, each)
    return holds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recording", "attribution", "writes", "histories"])
    parser.add_argument("numbers", type=int, nargs="*", help="histories: how many, 1000, and the seed, 0")
    parser.add_argument("--kills", type=int, help="200 of recordings (of each mode), 50 of attributions")
    parser.add_argument("--steps", type=int, help="of the training: 300, or 60 for attributions")
    parser.add_argument("--modes", default="steps", help="of Recorder, separated by commas")
    parser.add_argument("--stride", type=int, default=1, help="writes: at every so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--seeds", type=int, default=5, help="so many different trainings")
    given = parser.parse_args()
    modes = given.modes.split(",")
    if modes != ["steps"] and "mode" not in inspect.signature(explaind.Recorder).parameters:
        parser.error("this version records in one mode only: steps")
    torch.set_num_threads(1)  # and no thread before the forks
    if given.what == "recording":
        holds = recordings(given.kills or 200, given.steps or 300, modes, given.seed, given.seeds)
    elif given.what == "attribution":
        holds = attributions(given.kills or 50, given.steps or 60, given.seed)
    elif given.what == "writes":
        holds = writes(modes, given.stride)
    else:
        holds = histories(*given.numbers or [1000])
    sys.exit(0 if holds else 1)


if __name__ == "__main__":
    main()

"""What somebody plants in a folder: links to a file that is not its own, pipes and devices."""

from __future__ import annotations

import os

import pytest

SECRET = b"kept as it is"


def symbolic(path, victim):
    path.symlink_to(victim)


def hard(path, victim):
    path.hardlink_to(victim)


def pipe(path, victim):
    os.mkfifo(path)


def device(path, victim):
    path.symlink_to("/dev/zero")


ANY = pytest.mark.parametrize("plant", [symbolic, hard, pipe, device])

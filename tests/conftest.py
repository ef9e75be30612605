"""Settings for all tests, and what several of them are given."""

from __future__ import annotations

import pytest
import torch

from support.planted import SECRET

# Thousands of tiny operations: a second thread only spins, and starves whatever else the machine does.
torch.set_num_threads(1)


@pytest.fixture
def victim(tmp_path):
    """A file of the user's, outside of every folder in question."""
    path = tmp_path / "victim"
    path.write_bytes(SECRET)
    return path

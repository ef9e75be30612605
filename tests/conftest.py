"""Settings for all tests."""

from __future__ import annotations

import torch

# Thousands of tiny operations: a second thread only spins, and starves whatever else the machine does.
torch.set_num_threads(1)

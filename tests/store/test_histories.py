"""Any history under any fault: nothing that was promised is lost, nothing read is wrong, every error is clear."""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from support.history_machine import Histories

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what a descriptor is of")
SHORT = settings(
    deadline=None,
    max_examples=20,
    derandomize=True,  # others are drawn by make faults
    stateful_step_count=8,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_histories_under_faults():
    run_state_machine_as_test(Histories, settings=SHORT)

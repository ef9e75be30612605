"""One call of the kit, one of the proof, and a recorded run."""

from explaind_qhm import QHM
from explaind_qhm.plugin import QHMRule
from hypothesis import strategies as st

import explaind_core as explaind
from explaind_core.testing import check_update_rule, record_example

UNIT = st.floats(0, 1)


def test_the_declaration_is_exact():
    hyper = {"beta": st.floats(0, 0.99), "nu": UNIT, "weight_decay": st.sampled_from([0.0, 0.1])}
    scheduled = {"lr": st.floats(1e-4, 1.0), "nu": UNIT, "beta": st.floats(0, 0.99), "weight_decay": st.floats(0, 0.2)}
    report = check_update_rule(QHMRule, QHM, hyper=hyper, scheduled=scheduled)
    assert report.one_step < 1e-14


def test_it_is_proved():
    assert explaind.symbolic.prove(QHMRule).proved


def test_a_run_is_explained():
    run = record_example(make_optimizer=QHM)  # finds the rule by the entry point
    assert run.manifest["rule"]["package"] == "explaind-qhm"
    assert max(step.error for step in explaind.decompose(run)) < 1e-14

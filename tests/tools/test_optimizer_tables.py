"""docs/optimizers.md: what the tool makes of the registry and the kept measurements."""

from __future__ import annotations

import json
from pathlib import Path

from explaind_core.errors import ConformanceError
from explaind_core.naming import qualified_name
from explaind_core.plugins import default_registry
from explaind_core.rules.trials import find_optimizer
from explaind_optimizers import AdamWRule, SGDRule
from optimizer_tables import lines_of_algebra, tables

DOCS = Path(__file__).parents[2] / "docs"


def test_the_algebra_is_short():
    assert lines_of_algebra(AdamWRule) <= 25
    assert lines_of_algebra(SGDRule) <= 20


def test_the_page_of_optimizers_is_that_of_the_registry():
    """docs/optimizers.md is what the generator makes of the registry and the kept measurements."""
    kept = json.loads((DOCS / "optimizers.json").read_text())
    page = (DOCS / "optimizers.md").read_text()
    assert page.endswith(tables(kept["rules"]))


def test_every_optimizer_was_measured():
    kept = json.loads((DOCS / "optimizers.json").read_text())["rules"]
    rules = [r.rule for r in default_registry().rules()]
    assert len({o for rule in rules for o in rule.optimizers}) >= len(rules) >= 25
    for rule in rules:
        try:
            find_optimizer(rule)
        except ConformanceError:  # SophiaG is no package; its rule has tests against a reference
            assert type(rule).__name__ == "SophiaGRule"
            continue
        found = kept[qualified_name(type(rule))]
        for family in found["kit"].values():
            assert family["cases"] >= 200
            assert family["one_step"] <= family["tolerance"]
        double = found["run"]["torch.float64"]
        assert double["steps"] == 50
        assert double["path"] < (1e-10 if "SOAP" in qualified_name(type(rule)) else 1e-13)  # see the page on SOAP
        assert found["run"]["torch.float32"]["closure"] < 1e-5

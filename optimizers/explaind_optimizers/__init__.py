"""Built-in optimizer rules, one family a file, registered like any other plugin (entry-point group ``explaind``)."""

from __future__ import annotations

import explaind_core as explaind
from explaind_optimizers.adam import AdamRule, AdamWRule
from explaind_optimizers.sgd import SGDRule

__all__ = ["AdamRule", "AdamWRule", "SGDRule", "explaind_update_rules"]


@explaind.hookimpl
def explaind_update_rules() -> list[explaind.UpdateRule]:
    """All rules of this package."""
    return [SGDRule(), AdamRule(), AdamWRule()]

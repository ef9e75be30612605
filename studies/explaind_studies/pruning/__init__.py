"""Section 4.2 and Figure 2: networks pruned by importance, and by Li et al. (2017)."""

from __future__ import annotations

from explaind_studies.pruning.setting import PAPER, QUICK, Setting
from explaind_studies.pruning.study import study

__all__ = ["PAPER", "QUICK", "Setting", "study"]

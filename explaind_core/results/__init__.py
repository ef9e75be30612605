"""A result as a Dataset: its terms, whether it closes, and how it lies on disk.

It may import store, errors, progress; it knows no run and no question.
"""

from __future__ import annotations

from explaind_core.results import result_writer
from explaind_core.results.closure import TERMS, closure_error, summed
from explaind_core.results.counts import COUNTS, totals
from explaind_core.results.result_writer import ResultWriter
from explaind_core.results.stored_result import open_result

__all__ = ["COUNTS", "TERMS", "ResultWriter", "closure_error", "open_result", "result_writer", "summed", "totals"]

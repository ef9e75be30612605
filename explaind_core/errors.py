"""Exceptions that say what was wrong, where, what was expected and got, and what to do.

Every error that the library raises on purpose is an :class:`ExplaindError`, so one ``except``
catches them all; the subclasses tell the stage that refused.
"""

from __future__ import annotations

import re

__all__ = [
    "AmbiguousRuleError",
    "CoefficientError",
    "ConformanceError",
    "DisprovedError",
    "ExplaindError",
    "InferenceError",
    "LayerError",
    "NonFiniteError",
    "PluginError",
    "ProofError",
    "QuestionError",
    "RecordingError",
    "RuleNotFoundError",
    "StoreError",
    "UnsupportedOptionError",
    "printable",
]

#: Control characters of terminals but for tab and newline, what turns the direction of writing, ends lines or cannot be
#: encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Text that may stem from a file, for a terminal: what would steer the terminal is written out.

    Args:
        text: anything; what ``str`` makes of it is printed.

    Returns:
        The text with every such character as Python writes it in a literal.

    Example:
        >>> printable("a" + chr(27) + "[2Jb")
        'a\\x1b[2Jb'
    """
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], str(text))


class ExplaindError(Exception):
    """Base of all errors of this library.

    Args:
        what: one sentence: what is wrong.
        where: the parameter, step, file or argument concerned.
        expected: what would have been right.
        got: what was found instead.
        remedy: what the reader can do about it.

    Example:
        >>> print(ExplaindError("shapes differ", where="layer 'a'", expected=(3,), got=(4,), remedy="reshape it"))
        shapes differ
          where:    layer 'a'
          expected: (3,)
          got:      (4,)
          remedy:   reshape it
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.remedy = what, where, expected, got, remedy
        rows = (("where", where), ("expected", expected), ("got", got), ("remedy", remedy))
        lines = [what, *(f"  {name + ':':<9} {value}" for name, value in rows if value is not None)]
        super().__init__(printable("\n".join(lines)))


class PluginError(ExplaindError):
    """A plugin could not be loaded, names an unknown hook, or raised."""


class RuleNotFoundError(ExplaindError):
    """No registered plugin declares a rule for this optimizer."""


class AmbiguousRuleError(ExplaindError):
    """More than one plugin declares a rule for this optimizer."""


class UnsupportedOptionError(ExplaindError):
    """The optimizer uses an option that its rule does not model."""


class CoefficientError(ExplaindError):
    """A declaration is malformed: a filter of the wrong shape, an operator that does not fit its tensor."""


class ProofError(ExplaindError):
    """A rule's declaration is not the recursion of its optimizer, or could not be proved to be."""


class DisprovedError(ProofError):
    """A term of a rule's declaration differs from its optimizer's recursion, by numbers that show it."""


class ConformanceError(ExplaindError):
    """A declaration does not explain its optimizer; carries the smallest case found, as code that runs."""


class InferenceError(ExplaindError):
    """An inferred rule explains a step worse than its bound allows."""


class RecordingError(ExplaindError):
    """The training loop did something that cannot be recorded exactly."""


class NonFiniteError(RecordingError):
    """A NaN or an infinity appeared in training."""


class StoreError(ExplaindError):
    """A run store is missing, foreign, truncated, of another version or of another model."""


class LayerError(ExplaindError):
    """A layer specification matches nothing, or two layers overlap."""


class QuestionError(ExplaindError):
    """An attribution was asked for that makes no sense, or that this version cannot answer."""

"""Where a rule stands with its proof: proved, disproved, or neither, and why."""

from __future__ import annotations

from dataclasses import dataclass

from explaind_core.errors import DisprovedError, ProofError
from explaind_core.rules import UpdateRule
from explaind_core.symbolic.proof import Proof, prove

__all__ = ["Standing", "standing"]


@dataclass(frozen=True)
class Standing:
    """What there is of a rule's proof. Only a difference that was shown disproves.

    Attributes:
        word: ``"proved"``; ``"DISPROVED"``; ``"no proof written"`` (no recursion to be proved against);
            ``"not proved (it has no closed form)"``, as the rule says; ``"NOT PROVED (and not disproved)"``: its
            recursion or its coefficients do not run on symbols, or could not be brought to one form.
        text: the proof, or why there is none, to be read.
        proof: what was proved; None where a proof was not made.
    """

    word: str
    text: str
    proof: Proof | None = None

    @property
    def proved(self) -> bool:
        """Whether the declaration was shown to be the recursion."""
        return self.proof is not None and self.proof.proved

    @property
    def disproved(self) -> bool:
        """Whether a term was shown to differ."""
        return self.word == "DISPROVED"

    @property
    def failed(self) -> bool:
        """Whether a proof was written and does not hold, disproved or not."""
        return self.disproved or self.word.startswith("NOT PROVED")


def standing(rule: UpdateRule) -> Standing:
    """Prove ``rule``, and say what came of it.

    Example:
        >>> from explaind_optimizers import AdamWRule, MuonRule
        >>> standing(AdamWRule()).word, standing(MuonRule()).word
        ('proved', 'not proved (it has no closed form)')
    """
    try:
        proof = prove(rule)
    except DisprovedError as error:
        return Standing("DISPROVED", str(error))
    except ProofError as error:
        return Standing("NOT PROVED (and not disproved)" if rule.has_recursion else "no proof written", str(error))
    return Standing("proved" if proof.proved else "not proved (it has no closed form)", str(proof), proof)

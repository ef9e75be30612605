"""Which class a run's optimizer is made of again: never on the word of a file alone.

A manifest is written by whoever can write the run. The class that it names is therefore looked for only where a rule
speaks for it (of an installed plugin, or given), or where the program itself gave an optimizer of it in this process,
and its constructor is called with nothing but options that the rule declares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from explaind_core.errors import RuleNotFoundError, StoreError
from explaind_core.naming import qualified_name
from explaind_core.rules import RegisteredRule, Registry, UpdateRule, handed_over, import_installed, is_same
from explaind_core.training_step import constructor_arguments

__all__ = ["another_rule", "check_arguments", "found_class", "speaking_rule"]


def speaking_rule(
    registry: Registry, given: UpdateRule | None, described: Mapping[str, Any], *, by_hand: bool, where: object
) -> UpdateRule | None:
    """The rule that vouches for the class of a recorded optimizer, before anything is imported or made.

    Args:
        registry: the installed plugins.
        given: the rule that explains the optimizer in place of the registered one.
        described: the optimizer, as the manifest has it.
        by_hand: whether ``given`` was passed by the program, and not made of what the manifest says. One that names no
            class speaks for any that is loaded.
        where: which run it is of, for errors.

    Returns:
        The rule; None where none names the class, and the program itself handed an optimizer of it over.

    Raises:
        StoreError: nobody vouches for the class.
        RuleNotFoundError: the run was recorded with another rule than the one that speaks for it.
    """
    name, recorded = described["optimizer"], described["rule"]["name"]
    if given is not None and name in given.optimizers:
        return given
    listing = [r for r in registry.rules() if name in r.rule.optimizers]
    named = [r for r in listing if qualified_name(type(r.rule)) == recorded]
    if named or (given is not None and listing):
        return (named or listing)[0].rule
    if handed_over(name) is not None:
        return None
    if given is not None and by_hand and not given.optimizers and loaded_class(name) is not None:
        return given
    if listing:
        raise another_rule(described["rule"], listing, where=where)
    raise StoreError(
        f"the optimizer {name} is not known here: no installed rule names it",
        where=where,
        expected="an optimizer of a registered rule",
        got=f"{name}, by {recorded} of {described['rule']['package']}",
        remedy="install the plugin that the run was recorded with; or name the optimizer yourself: import its module "
        "and pass open_run(..., rule=), or open_run(..., make_optimizer=lambda groups: ...)",
    )


def another_rule(recorded: Mapping[str, Any], found: Sequence[RegisteredRule], *, where: object) -> RuleNotFoundError:
    """What is said where an optimizer has a rule, and it is not the one that the run was recorded with.

    Args:
        recorded: the rule, as the manifest has it.
        found: the registered ones.
        where: which run it is of.

    Returns:
        The error to raise.
    """
    return RuleNotFoundError(
        "the run was recorded with another rule than the one registered for its optimizer",
        where=where,
        expected=f"{recorded['name']} of {recorded['package']}",
        got="\n            ".join(map(str, found)),
        remedy="install the plugin that the run was recorded with, or pass open_run(..., rule=)",
    )


def loaded_class(name: str) -> type[torch.optim.Optimizer] | None:
    """The optimizer class of that name that the program has imported.

    Args:
        name: qualified.

    Returns:
        The class; None where there is none.

    Example:
        >>> loaded_class("torch.optim.sgd.SGD"), loaded_class("antigravity.Optimizer")
        (<class 'torch.optim.sgd.SGD'>, None)
    """
    pending = [torch.optim.Optimizer]
    while pending:
        candidate = pending.pop()
        if qualified_name(candidate) == name:
            return candidate
        pending += candidate.__subclasses__()
    return None


def found_class(name: str, *, where: object) -> type[torch.optim.Optimizer]:
    """The class of that name: loaded already, or installed.

    Args:
        name: qualified, of an optimizer that has a :func:`speaking_rule`.
        where: which run it is of, for the error.

    Returns:
        The class.

    Raises:
        StoreError: it is not installed here.
    """
    known = handed_over(name) or loaded_class(name)
    if known is not None:
        return known
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_installed(module), attribute)
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise ImportError(f"{name} is no optimizer")
    except (ImportError, AttributeError, ValueError) as error:
        raise StoreError(
            f"the optimizer {name} is not installed here: {error}",
            where=where,
            remedy=f"install the package that provides {module.split('.')[0]!r}; the current folder is not looked at: "
            "import what lies there before opening the run",
        ) from error
    return found


def check_arguments(
    kind: type[torch.optim.Optimizer],
    rule: UpdateRule | None,
    group: Mapping[str, Any],
    *,
    explaining: bool,
    where: object,
) -> None:
    """Refuse recorded hyper-parameters that the constructor would take and the rule does not declare.

    Args:
        kind: the class.
        rule: what :func:`speaking_rule` returned; for a class that it does not name, nothing is declared.
        group: the recorded parameter group.
        explaining: whether the rule is also the one that explains the run: options then have values that it models.
        where: which run it is of, for the error.

    Raises:
        StoreError: naming the first of them.
    """
    if rule is None or not rule.optimizers:
        return
    declared = {*rule.options, *rule.fixed, *rule.attributes}
    for name, value in constructor_arguments(kind, group).items():
        fixed = rule.fixed.get(name, ()) if explaining and name not in rule.options else ()
        if name not in declared or (fixed and not any(is_same(value, known) for known in fixed)):
            raise StoreError(
                f"the run names an option of {qualified_name(kind)} that {type(rule).__name__} does not declare",
                where=where,
                expected=f"{name} in {list(fixed)}" if fixed else sorted(declared),
                got=f"{name}={str(value)[:100]}",
                remedy="if you trust it, make the optimizer yourself: open_run(..., make_optimizer=lambda groups: ...)",
            )

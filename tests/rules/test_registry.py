"""Plugins come through entry points, each is checked, and exactly one rule speaks for an optimizer."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from torch import nn

import explaind_core as explaind
from explaind_core import errors
from explaind_core.plugins import Registry
from explaind_core.rules import registry as plugins


class Rule(explaind.UpdateRule):
    optimizers = ("torch.optim.sgd.SGD",)

    def coefficients(self, step):
        return explaind.StepCoefficients(step.hyper["lr"])


class Rival(Rule):
    pass


def listing(*rules):
    """A plugin that lists these rules."""

    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            return rules

    return Plugin


def deciding(function):
    """A plugin that looks at the optimizer, and lists nothing."""

    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rule(optimizer):
            return function(optimizer)

    return Plugin


def registry(**named):
    made = Registry(discover=False)
    for name, plugin in named.items():
        made.register(plugin, name=name)
    return made


def sgd(kind=torch.optim.SGD):
    return kind([nn.Parameter(torch.ones(1))], lr=0.1)


# ------------------------------------------------------------------ discovery
def test_the_builtin_rules_come_through_the_entry_point():
    found = Registry()
    named = {str(r) for r in found.rules()}
    assert any(
        text.startswith("explaind_optimizers.sgd.SGDRule (plugin 'explaind_optimizers', explaind") for text in named
    )
    assert found.rule_for(sgd()).plugin == "explaind_optimizers"


def test_installed_plugins_are_all_loaded(monkeypatch):
    entry = EntryPoint("mine", f"{__name__}_made_up:plugin", "explaind")
    monkeypatch.setattr(EntryPoint, "load", lambda _: listing(Rule()))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "explaind" else [])
    assert Registry().rule_for(sgd()).plugin == "mine"


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: [EntryPoint("broken", "no_such_module_here", group)])
    with pytest.raises(errors.PluginError) as caught:
        Registry()
    text = str(caught.value)
    assert "the plugin 'broken' cannot be imported: ModuleNotFoundError" in text
    assert "entry point 'no_such_module_here'" in text


# ------------------------------------------------------------------ registering
def test_a_plugin_may_implement_only_the_hook_that_looks_at_the_optimizer():
    made = registry(p=deciding(lambda optimizer: Rule() if optimizer.defaults["momentum"] == 0 else None))
    assert made.rules() == ()
    assert type(made.rule_for(sgd()).rule) is Rule
    with pytest.raises(errors.RuleNotFoundError):
        made.rule_for(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9))


def test_a_hook_may_leave_out_its_argument():
    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rule():
            return Rule()

    assert type(registry(p=Plugin).rule_for(sgd()).rule) is Rule


def test_a_hook_with_an_argument_that_does_not_exist_is_refused():
    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rule(optimiser):
            return optimiser

    with pytest.raises(errors.PluginError, match=r"does not fit the specification[\s\S]*optimiser"):
        registry(p=Plugin)


def test_a_refused_plugin_leaves_the_registry_as_it_was():
    class Misspelled:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rulez():
            return []

    made = registry(good=listing(Rule()))
    for bad in (Misspelled, object()):
        with pytest.raises(errors.PluginError):
            made.register(bad, name="bad")
    assert [r.plugin for r in made.rules()] == ["good"]
    made.register(listing(Rival()), name="bad")  # the name is free again


def test_a_plugin_is_registered_once():
    plugin = listing(Rule())
    made = registry(p=plugin)
    with pytest.raises(errors.PluginError, match=r"already registered[\s\S]*plugin 'p' of registered by hand"):
        made.register(plugin, name="p")
    assert len(made.rules()) == 1


# ------------------------------------------------------------------ answers
@pytest.mark.parametrize(
    ("answer", "wording"),
    [
        ([Rule], r"'p' returned something that is not a rule[\s\S]*\(a class: return an instance\)"),
        (["SGD"], r"is not a rule[\s\S]*instances of explaind.UpdateRule[\s\S]*'SGD'"),
        (None, r"is not a rule[\s\S]*None"),
        ([[Rule()]], "is not a rule"),
    ],
)
def test_a_list_with_something_else_is_refused(answer, wording):
    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            return answer

    with pytest.raises(errors.PluginError, match=wording):
        registry(p=Plugin).rule_for(sgd())


@pytest.mark.parametrize("answer", [Rule, "SGD", [Rule()]])
def test_a_decision_that_is_no_rule_is_refused(answer):
    with pytest.raises(errors.PluginError, match=r"not a rule[\s\S]*where:    explaind_update_rule\n"):
        registry(p=deciding(lambda _: answer)).rule_for(sgd())


def test_a_plugin_that_raises_while_it_decides_is_named():
    def fail(optimizer):
        raise ZeroDivisionError("by zero")

    with pytest.raises(
        errors.PluginError, match=r"'p' raised ZeroDivisionError: by zero[\s\S]*explaind_update_rule, reg"
    ):
        registry(p=deciding(fail)).rule_for(sgd())


def test_rules_may_be_yielded_and_an_error_on_the_way_is_named():
    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            yield Rule()
            if broken:
                raise RuntimeError("out of rules")

    broken = False
    assert len(registry(p=Plugin).rules()) == 1
    broken = True
    with pytest.raises(errors.PluginError, match="'p' raised RuntimeError: out of rules"):
        registry(p=Plugin).rules()


def test_a_single_rule_needs_no_list():
    class Plugin:
        @staticmethod
        @explaind.hookimpl
        def explaind_update_rules():
            return Rule()

    assert len(registry(p=Plugin).rules()) == 1


# ------------------------------------------------------------------ exactly one
def test_two_plugins_for_one_optimizer_are_both_named():
    with pytest.raises(errors.AmbiguousRuleError) as caught:
        registry(one=listing(Rule()), two=listing(Rival())).rule_for(sgd())
    text = str(caught.value)
    assert "2 rules claim the optimizer torch.optim.sgd.SGD" in text
    assert "Rule (plugin 'one', registered by hand -)" in text
    assert "Rival (plugin 'two', registered by hand -)" in text
    assert "uninstall all of these plugins but one" in text


def test_a_listed_rule_that_a_hook_returns_again_is_one_rule():
    rule = Rule()
    assert registry(one=listing(rule), two=deciding(lambda _: rule)).rule_for(sgd()).plugin == "one"


def test_the_order_of_registration_decides_nothing():
    one, two = {"a": listing(Rule()), "b": listing(Rival())}, {"b": listing(Rival()), "a": listing(Rule())}
    assert [str(r) for r in registry(**one).rules()] == [str(r) for r in registry(**two).rules()]


def test_no_rule_at_all_says_how_to_write_one():
    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(errors.RuleNotFoundError) as caught:
        registry(p=listing(Rule())).rule_for(sgd(Mine))
    text = str(caught.value)
    assert "one of torch.optim.sgd.SGD" in text
    assert "a rule exists for its base class: " in text
    assert "subclass of explaind.UpdateRule" in text


def test_a_rule_is_found_by_its_name():
    made = registry(p=listing(Rule(), Rival()))
    name = f"{Rival.__module__}.Rival"
    assert type(made.rule_named(name).rule) is Rival
    assert made.rule_named("nobody.Knows") is None

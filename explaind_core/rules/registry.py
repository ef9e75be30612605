"""Finds exactly one rule for an optimizer among all registered plugins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import pluggy
import torch

from explaind_core.errors import AmbiguousRuleError, PluginError
from explaind_core.naming import qualified_name
from explaind_core.rules import hookspecs
from explaind_core.rules.installed import from_installed
from explaind_core.rules.missing import rule_not_found
from explaind_core.rules.rule import UpdateRule
from explaind_core.rules.trials import Trials, default_trials

__all__ = ["RegisteredRule", "Registry", "default_registry"]


@dataclass(frozen=True)
class RegisteredRule:
    """A rule and where it comes from.

    Attributes:
        rule: the rule itself.
        plugin: the name of its plugin.
        package: the distribution that brought it.
        version: of that distribution.
    """

    rule: UpdateRule
    plugin: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{qualified_name(type(self.rule))} (plugin {self.plugin!r}, {self.package} {self.version})"


class Registry:
    """The registered plugins, loaded and checked.

    Args:
        discover: load all plugins of the installed packages (entry-point group ``explaind``); what lies in the current
            folder is no installed package, unless it was installed from there.

    Raises:
        PluginError: a plugin cannot be imported, implements an unknown hook, or returns something else than rules.

    Example:
        >>> rule = Registry().rule_for(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))
        >>> type(rule.rule).__name__
        'SGDRule'
    """

    def __init__(self, *, discover: bool = True) -> None:
        self._manager = pluggy.PluginManager("explaind")
        self._manager.add_hookspecs(hookspecs)
        self._origin: dict[str, tuple[str, str]] = {}
        if discover:
            with from_installed():  # no plugin is found, or shadowed, through the folder that a process runs in
                for entry in entry_points(group=hookspecs.ENTRY_POINT_GROUP):
                    self._load(entry)

    def _load(self, entry: EntryPoint) -> None:
        package, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "unknown")
        try:
            plugin = entry.load()
        except Exception as error:
            raise PluginError(
                f"the plugin {entry.name!r} cannot be imported: {type(error).__name__}: {error}",
                where=f"{package} {version}, entry point {entry.value!r}",
                remedy=f"repair or uninstall {package}",
            ) from error
        self.register(plugin, name=entry.name, package=package, version=version)

    def register(
        self, plugin: object, *, name: str | None = None, package: str = "registered by hand", version: str = "-"
    ) -> None:
        """Add a plugin: a module or object with functions marked ``@explaind.hookimpl``.

        Args:
            plugin: the module or object.
            name: what it is called in errors; its own name by default.
            package: the distribution that it comes from.
            version: of that distribution.

        Raises:
            PluginError: it implements a hook that does not exist, implements none, or is already registered.
        """
        where = f"plugin {name!r} of {package} {version}"
        try:
            registered = self._manager.register(plugin, name=name)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            if not isinstance(error, ValueError) and self._manager.is_registered(plugin):
                self._manager.unregister(plugin)
            raise PluginError(
                f"a plugin does not fit the specification: {error}",
                where=where,
                expected=f"functions marked @explaind.hookimpl and named {' or '.join(self._hooks())}",
                remedy="compare its hook names and arguments with explaind_core.rules.hookspecs",
            ) from error
        if registered is None or not self._manager.get_hookcallers(plugin):
            self._manager.unregister(plugin)
            raise PluginError(
                "a plugin implements no hook",
                where=where,
                expected=f"at least one of {', '.join(self._hooks())}, marked @explaind.hookimpl",
                remedy="mark its functions, or remove its entry point",
            )
        self._origin[registered] = (package, version)

    @staticmethod
    def _hooks() -> tuple[str, ...]:
        return ("explaind_update_rules", "explaind_update_rule", "explaind_trials")

    def _call(self, hook: str, **arguments: object) -> Iterator[tuple[str, object]]:
        """Every plugin's own answer, with its name: one raising plugin is named, not hidden."""
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            # An implementation may leave out arguments that it does not need, as in any pluggy plugin.
            wanted = {name: arguments[name] for name in implementation.argnames}
            try:
                answer = implementation.function(**wanted)
                # A generator runs here, where its errors have a name.
                yield implementation.plugin_name, tuple(answer) if isinstance(answer, Iterator) else answer
            except Exception as error:
                raise PluginError(
                    f"the plugin {implementation.plugin_name!r} raised {type(error).__name__}: {error}",
                    where=f"{hook}, {' '.join(self._origin[implementation.plugin_name])}",
                    remedy="repair or uninstall the plugin",
                ) from error

    def _registered(self, plugin: str, hook: str, rule: object) -> RegisteredRule:
        if not isinstance(rule, UpdateRule):
            raise PluginError(
                f"the plugin {plugin!r} returned something that is not a rule",
                where=hook,
                expected="instances of explaind.UpdateRule",
                got=f"{rule!r}" + (" (a class: return an instance)" if isinstance(rule, type) else ""),
            )
        return RegisteredRule(rule, plugin, *self._origin[plugin])

    def rules(self) -> tuple[RegisteredRule, ...]:
        """All rules that the plugins list, in a stable order."""
        found = []
        for plugin, answer in self._call("explaind_update_rules"):
            if not isinstance(answer, Iterable):
                answer = (answer,)
            found += [self._registered(plugin, "explaind_update_rules", rule) for rule in answer]
        return tuple(sorted(found, key=str))

    def rule_for(self, optimizer: torch.optim.Optimizer) -> RegisteredRule:
        """The one rule that speaks for ``optimizer``.

        Raises:
            RuleNotFoundError: none does; names the nearest rules and the ways out.
            AmbiguousRuleError: several do; names them.
            PluginError: a plugin raised, or returned something else than a rule.
        """
        name = qualified_name(type(optimizer))
        rules = self.rules()
        candidates = {type(r.rule): r for r in rules if r.rule.claims(optimizer)}
        for plugin, answer in self._call("explaind_update_rule", optimizer=optimizer):
            if answer is not None:
                registered = self._registered(plugin, "explaind_update_rule", answer)
                candidates.setdefault(type(registered.rule), registered)
        if len(candidates) == 1:
            return next(iter(candidates.values()))
        if candidates:
            raise AmbiguousRuleError(
                f"{len(candidates)} rules claim the optimizer {name}",
                expected="exactly one",
                got="\n            ".join(sorted(map(str, candidates.values()))),
                remedy="uninstall all of these plugins but one",
            )
        raise rule_not_found(optimizer, {name: str(r) for r in rules for name in r.rule.optimizers})

    def trials_for(self, rule: UpdateRule) -> tuple[Trials, ...]:
        """How trainings are drawn to check ``rule``: as a plugin says, or guessed from the optimizer's constructor.

        Raises:
            PluginError: a plugin raised.
            ConformanceError: nothing is said, and the optimizer is not installed.
        """
        for _, answer in self._call("explaind_trials", rule=rule):
            if answer is not None:
                found: Iterable[Trials] = answer  # type: ignore[assignment]
                return tuple(found)
        return (default_trials(rule),)

    def rule_named(self, name: str) -> RegisteredRule | None:
        """The listed rule whose class is called ``name`` (qualified), None if there is none."""
        return next((r for r in self.rules() if qualified_name(type(r.rule)) == name), None)


@cache
def default_registry() -> Registry:
    """The registry of all installed plugins, loaded once per process."""
    return Registry()

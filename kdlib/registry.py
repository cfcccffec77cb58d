"""The registry: who brings which plugin, and what to say of those that do not work."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from kdlib import hooks
from kdlib.errors import KdlibError, PluginError, RecipeError, did_you_mean
from kdlib.settings import FACTS, Strict, read_signature


class PluginWarning(UserWarning):
    """A plugin is broken and was left out."""


@dataclass(frozen=True)
class Plugin:
    """One registered class or function."""

    kind: str
    """model, dataset, features, source, point or scorer."""
    name: str
    package: str
    """The name under which its package was registered."""
    build: Callable[..., Any]
    live: tuple[str, ...]
    settings: type[Strict]

    @property
    def label(self) -> str:
        """How errors call it: what it is, who brought it, and by which hook."""
        return f"{self.kind} '{self.name}' of plugin '{self.package}', hook {hooks.HOOKS[self.kind]}"


class Registry:
    """Plugins by kind and name.

    A plugin that fails to load is left out with one warning and named in every "no such name" error; with
    ``KDLIB_STRICT=1`` it raises. A name that two packages claim belongs to neither.

    Args:
        found: entry points to load, sorted by name; those named in ``KDLIB_DISABLE`` (``*``: all) are passed over.
    """

    def __init__(self, found: Iterable[EntryPoint] = ()) -> None:
        self.packages: dict[str, ModuleType | object] = {}
        self.broken: dict[str, str] = {}
        self._claims: dict[tuple[str, str], list[Plugin]] = {}
        self._manager = pluggy.PluginManager("kdlib")
        self._manager.add_hookspecs(hooks)
        self._load("kdlib", lambda: import_module("kdlib._builtin"))
        disabled = {name.strip() for name in os.environ.get("KDLIB_DISABLE", "").split(",")}
        for name, points in itertools.groupby(sorted(found, key=_by_name), key=lambda point: point.name):
            if "*" not in disabled and name not in disabled:
                self._load(name, functools.partial(_only, list(points)))

    def register(self, plugin: ModuleType | object, name: str | None = None) -> None:
        """Add a module or object with hook implementations. It raises at once if it is broken.

        Raises:
            PluginError: the plugin is broken, or of that name there is one already.
        """
        self._add(name or str(getattr(plugin, "__name__", type(plugin).__name__)), plugin)

    def get(self, kind: str, name: str) -> Plugin:
        """Return a plugin.

        Raises:
            PluginError: no package brings it, or more than one does.
        """
        claims = self._claims.get((kind, name), [])
        if len(claims) == 1:
            return claims[0]
        if claims:
            packages = " and ".join(f"'{claim.package}'" for claim in claims)
            raise PluginError(
                f"The {kind} '{name}' is claimed by {packages}; neither is used. "
                f"Leave one out: KDLIB_DISABLE={claims[-1].package}."
            )
        message = f"No {kind} named '{name}'.{did_you_mean(name, self.names(kind))}"
        message += " One of your own: --plugin MODULE, or kdlib.register."
        for package, reason in self.broken.items():
            message += f"\nThe plugin '{package}' is broken and might have brought it: {reason}"
        raise PluginError(message)

    def names(self, kind: str) -> list[str]:
        """Return the names of one kind that can be used."""
        return sorted(name for (of, name), claims in self._claims.items() if of == kind and len(claims) == 1)

    def plugins(self) -> list[Plugin]:
        """Return every plugin that can be used, by kind and name."""
        return [self.get(kind, name) for kind in hooks.HOOKS for name in self.names(kind)]

    def clashes(self) -> list[tuple[str, str, list[str]]]:
        """Return (kind, name, packages) of the names that more than one package claims."""
        return [(*key, [c.package for c in claims]) for key, claims in sorted(self._claims.items()) if len(claims) > 1]

    def _load(self, name: str, load: Callable[[], Any]) -> None:
        try:
            self._add(name, load())
        except (Exception, SystemExit) as error:
            if os.environ.get("KDLIB_STRICT") == "1":
                raise PluginError(f"The plugin '{name}' is broken: {_reason(error)}") from error
            self.broken[name] = _reason(error)
            warnings.warn(f"The plugin '{name}' is broken and left out: {_reason(error)}", PluginWarning, stacklevel=4)

    def _add(self, name: str, plugin: ModuleType | object) -> None:
        if name in self.packages:
            raise PluginError(f"There is a plugin named '{name}' already.")
        try:
            self._manager.register(plugin, name)
            claims = list(self._claims_of(name, plugin))
        except Exception as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(name=name)
            if isinstance(error, PluginError):
                raise
            raise PluginError(_reason(error)) from error
        self.packages[name] = plugin
        for claim in claims:
            self._claims.setdefault((claim.kind, claim.name), []).append(claim)

    def _claims_of(self, package: str, plugin: Any) -> Iterable[Plugin]:
        callers = self._manager.get_hookcallers(plugin) or []
        for caller in callers:
            if not caller.has_spec():
                raise PluginError(f"there is no hook '{caller.name}'.{did_you_mean(caller.name, hooks.HOOKS.values())}")
        if not callers:
            raise PluginError(
                f"it implements no hook; mark one with @kdlib.hookimpl ({', '.join(hooks.HOOKS.values())})"
            )
        for kind, hook in hooks.HOOKS.items():
            for implementation in getattr(self._manager.hook, hook).get_hookimpls():
                if implementation.plugin is plugin:
                    for name, build in _brought(hook, implementation.function).items():
                        yield Plugin(kind, name, package, build, *read_signature(kind, name, build))


def build(plugin: Plugin, settings: Strict, live: Mapping[str, Any], facts: Mapping[str, Any], at: str) -> Any:
    """Make the object of a plugin.

    Args:
        plugin: what to build.
        settings: its validated settings.
        live: the objects that its positional arguments may ask for.
        facts: ``classes``, ``channels`` and ``rate`` of the data, for models and features.
        at: where the block stands in the recipe, for messages.
    """
    arguments = {name: getattr(settings, name) for name in type(settings).model_fields}
    if plugin.kind in ("model", "features"):
        arguments = _filled(arguments, facts, at)
    wanted = inspect.signature(plugin.build).parameters
    missing = [
        name for name in plugin.live if live.get(name) is None and wanted[name].default is inspect.Parameter.empty
    ]
    if missing:
        raise RecipeError(f"{at}: the {plugin.kind} '{plugin.name}' needs '{missing[0]}', which is not there.")
    try:
        return plugin.build(*(live.get(name) for name in plugin.live), **arguments)
    except Exception as error:
        note = f"in {plugin.label} ({at})"
        error.add_note(note)
        if isinstance(error, ValueError) and not isinstance(error, KdlibError):
            refusal = RecipeError(f"{at}: {error}")
            refusal.add_note(note)
            raise refusal from error
        raise


def _filled(arguments: dict[str, Any], facts: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Fill what is known of the data into settings that were left open; refuse a value that disagrees."""
    for name in FACTS:
        if name not in arguments:
            continue
        given, known = arguments[name], facts.get(name)
        if given is not None and known is not None and given != known:
            raise RecipeError(f"{at}.{name}: the recipe says {given}, the data has {known}. Leave the key out.")
        arguments[name] = known if given is None else given
        if arguments[name] is None:
            del arguments[name]  # the plugin's own default, if it has one
    return arguments


def _by_name(point: EntryPoint) -> tuple[str, str]:
    return point.name, point.value


def _only(points: list[EntryPoint]) -> Any:
    """Load the entry point of a name, or refuse a name that two packages have."""
    if len(points) > 1:
        owners = " and ".join(f"'{point.dist.name if point.dist else point.value}'" for point in points)
        raise PluginError(f"{owners} have a plugin of the same name; none of them is used")
    return points[0].load()


def _brought(hook: str, function: Callable[[], Any]) -> Mapping[str, Callable[..., Any]]:
    """Call a plugin's hook, and name it in what it raises."""
    try:
        value = function()
    except Exception as error:
        raise PluginError(f"{hook}: {_reason(error)}") from error
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise PluginError(f"{hook} returned a {type(value).__name__}, not a mapping from name to class or function")
    return value


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"


@functools.cache
def registry() -> Registry:
    """Return the registry of this process, filled from the installed packages on first use."""
    return Registry(entry_points(group="kdlib"))


def register(plugin: ModuleType | object, name: str | None = None) -> None:
    """Register a module or object with hook implementations in this process, for a notebook or a script.

    Args:
        plugin: what holds functions marked with ``@kdlib.hookimpl``.
        name: how messages call it. Default: the module's or class's name.

    Raises:
        PluginError: it is broken, or of that name there is one already.

    Example:
        >>> import kdlib
        >>> class Mine:
        ...     @kdlib.hookimpl
        ...     def kdlib_points(self):
        ...         return {"my_labels": kdlib.HardLabels}
        >>> kdlib.register(Mine())
    """
    registry().register(plugin, name)

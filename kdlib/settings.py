"""A plugin's signature is its schema: keyword-only arguments are settings, positional ones are live objects."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, create_model
from pydantic.errors import PydanticSchemaGenerationError
from pydantic_core import ErrorDetails, PydanticCustomError
from torch import nn

from kdlib.errors import PluginError, RecipeError, did_you_mean

MOST = 50
"""Problems of a block that are spelled out."""
LIVE = ("teacher", "student", "data", "sources", "points")
"""The names that a plugin's positional arguments may have."""
FACTS = ("classes", "channels", "rate")
"""The settings of models and features that are filled from the data."""
RESERVED = {"point": {"kind", "weight", "epochs", "teacher"}}
"""Keys of a recipe's block that are not the plugin's own."""


M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """A block of a recipe: no unknown keys, no numbers from strings, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=())


class CommandLineText(str):
    """A string typed on the command line: as a path it is relative to the working directory."""


def read_signature(kind: str, name: str, build: Callable[..., Any]) -> tuple[tuple[str, ...], type[Strict]]:
    """Return the live objects and the settings model of a plugin.

    Raises:
        PluginError: a positional argument that is no live object, an argument without annotation, a reserved name.
    """
    if not callable(build):
        raise PluginError(f"{kind} '{name}' is a {type(build).__name__}, not a class or function")
    function: Any = build.__init__ if inspect.isclass(build) else build
    if function in (object.__init__, nn.Module.__init__) or function.__module__ == "typing":  # a protocol's
        return (), create_model(name, __base__=Strict)
    try:
        return _read(kind, name, build, get_type_hints(function, include_extras=True))
    except (NameError, TypeError, PydanticSchemaGenerationError) as error:
        reason = str(error).partition("\n")[0]
        raise PluginError(f"{kind} '{name}': its signature is no schema of settings: {reason}") from error


def _read(
    kind: str, name: str, build: Callable[..., Any], hints: Mapping[str, Any]
) -> tuple[tuple[str, ...], type[Strict]]:
    live: list[str] = []
    fields: dict[str, Any] = {}
    explained = arguments_in(inspect.getdoc(build) or "")
    for parameter in inspect.signature(build).parameters.values():
        argument = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise PluginError(f"{kind} '{name}' takes *{argument}; a plugin names its arguments")
        if parameter.kind is not parameter.KEYWORD_ONLY:
            if argument not in LIVE:
                raise PluginError(
                    f"{kind} '{name}' takes '{argument}' by position; positional arguments are live objects "
                    f"({', '.join(LIVE)}), settings come behind a *"
                )
            live.append(argument)
            continue
        if argument in RESERVED.get(kind, {"kind"}) or argument.startswith("_"):
            raise PluginError(f"{kind} '{name}' has a setting '{argument}', a name that the recipe keeps for itself")
        if argument not in hints:
            raise PluginError(f"{kind} '{name}' has a setting '{argument}' without a type annotation")
        default = ... if parameter.default is parameter.empty else parameter.default
        annotation = _adapted(hints[argument])
        if argument in FACTS and kind in ("model", "features"):
            annotation, default = annotation | None, None
        fields[argument] = (Annotated[annotation, Field(description=explained.get(argument))], default)
    with warnings.catch_warnings():  # a setting may be called "copy" or "json"; we never call those methods
        warnings.filterwarnings("ignore", message=".*shadows an attribute", category=UserWarning)
        return tuple(live), create_model(name, __base__=Strict, **fields)


def arguments_in(docstring: str) -> dict[str, str]:
    """Return what the ``Args:`` of a docstring say, by argument.

    Example:
        >>> arguments_in("A point." + chr(10) + "Args:" + chr(10) + "    tap: the tap," + chr(10) + "        by name.")
        {'tap': 'the tap, by name.'}
    """
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, flags=re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section.group(1) if section else "", flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def validated(
    model: type[M], block: Mapping[str, Any], at: str, base: Path | None = None, beside: Iterable[str] = ()
) -> M:
    """Return a block as its model, or raise one RecipeError that lists every problem with its place.

    Args:
        model: what the block should be.
        block: what was written.
        at: where the block stands in the recipe, for messages.
        base: the folder that paths are relative to.
        beside: keys of the block that are not the model's, for suggestions.
    """
    if not isinstance(block, Mapping):
        raise RecipeError(f"{at}: expected a table, got {block!r}.")
    try:
        return model.model_validate(dict(block), context={"base": base or Path.cwd()})
    except ValidationError as error:
        raise RecipeError("\n".join(_explained(error, model, block, at, beside))) from None


def _explained(
    error: ValidationError, model: type[BaseModel], block: Mapping[str, Any], at: str, beside: Iterable[str]
) -> Iterable[str]:
    """Yield one line a place: a union's members each give an error, which belong together."""
    by_place: dict[str, list[str]] = {}
    problems = error.errors(include_url=False)
    for problem in problems[:MOST]:
        keys = _place(problem, block)
        place = ".".join([at, *keys] if at else keys) or "the recipe"
        if problem["type"] == "extra_forbidden":
            text = f"unknown key.{did_you_mean(keys[-1], [*_known(model, keys[:-1]), *(() if keys[1:] else beside)])}"
        elif problem["type"] == "missing":
            text = f"required, and not given. On the command line: --set {place}=VALUE"
        elif problem["type"] == "empty_path":
            text = f"a path is required here. On the command line: --set {place}=PATH"
        elif problem["type"] == "value_error":
            text = f"{problem['ctx']['error']}."
        else:
            text = f"{problem['msg']}, not {problem['input']!r}."
        by_place.setdefault(place, []).append(text)
    for place, texts in by_place.items():
        if not any(other.startswith(f"{place}.") for other in by_place):  # the member of the union that was meant
            yield f"{place}: {' Or: '.join(dict.fromkeys(texts))}"
    if len(problems) > MOST:
        yield f"and {len(problems) - MOST} more problems"


def _known(model: type[BaseModel], keys: list[str]) -> Iterable[str]:
    """Return the keys of the model that stands at a place inside another."""
    for key in keys:
        field = model.model_fields.get(key)
        inner = [] if field is None else [part for part in _leaves(field.annotation) if issubclass(part, BaseModel)]
        if not inner:
            return ()
        model = inner[0]
    return model.model_fields


def _leaves(annotation: Any) -> Iterable[type]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from _leaves(argument)


def _place(problem: ErrorDetails, block: Any) -> list[str]:
    """Return the keys of a pydantic location without the names of union members in between."""
    location = problem["loc"]
    keys: list[str] = []
    value: Any = block
    for position, part in enumerate(location):
        if isinstance(value, list | tuple):
            inside = isinstance(part, int) and part < len(value)
        else:
            inside = isinstance(value, Mapping) and part in value
        if inside:
            value = value[part]
            keys.append(str(part))
        elif problem["type"] == "missing" and position == len(location) - 1 and isinstance(part, str):
            keys.append(str(part))
    return keys


def _adapted(annotation: Any) -> Any:
    """Return an annotation that reads paths relative to the recipe and accepts arrays for tuples."""
    if annotation is Path:
        return RecipePath
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[_adapted(arguments[0]), *arguments[1:]]
    if origin in (Union, UnionType):
        return Union[tuple(_adapted(argument) for argument in arguments)]  # noqa: UP007
    if origin in (list, dict, tuple):
        inner = origin[tuple(argument if argument is ... else _adapted(argument) for argument in arguments)]
        return Annotated[inner, BeforeValidator(_as_tuple)] if origin is tuple else inner
    return annotation


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _read_path(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str | Path):
        raise PydanticCustomError("path_type", "a path is a string; put it in quotes")
    if value == "":
        raise PydanticCustomError("empty_path", "a path is required here")
    base = Path.cwd() if isinstance(value, CommandLineText) else (info.context or {}).get("base", Path.cwd())
    return base / value


RecipePath = Annotated[Path, BeforeValidator(_read_path)]
"""A path of a recipe: relative to the recipe's file, or on the command line to the working directory."""

"""Plain values (of YAML) against the annotations of a signature."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def hints(target: Callable[..., Any]) -> dict[str, Any]:
    """The resolved annotations of a class's or function's arguments."""
    function = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        return typing.get_type_hints(inspect.unwrap(function))
    except NameError:  # another library's names that exist for type checkers only
        return {}


def fit(value: Any, hint: Any) -> Any:
    """``value`` as the annotation wants it (lists as tuples, whole numbers as floats); other annotations take anything.

    NaN is no number.

    Raises:
        TypeError: it does not fit.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _fit_any(value, parts)
    if origin is typing.Literal:
        return _require(value, any(value == part and type(value) is type(part) for part in parts))
    if hint in (None, type(None)):
        return _require(value, value is None)
    if hint is bool or hint is str:
        return _require(value, isinstance(value, hint))
    if hint is int or hint is float:
        number = isinstance(value, (int, hint)) and not isinstance(value, bool) and value == value
        return hint(_require(value, number))
    kind = origin or hint
    if kind is tuple and parts and parts[-1] is not Ellipsis:
        _require(value, isinstance(value, (list, tuple)) and len(value) == len(parts))
        return tuple(fit(item, part) for item, part in zip(value, parts, strict=True))
    if kind in (list, tuple, Sequence):
        _require(value, isinstance(value, (list, tuple)))
        items = [fit(item, parts[0] if parts else Any) for item in value]
        return tuple(items) if kind is tuple else items
    if kind in (dict, Mapping):
        _require(value, isinstance(value, dict))
        return {key: fit(item, parts[1] if parts else Any) for key, item in value.items()}
    return value


def _fit_any(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return fit(value, hint)
        except TypeError:
            continue
    raise TypeError


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise TypeError
    return value


def described(hint: Any) -> str:
    """An annotation in words for an error: "int or null", "a list of 3 int"."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is typing.Literal:
        return " or ".join(repr(part) for part in parts)
    if hint in (None, type(None)):
        return "null"
    if origin is None:
        return getattr(hint, "__name__", str(hint))
    if origin is tuple and parts and parts[-1] is not Ellipsis:
        same = len(set(parts)) == 1
        return (
            f"a list of {len(parts)} {described(parts[0])}" if same else f"a list ({', '.join(map(described, parts))})"
        )
    if origin in (list, tuple, Sequence):
        return f"a list of {described(parts[0])}"
    return str(hint)

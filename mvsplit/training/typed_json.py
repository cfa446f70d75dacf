"""Parsed JSON as what a type asks for: dataclasses, tuples, lists, dicts of strings,
literals, X | None."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from mvsplit.errors import UserError, nearest


def read_as(hint: Any, value: Any, name: str) -> Any:
    """`value` of parsed JSON as what the type `hint` asks for."""
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # of the form X | None
        wanted = next(a for a in arguments if a is not type(None))
        return None if value is None else read_as(wanted, value, name)
    if origin is tuple and isinstance(value, list) and arguments[-1] is Ellipsis:
        return tuple(read_as(arguments[0], v, name) for v in value)
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(read_as(a, v, name) for a, v in zip(arguments, value, strict=True))
    if origin is list and isinstance(value, list):
        return [read_as(arguments[0], v, name) for v in value]
    if origin is dict and isinstance(value, dict):
        return {key: read_as(arguments[1], v, f"{name}.{key}") for key, v in value.items()}
    if origin is Literal and value in arguments:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{name}={value!r} is not of type {getattr(hint, '__name__', hint)}")


def _read_dataclass(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{name or 'the file'} must hold an object with the fields of {kind}")
    hints = typing.get_type_hints(kind)
    prefix = f"{name}." if name else ""
    for given in value:
        if given not in hints:
            raise UserError(f"{prefix}{given} is not a known field; {nearest(given, hints)}")
    for known in dataclasses.fields(kind):
        required = known.default is known.default_factory is dataclasses.MISSING
        if required and known.name not in value:
            raise UserError(f"{prefix}{known.name} is missing; add it")
    return kind(**{key: read_as(hints[key], item, prefix + key) for key, item in value.items()})

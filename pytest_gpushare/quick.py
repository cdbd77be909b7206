"""Frozen dataclasses that cost a tenth when they are defined, for what every start loads.

`dataclasses` writes the source of each method of each class and compiles it: a millisecond for
a class of ten fields. Here the methods are the same for all classes. For type checkers, and for
`dataclasses.replace`, `fields` and `asdict`, they are dataclasses like any other.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(*, frozen: bool):
        """As `dataclasses.dataclass(frozen=True)`, without `__post_init__` and inheritance."""
        assert frozen
        return _made_quickly

    def _made_quickly(cls):
        cls = dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
        for name, method in vars(_Frozen).items():
            if callable(method):
                setattr(cls, name, method)
        return cls


class _Frozen:
    """The methods of every such class."""

    __dataclass_fields__: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields, values = self.__dataclass_fields__, vars(self)
        if len(args) > len(fields):
            raise TypeError(f"{_name(self)} takes {len(fields)} values, not {len(args)}")
        values.update(zip(fields, args, strict=False))
        for name, value in kwargs.items():
            if name not in fields or name in values:
                problem = "twice" if name in values else "which it does not know"
                raise TypeError(f"{_name(self)} was given {name} {problem}")
            values[name] = value
        for name, field in fields.items():
            if name not in values:
                values[name] = _default(self, field)

    def __repr__(self) -> str:
        fields = self.__dataclass_fields__.values()
        shown = [f"{field.name}={getattr(self, field.name)!r}" for field in fields if field.repr]
        return f"{_name(self)}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if other.__class__ is not self.__class__:
            return NotImplemented
        return _compared(self) == _compared(other)

    def __hash__(self) -> int:
        return hash(_compared(self))

    def __setattr__(self, name: str, value: object) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


def _default(self: Any, field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    raise TypeError(f"{_name(self)} needs {field.name}")


def _compared(self: Any) -> tuple[Any, ...]:
    fields = self.__dataclass_fields__.values()
    return tuple(getattr(self, field.name) for field in fields if field.compare)


def _name(self: Any) -> str:
    return type(self).__qualname__

"""The dataclass decorator of all settings: frozen, typed and checked, with one docstring per field."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticKnownError

T = TypeVar("T")

# Larger than any run needs, and small enough for numpy's int64.
MAX_COUNT = 2**40
WholeNumber = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""Makes 1e3 and 8.0 integers."""
PositiveInt = Annotated[int, WholeNumber, Field(gt=0, le=MAX_COUNT, strict=True)]
TwoOrMore = Annotated[int, WholeNumber, Field(ge=2, le=MAX_COUNT, strict=True)]
NonNegativeInt = Annotated[int, WholeNumber, Field(ge=0, le=MAX_COUNT, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1, strict=True)]
Ratio = Annotated[float, Field(ge=0, le=1, strict=True)]
LayerRange = Annotated[tuple[NonNegativeInt, NonNegativeInt], Field(strict=False)]
Flag = Annotated[bool, Field(strict=True)]
OneOrMore = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
"""Makes a plain text a list of one item."""
Patterns = Annotated[tuple[str, ...], OneOrMore]
"""Patterns of parameter names, see core/patterns.py."""


def key_of(table: Mapping[str, Any], *others: str) -> BeforeValidator:
    """Return the check that a value is one of `others` or a key of `table`, with the message of a `Literal` of them.

    The check reads the table each time, so that an entry added later is accepted.
    """

    def check(value: Any) -> Any:
        names = (*others, *table)
        if not isinstance(value, str) or value not in names:
            *first, last = map(repr, names)
            raise PydanticKnownError("literal_error", {"expected": f"{', '.join(first)} or {last}" if first else last})
        return value

    return BeforeValidator(check)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """Make `cls` a settings class: unknown keys and wrong types are errors."""
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    decorated: Any = pydantic.dataclasses.dataclass(config=config, frozen=True, kw_only=True)(cls)
    return decorated  # type: ignore[no-any-return]

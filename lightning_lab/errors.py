"""The one exception for anything a user can put right, and the ranges and choices of settings."""

import math
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

LONGEST = 1_200  # characters of a message; a key of a megabyte is not repeated whole

Range = tuple[float, float]


class LabError(Exception):
    """Bad input or an environment that cannot do what the config asks.

    The message is a single line that names the file, row or key, says what is wrong and what to do.
    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > LONGEST:
            line = f"{line[: LONGEST - 400]} ... {line[-400:]}"
        super().__init__(line)


def check_ranges(section: str, settings: Mapping[str, object], ranges: Mapping[str, Range]) -> None:
    """Refuse numbers outside their range, ends included; NaN always, None never, and values that are no numbers never.

    Args:
        section: ``model`` or ``data``, put before each key; empty for keys without one.
        settings: Values by key.
        ranges: Lowest and highest allowed value by key.

    Raises:
        LabError: Names the key, its value and the range.

    """
    for key, (low, high) in ranges.items():
        value = settings[key]
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if math.isnan(number) or not low <= number <= high:
                name = f"{section}.{key}" if section else key
                bounds = f"between {_shown(low)} and {_shown(high)}" if high < math.inf else f"at least {_shown(low)}"
                raise LabError(f"{name} is {number:g}; it must be {bounds}")


def check_arguments(
    section: str, function: Callable[..., object], settings: Mapping[str, object], ranges: Mapping[str, Range]
) -> None:
    """Refuse arguments of a function outside their range, or that are none of its `Literal` annotation's values.

    Args:
        section: As for `check_ranges`.
        function: Has the annotations.
        settings: Its arguments by name.
        ranges: As for `check_ranges`.

    Raises:
        LabError: Names the key, its value and the range or the choices.

    """
    check_ranges(section, settings, ranges)
    for key, hint in get_type_hints(function).items():
        kinds = [hint] if get_origin(hint) is Literal else get_args(hint)
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        if choices and bool in kinds:
            choices += [True, False]
        if not choices or (key in ranges and not isinstance(settings[key], str)):
            continue
        if settings[key] not in choices and not (settings[key] is None and NoneType in kinds):
            raise LabError(f"{section}.{key} is {settings[key]!r}; choose one of {', '.join(map(str, choices))}")


def _shown(number: float) -> str:
    return f"{number:,.0f}" if 1 <= number < 1e15 else f"{number:g}"

"""Checks of single values in a config.json, and how a message shows one."""

from errors import UserError


def integer(key: str, value: object, largest: int) -> int:
    """The value, a positive integer. Raises UserError naming the key."""
    if type(value) is not int or not 0 < value <= largest:
        raise UserError(f"model config: {key} = {short(value)} must be a positive integer, at most {largest}")
    return value


def same(value: object, accepted: object) -> bool:
    """Equal, and not a boolean beside a number: 1 is not true."""
    return value == accepted and isinstance(value, bool) == isinstance(accepted, bool)


def listed(values: tuple[object, ...]) -> str:
    """The accepted values in an error's line."""
    return " or ".join(map(repr, values))


def short(value: object) -> str:
    """A value from a file in an error's one line, whatever its size or depth."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of too many digits to print
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:80] + "..."

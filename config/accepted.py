"""Types of options that accept less than their Python type: what, and how that is told."""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from models.qwen35_moe import parts


class Accept(NamedTuple):
    """Narrows a field's type, as the second argument of `Annotated`."""

    text: str
    """What is accepted, for messages and --help."""
    test: Callable[[Any], bool]


# Bounds so high that they hinder nobody: products of two, and of three, stay numbers that a tensor can hold.
PositiveInt = Annotated[int, Accept("a positive integer below 2**31", lambda n: 0 < n < 2**31)]
Count = Annotated[int, Accept("an integer of at least 0, below 2**31", lambda n: 0 <= n < 2**31)]
Rows = Annotated[int, Accept("a positive integer of at most 2**20", lambda n: 0 < n <= 2**20)]
Workers = Annotated[int, Accept("an integer from 0 to 1024", lambda n: 0 <= n <= 1024)]
Seed = Annotated[int, Accept("an integer from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)]
Room = Annotated[float, Accept("0, a number from 1 to 1000, or -1", lambda x: x in (0, -1) or 1 <= x <= 1000)]
Degree = Annotated[int, Accept("a positive integer, or -1", lambda n: n > 0 or n == -1)]
Positive = Annotated[float, Accept("a positive number", lambda x: 0 < x < math.inf)]
PositiveOrInf = Annotated[float, Accept("a positive number, or inf", lambda x: x > 0)]
NotNegative = Annotated[float, Accept("a number of at least 0", lambda x: 0 <= x < math.inf)]
Epochs = Annotated[float, Accept("a positive number of at most 1000", lambda x: 0 < x <= 1000)]
Share = Annotated[float, Accept("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Ratio = Annotated[float, Accept("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Beta = Annotated[float, Accept("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Folder = Annotated[str, Accept("a folder", lambda path: path != "")]
Parts = Annotated[
    tuple[str, ...], Accept(f"a list of some of {', '.join(parts.NAMES)}", lambda names: set(names) <= set(parts.NAMES))
]
Targets = Annotated[
    tuple[str, ...],
    Accept(
        f"a list of some of {', '.join(parts.ADAPTABLE)}",
        lambda names: 0 < len(names) == len(set(names)) and set(names) <= set(parts.ADAPTABLE),
    ),
]

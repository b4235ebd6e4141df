"""Compiles a function of rows once, however many there are."""

from collections.abc import Callable
from typing import Any

import torch

from torch_private import mark_dynamic, tree_leaves


def compile_for_any_number_of_rows(function: Callable, num_others: int = 0) -> Callable:
    """One graph however many rows the arguments have, but for the last `num_others`: their shapes stay.

    Rows are the first dimension. As they are copies or copies' choices, there are others in each block and batch.
    """
    compiled = torch.compile(function)

    def run(*args: Any) -> Any:
        of_rows = [each for each in tree_leaves(args[: len(args) - num_others]) if isinstance(each, torch.Tensor)]
        if min(map(len, of_rows)) < 2:  # the compiler would make a graph of its own for sizes of 0 and of 1
            return function(*args)
        for tensor in of_rows:
            mark_dynamic(tensor, 0)
        return compiled(*args)

    return run

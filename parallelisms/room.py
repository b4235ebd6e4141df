"""How large the buffers are in which tokens travel to their experts and wait for them."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from config.options import Parallelism

logger = logging.getLogger("train")


class Sizes(NamedTuple):
    """Of a block's buffers."""

    copies: int
    """That one rank sends to another."""
    rows: int
    """That a rank's experts get."""


@dataclass
class Room:
    """One for all blocks of a run; the same on all ranks."""

    factor: float = 0.0
    """Sizes as multiples of even shares; 0: each block asks for its own, and the host waits for the answer."""
    num_repeated: int = 0
    """Steps that were made anew for want of it."""

    def sizes(self, num_tokens: int, top_k: int, num_ranks: int, num_local: int) -> Sizes:
        """Of a rank with so many tokens, each with top_k experts, where each of `num_ranks` ranks has `num_local`
        experts. No larger than what can come at most.

        All ranks of `ep` have as many tokens, or else what they send is not what is awaited: a micro-batch is
        `local_batch_size` rows of `sequence_length` tokens, fillers included, at the end of the data too (loader.py);
        these options are the same on all ranks (training/distributed.py), and the ranks of `cp` share evenly."""
        reached = 1 - (1 - 1 / num_ranks) ** top_k  # of the ranks, by a token whose experts are anywhere
        copies = min(num_tokens, math.ceil(self.factor * num_tokens * reached))
        most = num_ranks * copies * min(top_k, num_local)
        return Sizes(copies, min(most, math.ceil(self.factor * num_tokens * top_k)))

    @property
    def metrics(self) -> dict[str, int]:
        """How many steps were made anew, of a run that has room."""
        return {"repeated_steps": self.num_repeated} if self.factor or self.num_repeated else {}

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Has blocks ask for sizes."""
        before, self.factor = self.factor, 0.0
        try:
            yield
        finally:
            self.factor = before

    def note_repeat(self, grows: bool) -> None:
        """A step was made anew. `grows`: from here on there is more room; or, where that would be more than twice an
        even share, none, and blocks ask. Not if it was not finite: such tokens choose the same experts, all of them."""
        self.num_repeated += 1
        if grows:
            self.factor = self.factor * 1.25 if self.factor * 1.25 <= 2 else 0.0
        logger.info(
            "a step was made anew: more tokens came to a rank's experts than parallelism.expert_room is for; from here "
            f"on it is {self.factor:.2f}" + ("" if self.factor else ": the host asks")
        )


def room_factor(options: Parallelism, device_type: str) -> float:
    """`expert_room`, or what it is by default: a GPU must not wait for its host."""
    if options.expert_room >= 0:
        return options.expert_room
    return 1.2 if device_type == "cuda" else 0.0

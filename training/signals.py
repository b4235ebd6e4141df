"""SIGTERM and SIGINT: the first asks for an orderly stop, the second ends the process at once."""

import os
import signal
from types import FrameType


class StopRequest:
    """Remembers that a stop was asked for; the training loop asks all ranks once a step and they stop together."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True

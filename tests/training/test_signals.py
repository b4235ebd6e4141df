"""The first signal is remembered, the second ends the process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from training.signals import StopRequest

ROOT = Path(__file__).resolve().parents[2]


def test_first_signal_is_a_request() -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopRequest()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(number: signal.Signals) -> None:
    program = "import os; from training.signals import StopRequest; StopRequest()\n"
    program += f"while True: os.kill(os.getpid(), {int(number)})"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=PATIENCE).returncode == 128 + number

"""What the converters' command lines share."""

import argparse
from typing import NoReturn

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "keep": None}
"""The values of --dtype; None: of each tensor, what is stored."""


class OneLineParser(argparse.ArgumentParser):
    """A mistake on the command line ends in one line, without the usage, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

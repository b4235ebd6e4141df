"""The label that is not trained on is the one that PyTorch and transformers leave out."""

import inspect

import torch.nn.functional as F

from models.ops.labels import IGNORED


def test_pytorch_leaves_it_out_too() -> None:
    assert inspect.signature(F.cross_entropy).parameters["ignore_index"].default == IGNORED

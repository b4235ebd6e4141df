"""Reads the text model out of a Hugging Face directory: all of it for conversion, a rank's shards for training."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from checkpoint.tensors.safetensors import read_safetensors
from checkpoint.tensors.stored import Chunk, StoredArray, StoredTensor
from errors import UserError, WrongTensors
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import Piece, find_pieces
from models.qwen35_moe.init import LocalPart
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parameters import Shape, full_box, parameters


def text_tensors(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Native parameters from a directory's tensors. Raises UserError naming one that is missing, odd or unknown."""
    pieces = find_pieces(config, {key: tensor.shape for key, tensor in stored.items()})
    return {name: assemble(name, p.shape, pieces[name], stored) for name, p in parameters(config).items()}


@contextmanager
def naming_tensors() -> Iterator[None]:
    """Inside, what is refused is refused for the set of tensors: a conversion tells that by its exit code."""
    try:
        yield
    except UserError as error:
        raise WrongTensors(str(error)) from error


def assemble(name: str, shape: Shape, pieces: list[Piece], stored: Mapping[str, StoredTensor]) -> StoredTensor:
    """One tensor from Hugging Face tensors."""
    dtypes = {stored[piece.key].dtype for piece in pieces}
    if len(dtypes) > 1:
        raise UserError(f"weights: the experts of {name!r} differ in dtype: {sorted(map(str, dtypes))}")
    if len(pieces) == 1:
        return stored[pieces[0].key]
    chunks = [Chunk(full_box(piece.box, shape), _array(stored[piece.key])) for piece in pieces]
    return StoredTensor(name, shape, dtypes.pop(), chunks)


def _array(tensor: StoredTensor) -> StoredArray:
    if len(tensor.chunks) > 1:
        raise UserError(f"{tensor.name!r} is in several pieces: expected --experts keep")
    return tensor.open(tensor.chunks[0])


@torch.no_grad()
def load_hf_weights(model: Qwen35Moe, folder: Path, local_part: Callable[[nn.Parameter], LocalPart]) -> None:
    """Fills every parameter's part that `local_part` says lies in this process, reading no more than that.

    Raises UserError naming a tensor that is missing, unexpected or of a wrong shape.
    """
    tensors = text_tensors(model.config, read_safetensors(folder))
    for name, parameter in model.named_parameters():
        local, box = local_part(parameter)
        if local.numel():
            local.copy_(tensors[name].read(box))

"""Reads the text model out of a Hugging Face directory: all of it for conversion, a rank's shards for training."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from checkpoint.safetensors_files import read_headers
from checkpoint.stored import Chunk, StoredArray, StoredTensor
from errors import UserError
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import Piece, find_pieces
from models.qwen35_moe.init import LocalPart
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parameters import Shape, full_box, parameters


def text_tensors(config: ModelConfig, arrays: Mapping[str, StoredArray]) -> dict[str, StoredTensor]:
    """Native parameters from a directory's tensors. Raises UserError naming one that is missing, odd or unknown."""
    pieces = find_pieces(config, {key: array.shape for key, array in arrays.items()})
    return {name: assemble(name, p.shape, pieces[name], arrays) for name, p in parameters(config).items()}


def assemble(name: str, shape: Shape, pieces: list[Piece], arrays: Mapping[str, StoredArray]) -> StoredTensor:
    """One tensor from Hugging Face tensors."""
    dtypes = {arrays[piece.key].dtype for piece in pieces}
    if len(dtypes) > 1:
        raise UserError(f"weights: the experts of {name!r} differ in dtype: {sorted(map(str, dtypes))}")
    chunks = [Chunk(full_box(piece.box, shape), arrays[piece.key]) for piece in pieces]
    return StoredTensor(pieces[0].key if len(pieces) == 1 else name, shape, dtypes.pop(), chunks)


@torch.no_grad()
def load_hf_weights(model: Qwen35Moe, folder: Path, local_part: Callable[[nn.Parameter], LocalPart]) -> None:
    """Fills every parameter's part that `local_part` says lies in this process, reading no more than that.

    Raises UserError naming a tensor that is missing, unexpected or of a wrong shape.
    """
    tensors = text_tensors(model.config, read_headers(folder))
    for name, parameter in model.named_parameters():
        local, box = local_part(parameter)
        if local.numel():
            local.copy_(tensors[name].read(box))

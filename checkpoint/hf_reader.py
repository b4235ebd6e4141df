"""Reads the text model out of a Hugging Face directory: all of it for conversion, a rank's shards for training."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from checkpoint.safetensors_files import read_headers
from checkpoint.stored import Chunk, Shape, StoredArray, StoredTensor, full_box, whole
from errors import UserError
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import NOT_TEXT, Piece, find_pieces, parameter_shapes
from models.qwen35_moe.model import Qwen35Moe

PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def text_tensors(config: ModelConfig, arrays: Mapping[str, StoredArray]) -> dict[str, StoredTensor]:
    """Native parameters from a directory's tensors. Raises UserError naming one that is missing, odd or unknown."""
    _check_values(arrays)
    pieces = find_pieces(config, {key: array.shape for key, array in arrays.items()})
    tensors = {name: assemble(name, shape, pieces[name], arrays) for name, shape in parameter_shapes(config).items()}
    if config.tie_word_embeddings and "lm_head.weight" in arrays:
        _check_tied(tensors["embed_tokens.weight"], whole("lm_head.weight", arrays["lm_head.weight"]))
    return tensors


def _check_values(arrays: Mapping[str, StoredArray]) -> None:
    """Raises UserError if a tensor of the text model holds no plain floating-point values, but codes of them."""
    for key, array in arrays.items():
        if not key.startswith(NOT_TEXT) and array.dtype not in PLAIN_DTYPES:
            raise UserError(f"weights: {key!r} is {array.dtype}, quantised: dequantise the model to bfloat16 first")


def _check_tied(embedding: StoredTensor, head: StoredTensor) -> None:
    """Raises UserError if a tied model's own head says something else than its embedding."""
    if head.shape != embedding.shape:
        raise UserError(f"weights: 'lm_head.weight' has shape {list(head.shape)}, not {list(embedding.shape)}")
    for start in range(0, head.shape[0], 8192):
        rows = ((start, min(start + 8192, head.shape[0])),)
        if not torch.equal(head.read(rows).double(), embedding.read(rows).double()):
            raise UserError(
                "weights: 'lm_head.weight' differs from the embedding, but config.json's tie_word_embeddings is true: "
                "expected equal values, no 'lm_head.weight', or tie_word_embeddings = false"
            )


def assemble(name: str, shape: Shape, pieces: list[Piece], arrays: Mapping[str, StoredArray]) -> StoredTensor:
    """One tensor from Hugging Face tensors."""
    dtypes = {arrays[piece.key].dtype for piece in pieces}
    if len(dtypes) > 1:
        raise UserError(f"weights: the experts of {name!r} differ in dtype: {sorted(map(str, dtypes))}")
    chunks = [Chunk(full_box(piece.region, shape), arrays[piece.key]) for piece in pieces]
    return StoredTensor(pieces[0].key if len(pieces) == 1 else name, shape, dtypes.pop(), chunks)


@torch.no_grad()
def load_hf_weights(
    model: Qwen35Moe, folder: Path, region: Callable[[nn.Parameter], tuple[torch.Tensor, tuple[slice, ...]]]
) -> None:
    """Fills every parameter's part that `region` says lies in this process, reading no more than that.

    Raises UserError naming a tensor that is missing, unexpected or of a wrong shape.
    """
    tensors = text_tensors(model.config, read_headers(folder))
    for name, parameter in model.named_parameters():
        local, index = region(parameter)
        if local.numel():
            local.copy_(tensors[name].read(tuple((part.start, part.stop) for part in index)))

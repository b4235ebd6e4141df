"""Reads the model out of a Hugging Face directory: all of it for conversion, a rank's shards for training."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from checkpoint.tensors.safetensors import read_safetensors
from checkpoint.tensors.stored import PLAIN_DTYPES, Chunk, StoredArray, StoredTensor, finite
from errors import UserError, WrongTensors
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.hf_weights import MTP, Piece, find_pieces, left_out
from models.qwen35_moe.init import LocalPart, init_weights
from models.qwen35_moe.lora import is_adapter
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.parameters import Shape, full_box, parameters

logger = logging.getLogger("train")

_BLOCK_BYTES = 64 * 2**20


def native_tensors(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Native parameters from a directory's tensors. Raises UserError naming one that is missing, odd or unknown."""
    for key, tensor in stored.items():
        if not key.startswith(left_out(config)) and tensor.dtype not in PLAIN_DTYPES:
            raise UserError(f"weights: {key!r} is {tensor.dtype}, quantised: dequantise the model to bfloat16 first")
    pieces = find_pieces(config, {key: tensor.shape for key, tensor in stored.items()})
    tensors = {name: assemble(name, p.shape, pieces[name], stored) for name, p in parameters(config).items()}
    if config.tie_word_embeddings and "lm_head.weight" in stored:
        _check_tied(tensors["embed_tokens.weight"], stored["lm_head.weight"])
    return tensors


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


def hash_parts(stored: Mapping[str, StoredTensor], prefixes: Iterable[str]) -> dict[str, str]:
    """Of each part of a directory's tensors, by the prefix of their names, the SHA-256 of all that they hold."""
    return {prefix: _hash(stored, prefix) for prefix in prefixes}


def _hash(stored: Mapping[str, StoredTensor], prefix: str) -> str:
    value = hashlib.sha256()
    for key, tensor in sorted(stored.items()):
        if key.startswith(prefix):
            value.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
            for block in tensor.blocks(_BLOCK_BYTES):
                value.update(block.view(-1).view(torch.uint8).numpy().data)
    return value.hexdigest()


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


def load_hf_weights(model: Qwen35Moe, folder: Path, seed: int, local_part: Callable[[torch.Tensor], LocalPart]) -> None:
    """Fills every parameter's part that `local_part` says lies in this process, reading no more than that; not those
    of adapters.

    Multi-token prediction of which there is nothing begins with random weights. Raises UserError naming a tensor that
    is missing, unexpected or of a wrong shape.
    """
    stored, config = read_safetensors(folder), model.config
    tensors = {name: parameter for name, parameter in model.named_parameters() if not is_adapter(name)}
    if model.mtp is not None and not any(name.startswith(MTP) for name in stored):
        begin_mtp(model, folder, seed, local_part)
        config = replace(config, mtp_num_hidden_layers=0)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(MTP)}
    fill(tensors, native_tensors(config, stored), local_part)


def begin_mtp(model: Qwen35Moe, source: Path, seed: int, local_part: Callable[[torch.Tensor], LocalPart]) -> None:
    """Fills multi-token prediction, of which `source` has nothing."""
    logger.warning(f"{source} has no multi-token prediction: it begins with random weights")
    init_weights(model, seed, local_part, which=lambda name: name.startswith(MTP))


@torch.no_grad()
def fill(
    tensors: Mapping[str, torch.Tensor],
    stored: Mapping[str, StoredTensor],
    local_part: Callable[[torch.Tensor], LocalPart],
) -> None:
    """Reads the part of each of `tensors` that lies in this process. Raises UserError if weights are not finite."""
    for name, tensor in tensors.items():
        local, box = local_part(tensor)
        if local.numel():
            local.copy_(stored[name].read(box))
            if not name.startswith("optimizer."):
                finite(stored[name], local)

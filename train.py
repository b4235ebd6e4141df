"""The recipe: `torchrun train.py --config X.toml` trains Qwen3.5-MoE. Read it from top to bottom."""

import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from config import check_config, load_config, model_config
from data.loader import MicroBatch, TokenLoader
from models.ops.documents import Documents
from models.ops.kernels import select_kernels
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.mesh import Meshes, build_meshes
from parallelisms.parallelize import materialise, parallelize_fn, reduce_replicated_gradients
from training.distributed import init_distributed, set_deterministic, world_from_environment
from training.gradients import clip_gradients
from training.metrics import setup_logging
from training.optimizer import build_optimizer
from training.signals import StopRequest

logger = logging.getLogger("train")


class StepResult(NamedTuple):
    """What one optimizer step tells, on this rank alone until it is reduced."""

    loss_sum: torch.Tensor  # [], sum of this rank's token losses divided by the global batch's trained tokens
    expert_counts: torch.Tensor  # int [L, E]: rows that this rank's tokens sent to each expert
    grad_norm: torch.Tensor  # [], global, before clipping


def train_step(
    model: Qwen35Moe,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[MicroBatch],
    num_trained_tokens: int,
    meshes: Meshes,
    device: torch.device,
    max_grad_norm: float,
    max_seqlen: int,
) -> StepResult:
    """One optimizer step over this rank's micro-batches; `num_trained_tokens` is the whole global batch's."""
    loss_sum, expert_counts = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    for batch in micro_batches:
        documents = Documents.from_lengths(batch.lengths, device, max_seqlen)
        tokens, positions, labels = (
            tensor.to(device, non_blocking=True) for tensor in (batch.tokens, batch.positions, batch.labels)
        )
        loss, counts = model(tokens, positions, documents, labels)
        # Sum over tokens / trained tokens of the GLOBAL batch: ranks and micro-batches then simply add up.
        loss = loss / num_trained_tokens
        loss.backward()
        loss_sum += loss.detach()
        expert_counts = expert_counts + counts
    reduce_replicated_gradients(model.float32_parameters(), meshes.data_parallel)
    grad_norm = clip_gradients(list(model.parameters()), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return StepResult(loss_sum, expert_counts, grad_norm)



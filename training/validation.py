"""The loss on data that is not trained on: a pass over it every so often, without a trace in the training."""

import dataclasses
import sys
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from config import Config
from data.loader import MicroBatch, TokenLoader
from data.packing import IGNORED
from training.distributed import sum_over_ranks


class Validator:
    """Measures the mean loss over all trained tokens of `validation.path`, the same number whatever the mesh."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        """Opens the data. Raises UserError, one line, if it cannot be used."""
        # In this process: the workers of the training data go on meanwhile.
        data = dataclasses.replace(config.data, path=config.validation.path, weights=(), shuffle=False, num_workers=0)
        training = config.training
        self._loader = TokenLoader(data, training, rank, world_size, config.job.seed, one_epoch=True)
        self._num_micro_batches = training.global_batch_size // (world_size * training.local_batch_size)
        self._max_steps = config.validation.steps or sys.maxsize

    @torch.no_grad()
    def loss(self, model: nn.Module, loss_sum: Callable[[MicroBatch], torch.Tensor], device: torch.device) -> float:
        """In nats a token; all ranks call it together. `loss_sum` runs the model on a micro-batch of this rank's."""
        total = torch.zeros(2, dtype=torch.float64, device=device)  # losses, tokens
        self._loader.rewind()
        for _ in range(self._max_steps):
            batches = [next(self._loader) for _ in range(self._num_micro_batches)]
            num_real = sum(int(batch.is_real.sum()) for batch in batches if batch.is_real is not None)
            # A rank without rows runs the model on fillers as long as another has some, which needs its weights.
            if not int(sum_over_ranks(torch.tensor(num_real, device=device))):
                break
            for batch in batches:
                total[0] += loss_sum(batch).double()
                total[1] += int((batch.labels != IGNORED).sum())
        for module in model.modules():  # FSDP keeps the last weights that it gathered, for a backward
            if isinstance(module, FSDPModule):
                module.reshard()
        losses, num_tokens = sum_over_ranks(total).tolist()
        return losses / max(num_tokens, 1)

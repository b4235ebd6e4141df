"""The loss on data that is not trained on: a pass over it every so often, without a trace in the training."""

import dataclasses
import sys

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from config.options import Config
from data.loader import TokenLoader
from data.media import MediaSettings
from parallelisms.context_parallel import own_share
from parallelisms.mesh import Meshes
from training.distributed import sum_over_ranks


class Validator:
    """Measures the mean loss over all trained tokens of `validation.path`, the same number whatever the mesh."""

    def __init__(self, config: Config, meshes: Meshes, media: MediaSettings | None = None) -> None:
        """Opens the data. Raises UserError, one line, if it cannot be used."""
        # In this process: the workers of the training data go on meanwhile.
        data = dataclasses.replace(config.data, path=config.validation.path, weights=(), shuffle=False, num_workers=0)
        ranks = (meshes.data_rank, meshes.num_data_ranks)
        self._loader = TokenLoader(data, config.training, *ranks, config.job.seed, media=media, one_epoch=True)
        self._max_steps = config.validation.steps or sys.maxsize
        self._context, self._vision = meshes.context_parallel, media and media.vision

    @torch.no_grad()
    def loss(self, model: nn.Module, device: torch.device) -> float:
        """In nats a token; all ranks call it together."""
        total = torch.zeros(2, dtype=torch.float64, device=device)  # losses, tokens
        self._loader.rewind()
        for _ in range(self._max_steps):
            of_readers = [next(self._loader) for _ in range(self._loader.num_micro_batches)]
            batches = [own_share(batch, self._context, self._vision) for batch in of_readers]
            num_real = sum(int(batch.is_real.sum()) for batch in batches if batch.is_real is not None)
            # A rank without rows runs the model on fillers as long as another has some, which needs its weights.
            if not int(sum_over_ranks(torch.tensor(num_real, device=device))):
                break
            for batch in batches:
                loss_sum, _ = model(batch.to(device))
                total[0] += loss_sum.double()
                total[1] += batch.num_trained
        for module in model.modules():  # FSDP keeps the last weights that it gathered, for a backward
            if isinstance(module, FSDPModule):
                module.reshard()
        losses, num_tokens = sum_over_ranks(total).tolist()
        return losses / max(num_tokens, 1)

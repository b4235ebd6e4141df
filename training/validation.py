"""The loss on data that is not trained on: a pass over it every so often, without a trace in the training."""

import dataclasses
import sys

import torch
from torch.distributed.fsdp import FSDPModule

from config.options import Config
from data.held_out import ALL, Side
from data.loader import TokenLoader
from data.media import MediaSettings
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Measure
from parallelisms.context_parallel import own_share
from parallelisms.mesh import Meshes
from training.distributed import sum_over_ranks


class Validator:
    """Measures the mean loss over all trained tokens of each of [validation]'s data, the same number whatever the mesh;
    and of multi-token prediction, if there is any, how often its drafts are the tokens that the model itself
    prefers."""

    def __init__(self, config: Config, meshes: Meshes, media: MediaSettings | None = None) -> None:
        """Opens the data. Raises UserError, one line, if they cannot be used."""
        validation = config.validation
        self._loaders: dict[str, TokenLoader] = {}
        """By what the names of the metrics end in."""

        def add(ending: str, path: tuple[str, ...], side: Side = ALL) -> None:
            # In this process: the workers of the training data go on meanwhile.
            data = dataclasses.replace(config.data, path=path, weights=(), shuffle=False, num_workers=0)
            run = (config.training, meshes.data_rank, meshes.num_data_ranks, config.job.seed)
            mtp = config.mtp.train != "off"
            self._loaders[ending] = TokenLoader(data, *run, media=media, mtp=mtp, one_epoch=True, side=side)

        if validation.share:
            add("", config.data.path, Side.of(config, is_held_out=True))
        if validation.path:
            add("", validation.path)
        for name, path in validation.sets.items():
            add(f"_{name}", path)
        self._max_steps = validation.steps or sys.maxsize
        self._context, self._vision = meshes.context_parallel, media and media.vision

    def measure(self, model: Qwen35Moe, device: torch.device) -> dict[str, float]:
        """Metrics by their names, losses in nats a token; all ranks call it together."""
        metrics: dict[str, float] = {}
        for ending, loader in self._loaders.items():
            metrics |= {f"{name}{ending}": value for name, value in self._measure(model, device, loader).items()}
        return metrics

    @torch.no_grad()
    def _measure(self, model: Qwen35Moe, device: torch.device, loader: TokenLoader) -> dict[str, float]:
        total = torch.zeros(5, dtype=torch.float64, device=device)  # loss, tokens; of MTP: loss, tokens, accepted
        loader.rewind()
        for _ in range(self._max_steps):
            of_readers = [next(loader) for _ in range(loader.num_micro_batches)]
            batches = [own_share(batch, self._context, self._vision) for batch in of_readers]
            num_real = sum(int(batch.is_real.sum()) for batch in batches if batch.is_real is not None)
            # A rank without rows runs the model on fillers as long as another has some, which needs its weights.
            if not int(sum_over_ranks(torch.tensor(num_real))):
                break
            for batch in batches:
                on_device = batch.to(device)
                output = model(on_device, Measure(on_device.is_real), counts_accepted=True)
                total[0] += output.result.double()
                total[1] += batch.num_trained
                if output.mtp_loss is not None:
                    total[2] += output.mtp_loss.double()
                    total[3] += batch.num_drafted
                    total[4] += output.num_accepted
        for module in model.modules():  # FSDP keeps what it gathered for a backward pass, up to when it would be old
            if isinstance(module, FSDPModule):
                module.reshard()
        loss, num_tokens, mtp_loss, num_drafted, num_accepted = sum_over_ranks(total).tolist()
        metrics = {"validation_loss": loss / max(num_tokens, 1)}
        if num_drafted:
            metrics |= {"validation_mtp_loss": mtp_loss / num_drafted, "mtp_acceptance": num_accepted / num_drafted}
        return metrics

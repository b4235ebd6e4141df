"""What the vision tower has to do: counted on the host, of all ranks, for metrics."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from data.batch import MicroBatch
from models.qwen35_moe.model import Qwen35Moe
from parallelisms.mesh import Meshes
from training.flops import vision_flops


class VisionWork:
    """The tower's work in the steps since it was last read. Of a text model there is none: everything is empty."""

    def __init__(self, model: Qwen35Moe, meshes: Meshes) -> None:
        self._rank, self._num_ranks = meshes.data_parallel.get_local_rank(), meshes.data_parallel.size()
        self._vision = model.config.vision
        self._trains = (False, False)
        if model.visual is not None:
            before = (parameter for part in model.visual.before_merger for parameter in part.parameters())
            of_parts: tuple[Iterable, ...] = (before, model.visual.merger.parameters())
            blocks, merger = (any(parameter.requires_grad for parameter in part) for part in of_parts)
            self._trains = (blocks, merger)
        self._steps: list[Sequence[int]] = []

    def of(self, micro_batches: Sequence[MicroBatch]) -> list[int]:
        """This rank's step, on the host, to be added up over all ranks: tokens, FLOPs in thousands (a large step of a
        thousand GPUs has more than 2**63), and in the place of each rank its patches (those of the frame that a rank
        without any looks at too, which otherwise counts nowhere)."""
        if self._vision is None:
            return []
        num_tokens, flops, of_ranks = 0, 0, [0] * self._num_ranks
        for batch in micro_batches:
            assert batch.patches is not None
            lengths, shown = batch.patches.frames.lengths(), batch.patches.num_shown
            in_text = shown * self._vision.patches_per_token
            frames = [length for length, end in zip(lengths, accumulate(lengths)) if end <= in_text]
            num_tokens += shown
            flops += vision_flops(self._vision, frames, *self._trains)
            of_ranks[self._rank] += sum(lengths)
        return [num_tokens, flops // 1000, *of_ranks]

    def add(self, of_all: Sequence[int]) -> None:
        """A step's sums over all ranks."""
        self._steps.append(of_all)

    def read(self) -> tuple[dict[str, float], float]:
        """Metrics, and FLOPs; each the mean over the steps added since the last time."""
        steps, self._steps = self._steps, []
        if self._vision is None:
            return {}, 0.0
        uneven = [max(of_ranks) * len(of_ranks) / sum(of_ranks) for _, _, *of_ranks in steps]
        metrics = {
            "vision_tokens": sum(step[0] for step in steps) / len(steps),
            "patches_max_over_mean": sum(uneven) / len(steps),
        }
        return metrics, 1000 * sum(step[1] for step in steps) / len(steps)

"""Nobody reads what comes of fillers: whichever experts they go to, all that a step makes of a batch is the same."""

from dataclasses import replace

import pytest
import torch

from config.options import MoE
from data.batch import Frame
from models.qwen35_moe.config import FULL, LINEAR
from models.qwen35_moe.model import Qwen35Moe
from models.qwen35_moe.moe import Measure, MixtureOfExperts, RouterStatistics
from parallelisms.expert_parallel import deal_fillers
from tests.models.qwen35_moe.shapes import random_model, tiny_config
from tests.models.qwen35_moe.test_lora import with_adapters
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from tests.parallelisms.layouts import rows_as_micro_batch
from tests.parallelisms.test_layouts import relative_error
from training.load_balancing import measure_for, router_losses

CONFIG = tiny_config(num_hidden_layers=2, layer_types=(LINEAR, FULL), initializer_range=0.1)
MODELS = {
    "text": CONFIG,
    "multi-token prediction": replace(CONFIG, mtp_num_hidden_layers=1),
    "images": replace(CONFIG, mtp_num_hidden_layers=1, vision=tiny_vision()),
    "adapters": CONFIG,
}
ROWS = [[7, 5, 12], [9, 3, 12], [24]]  # fillers behind two documents, twice, and a row of nothing else
FRAMES = [[Frame(1, 2, 4)], [], []]
NUM_FILLERS = 12 + 12 + 24


def all_that_is_made(name: str) -> tuple[dict[str, torch.Tensor], RouterStatistics]:
    model: Qwen35Moe = random_model(MODELS[name]).double()
    if name == "adapters":
        model = with_adapters(model).double()
    frames = FRAMES if MODELS[name].vision else ()
    batch = rows_as_micro_batch(MODELS[name], ROWS, seed=3, frames=frames)
    is_real = torch.tensor([place < 12 for _ in ROWS[:2] for place in range(24)] + [False] * 24)
    assert int((~is_real).sum()) == NUM_FILLERS
    batch = replace(batch, labels=batch.labels.where(is_real, -100), tokens=batch.tokens.where(is_real, 5))
    batch = batch.with_mtp_labels() if MODELS[name].mtp_num_hidden_layers else batch
    moe = MoE(aux_loss_coef=0.3, z_loss_coef=0.1)
    output = model(batch, measure_for(moe, is_real), counts_accepted=True)
    aux, z = router_losses(output.statistics, moe, CONFIG.num_experts_per_tok)
    made = {"loss": output.result, "aux": aux, "z": z}
    if output.mtp_loss is not None:
        made |= {"mtp": output.mtp_loss, "accepted": output.num_accepted.double()}
    total = output.result + aux + z + (0 if output.mtp_loss is None else output.mtp_loss)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return made | dict(zip(trained, torch.autograd.grad(total, list(trained.values())))), output.statistics


@pytest.mark.parametrize("name", MODELS)
def test_experts_of_fillers_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, statistics = all_that_is_made(name)
    assert statistics.expert_counts[0].sum() == 24 * CONFIG.num_experts_per_tok
    route, num_dealt = MixtureOfExperts.route, 0

    def elsewhere(
        self: MixtureOfExperts, x: torch.Tensor, measure: Measure
    ) -> tuple[torch.Tensor, torch.Tensor, RouterStatistics]:
        nonlocal num_dealt
        weights, chosen, statistics = route(self, x, measure)
        dealt = deal_fillers(chosen, measure.is_real, self.num_experts)
        num_dealt += int((dealt != chosen).any(dim=1).sum())
        return weights, dealt, statistics

    monkeypatch.setattr(MixtureOfExperts, "route", elsewhere)
    found, after = all_that_is_made(name)
    assert num_dealt > NUM_FILLERS  # in several layers
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert relative_error(found[key], value) < 1e-12, key
    assert after.expert_counts.equal(statistics.expert_counts)

"""Multi-token prediction against an independent loop over each document's tokens: losses, gradients, statistics."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.batch import Frame, MicroBatch, Row
from models.ops.documents import Documents
from models.ops.labels import IGNORED
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.model import Output, Qwen35Moe
from models.qwen35_moe.moe import Measure
from models.qwen35_moe.mtp import mtp_labels
from models.qwen35_moe.parts import freeze, frozen_parts
from models.qwen35_moe.rotary import rotary_embedding
from tests.models.qwen35_moe.mtp_oracle import Drafts, drafts
from tests.models.qwen35_moe.shapes import random_model, random_stream, tiny_config
from tests.models.qwen35_moe.vision_shapes import tiny_vision
from tests.parallelisms.layouts import rows_as_micro_batch
from tests.parallelisms.test_layouts import relative_error

CONFIG = tiny_config(num_hidden_layers=2, layer_types=(LINEAR, FULL), initializer_range=0.1, mtp_num_hidden_layers=1)
# One token and two have no target; the last document is one that its row's end cuts.
LENGTHS = [7, 1, 2, 12, 3, 1, 9]
WEIGHT = 0.3


def packed(config: ModelConfig = CONFIG, share_trained: float = 1.0) -> MicroBatch:
    """Documents in a stream, of whose tokens a share is trained on."""
    tokens, positions, documents, labels = random_stream(config, LENGTHS, seed=5)
    labels[-1] = 5  # the token after the cut
    untrained = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) >= share_trained
    return MicroBatch(tokens, labels.masked_fill(untrained, IGNORED), positions, documents).with_mtp_labels()


class Oracle:
    """What the loop makes of a batch, in the precision of the model."""

    def __init__(self, model: Qwen35Moe, batch: MicroBatch, features: torch.Tensor | None = None) -> None:
        self.loss = self.mtp_loss = torch.zeros((), dtype=torch.float64)
        self.num_targets = self.num_accepted = 0
        self.counts = torch.zeros(model.config.num_experts, dtype=torch.int64)
        weights = dict(model.named_parameters())
        head = weights["embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"]
        embedded = F.embedding(batch.tokens, weights["embed_tokens.weight"])
        if features is not None:
            assert batch.patches is not None
            embedded = embedded.index_copy(0, batch.patches.places, features[: len(batch.patches.places)])
        for place in self._documents(batch.documents.lengths()):
            positions, labels = batch.positions[..., place].expand(3, -1), batch.labels[place]
            hidden = self._trunk(model, embedded[place], batch.positions[..., place])
            logits = hidden @ head.T
            self.loss = self.loss + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            found = drafts(model.config, weights, hidden, embedded[place], positions.T.tolist())
            self._add(found, labels.tolist(), logits.argmax(dim=-1).tolist())

    @staticmethod
    def _documents(lengths: Sequence[int]) -> Iterator[slice]:
        start = 0
        for length in lengths:
            yield slice(start, start + length)
            start += length

    @staticmethod
    def _trunk(model: Qwen35Moe, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """One document through the trunk, which other tests compare with transformers."""
        rotary, document = rotary_embedding(model.config, positions), Documents.from_lengths([len(hidden)])
        for layer in model.layers:
            hidden, _ = layer(hidden, rotary, document)
        return model.norm(hidden)

    def _add(self, found: Drafts, labels: list[int], preferred: list[int]) -> None:
        for i, (logits, chosen) in enumerate(zip(found.logits, found.chosen)):
            if (target := labels[i + 1]) != IGNORED:
                self.mtp_loss = self.mtp_loss - torch.log_softmax(logits, 0)[target]
                self.num_targets += 1
                self.num_accepted += int(logits.argmax()) == preferred[i + 1]
                self.counts[chosen] += 1


def gradients(model: Qwen35Moe, total: torch.Tensor) -> dict[str, torch.Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(trained, torch.autograd.grad(total, list(trained.values()))))


def run_batch(model: Qwen35Moe, batch: MicroBatch, measure: Measure | None = None) -> Output:
    return model(batch, measure or Measure(), counts_accepted=True)


def total_loss(loss: torch.Tensor, mtp_loss: torch.Tensor | None) -> torch.Tensor:
    assert mtp_loss is not None
    return loss + WEIGHT * mtp_loss


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("share_trained", [1.0, 0.5], ids=["text", "sft"])
def test_equals_the_loop(share_trained: float, tied: bool) -> None:
    config = replace(CONFIG, tie_word_embeddings=tied, vocab_size=7 if share_trained < 1 else 97)
    model, batch = random_model(config, dtype=torch.float64), packed(config, share_trained)
    oracle, output = Oracle(model, batch), run_batch(model, batch)
    check(model, oracle, output, batch)
    if share_trained < 1:
        assert 0 < oracle.num_accepted < oracle.num_targets  # of 7 tokens some are guessed
    else:
        # n - 2 of a whole document's n tokens, n - 1 of the cut one's.
        assert batch.num_drafted == sum(max(length - 2, 0) for length in LENGTHS) + 1


def check(model: Qwen35Moe, oracle: Oracle, output: Output, batch: MicroBatch) -> None:
    """Both in float64, but angles are computed in float32, to 6e-8 of a turn."""
    assert output.mtp_loss is not None
    assert oracle.num_targets == batch.num_drafted
    assert output.result.item() == pytest.approx(oracle.loss.item(), rel=1e-7)
    assert output.mtp_loss.item() == pytest.approx(oracle.mtp_loss.item(), rel=1e-7)
    assert output.num_accepted == oracle.num_accepted
    assert output.statistics.expert_counts[-1].tolist() == oracle.counts.tolist()
    expected = gradients(model, total_loss(oracle.loss, oracle.mtp_loss))
    worst = 0.0
    for name, gradient in gradients(model, total_loss(output.result, output.mtp_loss)).items():
        assert expected[name].any() or name.startswith("visual."), name
        worst = max(worst, relative_error(gradient, expected[name]))
    print(f"losses {output.mtp_loss.item() / oracle.mtp_loss.item() - 1:.1e}, gradients within {worst:.1e}")
    assert worst < 1e-6


def test_images_are_drafted_around_as_in_the_loop() -> None:
    """The next token's embedding is the image's feature where that is an image's; positions are those of the trunk."""
    vision = tiny_vision(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
    model = random_model(replace(CONFIG, vision=vision), dtype=torch.float64)
    rows, frames = [[12, 4], [16]], [[Frame(2, 4, 6), Frame(12, 2, 2)], [Frame(0, 4, 4)]]
    batch = rows_as_micro_batch(model.config, rows, 3, frames).with_mtp_labels()
    assert model.visual is not None
    oracle = Oracle(model, batch, model.visual(batch.patches))
    check(model, oracle, run_batch(model, batch), batch)


def test_packed_equals_alone() -> None:
    model, batch = random_model(CONFIG), packed()
    together = run_batch(model, batch)
    expected = gradients(model, total_loss(together.result, together.mtp_loss))
    alone: list[Output] = []
    for place in Oracle._documents(LENGTHS):
        document = Documents.from_lengths([place.stop - place.start])
        one = MicroBatch(batch.tokens[place], batch.labels[place], batch.positions[place], document)
        alone.append(run_batch(model, one.with_mtp_labels()))
    losses = [total_loss(output.result, output.mtp_loss) for output in alone]
    assert sum(losses).item() == pytest.approx(total_loss(together.result, together.mtp_loss).item(), rel=1e-6)
    assert together.num_accepted == sum(output.num_accepted for output in alone)
    for name, gradient in gradients(model, sum(losses)).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


def test_the_head_alone_learns_what_it_learns_jointly_and_nothing_else_does() -> None:
    model, batch = random_model(CONFIG), packed()
    output = run_batch(model, batch)
    jointly = gradients(model, total_loss(output.result, output.mtp_loss))
    freeze(model, frozen_parts((), "head"))
    output = run_batch(model, batch)
    assert not output.result.requires_grad
    alone = gradients(model, total_loss(output.result, output.mtp_loss))
    assert alone.keys() == {name for name in jointly if name.startswith("mtp.")}
    for name, gradient in alone.items():
        assert torch.equal(gradient, jointly[name]), name


def test_routers_count_tokens_with_a_target_alone() -> None:
    model, batch = random_model(CONFIG), packed(share_trained=0.5)
    fillers = replace(batch, is_real=torch.arange(len(batch.tokens)) < 25)
    statistics = run_batch(model, fillers, Measure(fillers.is_real, probabilities=True, logsumexp=True)).statistics
    top_k = CONFIG.num_experts_per_tok
    num_tokens = [25, 25, batch.num_drafted]
    assert statistics.expert_counts.sum(dim=1).tolist() == [top_k * number for number in num_tokens]
    assert statistics.probability_sums is not None
    assert statistics.probability_sums.sum(dim=1).tolist() == pytest.approx(num_tokens)


def test_labels_stay_in_their_documents() -> None:
    #        a document of four      two       one     cut by its row's end
    labels = [11, 12, 13, IGNORED, 21, IGNORED, IGNORED, 41, IGNORED, 43]
    expected = [12, 13, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, 43, IGNORED]
    assert mtp_labels(torch.tensor(labels), Documents.from_lengths([4, 2, 1, 3])).tolist() == expected


def test_fillers_have_no_labels() -> None:
    tokens, _, _, labels = random_stream(CONFIG, [5, 3])
    labels[5:] = IGNORED
    row = Row(tokens.int().numpy(), labels.int().numpy(), [5, 3], 3, (), [])
    batch = MicroBatch.of([row, row], may_fill=True).with_mtp_labels()
    assert batch.mtp_labels is not None
    assert batch.mtp_labels.tolist() == [*tokens[2:5].tolist(), *[IGNORED] * 5] * 2
    assert batch.num_drafted == 6


def test_without_labels_there_are_logits_alone() -> None:
    model, batch = random_model(CONFIG), packed()
    output = model(replace(batch, labels=None))  # type: ignore[arg-type]
    assert output.result.shape == (sum(LENGTHS), CONFIG.vocab_size)
    assert (output.mtp_loss, output.num_accepted) == (None, None)
    assert len(output.statistics.expert_counts) == CONFIG.num_hidden_layers

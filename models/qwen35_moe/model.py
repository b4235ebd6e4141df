"""Qwen3.5-MoE: embedding (and what the tower sees) -> blocks -> norm -> head. Plain PyTorch; knows no parallelism."""

from typing import NamedTuple, Protocol, cast

import torch
from torch import nn

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.ops.labels import IGNORED
from models.ops.linear_cross_entropy import linear_argmax, linear_cross_entropy
from models.qwen35_moe.block import Block
from models.qwen35_moe.config import FULL, ModelConfig
from models.qwen35_moe.head import Head, read_out
from models.qwen35_moe.moe import COUNTS_OF_ALL, Measure, RouterStatistics
from models.qwen35_moe.mtp import MultiTokenPrediction
from models.qwen35_moe.norms import RMSNorm
from models.qwen35_moe.patches import Patches
from models.qwen35_moe.rotary import rotary_embedding
from models.qwen35_moe.vision import VisionTower

# Shapes: T tokens (of all documents, end to end), H hidden, V vocabulary, E experts, L layers.


class Batch(Protocol):
    """What the model reads of a micro-batch. Not a tuple: see Documents."""

    @property
    def tokens(self) -> torch.Tensor: ...  # int64 [T]

    @property
    def positions(self) -> torch.Tensor: ...  # int64 [T], or [3, T] for time, height and width

    @property
    def documents(self) -> Documents: ...

    @property
    def labels(self) -> torch.Tensor | None: ...  # int64 [T], already shifted, IGNORED where nothing is trained

    @property
    def patches(self) -> Patches | None: ...  # read by a model with a tower alone, which always wants some

    @property
    def mtp_labels(self) -> torch.Tensor | None: ...  # int64 [T]: see mtp.py; read by a model with MTP alone


class Output(NamedTuple):
    """What a forward pass returns."""

    result: torch.Tensor
    """With labels the sum of the token losses in nats, a float32 scalar, else the logits [T, V]."""
    statistics: RouterStatistics
    """The routers', as `measure` asks for them, with the blocks as first dimension, that of multi-token prediction
    last: counts [L, E], probability sums [L, E], logsumexp sums [L]."""
    mtp_loss: torch.Tensor | None = None
    """Of multi-token prediction, as `result`; None without it or without labels."""
    num_accepted: torch.Tensor | None = None
    """int64 []: at how many tokens with an MTP label the draft is the token that the model itself prefers there. None
    if not asked for."""


class Qwen35Moe(nn.Module):
    """The model. Parameters are left uninitialised: see init.py; parameters.py makes a table of them.

    With `config.vision` there is a tower, `visual`: its features stand for the embeddings at the batch's places. With
    `config.mtp_num_hidden_layers` there is multi-token prediction, `mtp`, which runs where there are labels.
    With `tie_word_embeddings` there is no `lm_head`: the head reads `embed_tokens.weight`, so nothing can come untied.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.visual: VisionTower | None = None
        if config.vision:
            self.visual = VisionTower(config.vision, kernels.vision_attention(config.vision.head_dim))
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer_type, kernels) for layer_type in config.layer_types)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Head(config.hidden_size, config.vocab_size)
        self.mtp: MultiTokenPrediction | None = None
        if config.mtp_num_hidden_layers:
            self.mtp = MultiTokenPrediction(config, config.mtp_num_hidden_layers, kernels)

    @property
    def blocks(self) -> list[Block]:
        """The trunk's, and then those of multi-token prediction."""
        return cast(list[Block], list(self.layers)) + (self.mtp.blocks if self.mtp is not None else [])

    def float32_parameters(self) -> list[nn.Parameter]:
        """The few parameters that stay float32 in storage and arithmetic under bfloat16 training: decays, routers."""
        parameters = [block.mlp.gate.weight for block in self.blocks]
        for block in self.blocks:
            if block.layer_type != FULL:
                parameters += [block.linear_attn.A_log, block.linear_attn.dt_bias]
        return parameters

    def forward(self, batch: Batch, measure: Measure = COUNTS_OF_ALL, counts_accepted: bool = False) -> Output:
        """Runs one packed stream of documents. `counts_accepted`: drafts, where there is multi-token prediction."""
        rotary = rotary_embedding(self.config, batch.positions)
        embedded = self.embed_tokens(batch.tokens)
        if self.visual is not None:
            assert batch.patches is not None
            features, places = self.visual(batch.patches), batch.patches.places
            embedded = embedded.index_copy(0, places, features[: len(places)])
        hidden, of_layers = embedded, []
        for layer in self.layers:
            hidden, of_layer = layer(hidden, rotary, batch.documents, measure)
            of_layers.append(of_layer)
        hidden = self.norm(hidden)
        backend = self.kernels.cross_entropy
        if self.config.tie_word_embeddings:
            result = read_out(hidden, self.embed_tokens.weight, batch.labels, backend)
        else:
            result = self.lm_head(hidden, batch.labels, backend)
        if self.mtp is None or batch.labels is None:
            return Output(result, RouterStatistics.stack(of_layers))
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        labels = batch.mtp_labels
        assert labels is not None
        has_label = labels != IGNORED
        drafted, of_layer = self.mtp(hidden, embedded, rotary, batch.documents, measure._replace(is_real=has_label))
        statistics = RouterStatistics.stack([*of_layers, of_layer])
        mtp_loss = linear_cross_entropy(drafted, head.weight, labels, backend=backend)
        if not counts_accepted:
            return Output(result, statistics, mtp_loss)
        preferred = self.mtp.take_next(linear_argmax(hidden, head.weight))
        is_accepted = (linear_argmax(drafted, head.weight) == preferred) & has_label
        return Output(result, statistics, mtp_loss, is_accepted.sum())

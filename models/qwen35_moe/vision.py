"""The vision tower: patches of images and video frames -> blocks of full attention -> one feature for each token."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from models.ops.attention import attention
from models.ops.documents import Documents
from models.qwen35_moe.patches import Patches
from models.qwen35_moe.rotary import Rotary, apply_rotary
from models.qwen35_moe.vision_config import VisionConfig

# Shapes: P patches (of all frames, end to end), C hidden of the tower, N heads, K head dim, m patches that make one
# token (4), H hidden of the text.

EPS = 1e-6
"""Of every LayerNorm; no config.json tells it."""


class PatchEmbed(nn.Module):
    """A patch's pixels -> C. The published weight is a convolution's whose steps are as wide as its window: a matrix
    product for each patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        window = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel_size=window, stride=window)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [P, values of a patch] -> [P, C]; a value x counts as x / 127.5 - 1, in float32."""
        values = pixels.float() / 127.5 - 1
        weight = self.proj.weight
        return F.linear(values.to(weight.dtype), weight.flatten(1), self.proj.bias)


class VisionAttention(nn.Module):
    """Softmax attention of each patch to all of its frame."""

    def __init__(self, config: VisionConfig, backend: str) -> None:
        super().__init__()
        self.num_heads, self.backend = config.num_heads, backend
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor, rotary: Rotary, frames: Documents) -> torch.Tensor:
        """x [P, C] -> [P, C]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [P, N, K] each
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return self.proj(attention(q, k, v, frames, backend=self.backend, causal=False).flatten(1))


class VisionMLP(nn.Module):
    """C -> intermediate -> C, with GELU's tanh form between."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [P, C] -> [P, C]."""
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """norm -> attention -> residual -> norm -> MLP -> residual."""

    def __init__(self, config: VisionConfig, backend: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, EPS)
        self.attn = VisionAttention(config, backend)
        self.mlp = VisionMLP(config)

    def forward(self, hidden: torch.Tensor, rotary: Rotary, frames: Documents) -> torch.Tensor:
        """hidden [P, C] -> [P, C]."""
        hidden = hidden + self.attn(self.norm1(hidden), rotary, frames)
        return hidden + self.mlp(self.norm2(hidden))


class VisionMerger(nn.Module):
    """Each m patches that form a square -> one token of the text."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        merged = config.patches_per_token * config.hidden_size
        self.norm = nn.LayerNorm(config.hidden_size, EPS)
        self.linear_fc1 = nn.Linear(merged, merged)
        self.linear_fc2 = nn.Linear(merged, config.out_hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [P, C] -> [P / m, H]."""
        merged = self.norm(hidden).view(-1, self.linear_fc1.in_features)
        return self.linear_fc2(F.gelu(self.linear_fc1(merged)))


class VisionTower(nn.Module):
    """All of it. Parameters are left uninitialised: see init.py."""

    def __init__(self, config: VisionConfig, backend: str) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config, backend) for _ in range(config.depth))
        self.merger = VisionMerger(config)

    @property
    def vision_blocks(self) -> list[VisionBlock]:
        """`blocks` as what they are."""
        return cast(list[VisionBlock], list(self.blocks))

    @property
    def before_merger(self) -> list[nn.Module]:
        """All that a patch passes alone or with its frame: the part "vision" of parts.py."""
        return [self.patch_embed, self.pos_embed, *self.blocks]

    def forward(self, patches: Patches) -> torch.Tensor:
        """[P / m, H]: a feature for each token of the frames, in their order."""
        hidden = self.patch_embed(patches.pixels)
        hidden = hidden + self.position(patches.grid).to(hidden.dtype)
        rotary = vision_rotary(self.config, patches.grid)
        for block in self.blocks:
            hidden = block(hidden, rotary, patches.frames)
        return self.merger(hidden)

    def position(self, grid: torch.Tensor) -> torch.Tensor:
        """The learned positions [P, C], of a square of them that is stretched over each frame, corners on corners:
        bilinear, of the four around it, with weights and sum in float32."""
        side = self.config.grid_side
        row, column = (
            place.float() * (side - 1) / (length - 1).clamp(min=1)
            for place, length in ((grid[0], grid[2]), (grid[1], grid[3]))
        )
        total: torch.Tensor | None = None
        for rows, row_weight in _neighbours(row, side):
            for columns, column_weight in _neighbours(column, side):
                table = F.embedding(rows * side + columns, self.pos_embed.weight)
                part = table * (row_weight * column_weight)[:, None]
                total = part if total is None else total + part
        assert total is not None
        return total


def _neighbours(place: torch.Tensor, side: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The two whole numbers around each place, and their weights."""
    below = place.long()
    share = place - below
    return [(below, 1 - share), ((below + 1).clamp(max=side - 1), share)]


def vision_rotary(config: VisionConfig, grid: torch.Tensor) -> Rotary:
    """The rotation of each patch on two axes (axial RoPE): the first half of a head's pairs turns by its row, the other
    by its column, each by theta^(-4i / K). float32 [P, K / 2] both."""
    exponent = torch.arange(0, config.head_dim // 2, 2, device=grid.device).float() / (config.head_dim // 2)
    turns = grid[:2, :, None].float() * (1.0 / config.rope_theta**exponent)  # [2, P, K / 4]
    angles = torch.cat([turns[0], turns[1]], dim=-1)
    return Rotary(angles.cos(), angles.sin())

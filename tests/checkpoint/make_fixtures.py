"""Writes per-rank files and a DCP checkpoint with the torch that runs it, for tests to read with another.

python tests/checkpoint/make_fixtures.py FOLDER      makes FOLDER/torch-<version>
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    full = torch.arange(8 * 6).view(8, 6)
    cases = {
        "grid": (full.float(), ("replicate", "efsdp", "ep"), [Replicate(), Shard(1), Shard(0)]),
        "uneven": (full[:7].bfloat16(), ("replicate", "efsdp", "ep"), [Replicate(), Shard(0), Shard(0)]),
        "strided": (full.half(), ("efsdp", "ep"), [_StridedShard(0, split_factor=2), Shard(0)]),
        "smaller mesh": (full.double(), ("efsdp",), [Shard(0)]),
        "flattened": (full.float(), ("flat",), [Shard(0)]),
    }
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicate", "efsdp", "ep"))
        mesh["efsdp", "ep"]._flatten("flat")
        state: dict = {"plain": torch.nn.Parameter(full[0].float())}
        for name, (tensor, axes, placements) in cases.items():
            part = mesh[axes if len(axes) > 1 else axes[0]]
            local = tensor
            for axis, placement in enumerate(placements):
                if not isinstance(placement, Replicate):
                    parts, _ = placement._split_tensor(local, part.size(axis), with_padding=False)
                    local = parts[part.get_local_rank(axis)]
            state[name] = DTensor.from_local(
                local.clone(), part, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )
        torch.save(state, folder / f"model_world_size_8_rank_{rank}.pt")
        dist.destroy_process_group()
    expected = {"plain": full[0].tolist()} | {name: tensor.tolist() for name, (tensor, _, _) in cases.items()}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")
    dcp.save({"model.a": full.float(), "model.b": torch.tensor(3)}, checkpoint_id=folder / "dcp", no_dist=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / f"torch-{torch.__version__.partition('+')[0]}")

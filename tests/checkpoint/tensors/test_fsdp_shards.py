"""Per-rank FSDP2 files of any mesh and placements against the full tensor; replicas that differ; conversion of them.

DTensors are written without processes: a fake process group plays each rank in turn.
"""

import json
import random
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from checkpoint import convert_to_hf as to_hf
from checkpoint.tensors.fsdp_shards import _locate, _mesh_position, read_fsdp_shards
from checkpoint.tensors.torch_file import Stub, read_torch_file
from models.qwen35_moe.hf_weights import hf_name
from models.qwen35_moe.parameters import parameters
from tests.checkpoint.test_convert_to_hf import CONFIG, add_assets, random_weights
from tests.commands import status_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


def local_part(tensor: torch.Tensor, mesh: DeviceMesh, placements: list) -> torch.Tensor:
    """What torch itself gives this rank, one mesh axis after the other."""
    for axis, placement in enumerate(placements):
        if not isinstance(placement, Replicate):
            parts, _ = placement._split_tensor(tensor, mesh.size(axis), with_padding=False)
            tensor = parts[mesh.get_local_rank(axis)]
    return tensor.clone()


def as_dtensor(tensor: torch.Tensor, mesh: DeviceMesh, placements: list) -> DTensor:
    local = local_part(tensor, mesh, placements)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )


def write_ranks(folder: Path, world_size: int, state) -> None:
    """`state()` makes a rank's state dict, within a process group that takes it for that rank."""
    folder.mkdir()
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        torch.save(state(), folder / f"model_world_size_{world_size}_rank_{rank}.pt")
        dist.destroy_process_group()


def random_case(chance: random.Random) -> tuple[tuple[int, ...], list, tuple[int, ...], tuple[int, ...]]:
    """Mesh sizes, placements, the axes that the tensor's mesh has of them, and the tensor's shape."""
    sizes = tuple(chance.choice((1, 2, 2, 3, 4)) for _ in range(chance.randint(1, 3)))
    if prod(sizes) > 12:
        return random_case(chance)
    axes = tuple(sorted(chance.sample(range(len(sizes)), chance.randint(1, len(sizes)))))
    shape = tuple(chance.randint(1, 11) for _ in range(chance.randint(1, 3)))
    placements: list = []
    for position, _ in enumerate(axes):
        dim = chance.randrange(len(shape))
        later = prod(sizes[axis] for axis in axes[position + 1 :])
        # Strided shards are of FSDP over an axis that cut the same dimension before; torch wants them even.
        if shape[dim] % (later * sizes[axes[position]]) == 0 and chance.random() < 0.5:
            placements.append(_StridedShard(dim, split_factor=later))
        else:
            placements.append(chance.choice((Replicate(), Shard(dim), Shard(dim))))
    return sizes, placements, axes, shape


@pytest.mark.parametrize("seed", range(12))
def test_any_mesh_and_placements_give_the_full_tensor(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    sizes, _, _, _ = case = random_case(chance)
    cases = [case]
    while len(cases) < 8:
        if (other := random_case(chance))[0] == sizes:
            cases.append(other)
    tensors = [torch.randn(shape) for *_, shape in cases]
    names = tuple("abc"[: len(sizes)])

    def state() -> dict:
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        made = {"plain": torch.arange(5), "scalar": torch.tensor(3.0)}
        for number, (_, placements, axes, _) in enumerate(cases):
            part = mesh if len(axes) == len(sizes) else mesh[tuple(names[axis] for axis in axes)]
            made[f"t{number}"] = as_dtensor(tensors[number], part, placements)
        if len(sizes) > 1:
            made["flat"] = as_dtensor(torch.arange(31.0), mesh._flatten("flat"), [Shard(0)])
        return made

    write_ranks(tmp_path / "ranks", prod(sizes), state)
    read = read_fsdp_shards(tmp_path / "ranks")
    assert torch.equal(read["plain"].read(), torch.arange(5))
    assert read["scalar"].read() == 3
    for number, tensor in enumerate(tensors):
        assert torch.equal(read[f"t{number}"].read(), tensor), cases[number]
        if tensor.shape[0] > 2:
            assert torch.equal(read[f"t{number}"].read(((1, tensor.shape[0] - 1),)), tensor[1:-1]), cases[number]
    if len(sizes) > 1:
        assert torch.equal(read["flat"].read(), torch.arange(31.0))


def model_state(weights: dict[str, torch.Tensor], prefix: str = "") -> dict:
    """Expert axis of 4 on 8 ranks; router and shared expert on the smaller mesh beside it, norms plain."""
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("efsdp", "ep"))
    flat = mesh._flatten("fsdp")
    state: dict = {}
    for name, tensor in weights.items():
        key = name if name.startswith("lm_head") else prefix + name
        if ".experts." in name:
            state[key] = as_dtensor(tensor, mesh, [_StridedShard(0, split_factor=4), Shard(0)])
            if tensor.shape[0] % 8:
                state[key] = as_dtensor(tensor, mesh, [Shard(1), Shard(0)])
        elif ".mlp." in name:
            state[key] = as_dtensor(tensor, mesh["efsdp"], [Shard(0)])
        else:
            state[key] = tensor.clone() if parameters(CONFIG)[name].is_float32 else as_dtensor(tensor, flat, [Shard(0)])
    return state


def test_router_and_shared_expert_on_a_smaller_mesh_convert(tmp_path: Path) -> None:
    weights = random_weights()
    write_ranks(tmp_path / "ranks", 8, lambda: model_state(weights, "model."))
    add_assets(tmp_path / "ranks")
    assert status_of(to_hf.main, [str(tmp_path / "ranks"), str(tmp_path / "out"), "--dtype=keep", "--verify"]) == 0
    out = load_file(tmp_path / "out/model.safetensors")
    assert out.keys() == {hf_name(name) for name in weights}
    assert all(torch.equal(out[hf_name(name)], tensor) for name, tensor in weights.items())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    def state() -> dict:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        copy = torch.zeros(4)
        copy[3] = float("nan") if dist.get_rank() != 3 else 1.0
        return {"a": as_dtensor(copy, mesh, [Replicate(), Shard(0)]), "b": torch.zeros(2) + (dist.get_rank() == 2)}

    folder = tmp_path / "ranks"
    write_ranks(folder, 4, state)
    tensors = read_fsdp_shards(folder)
    with pytest.raises(ValueError, match=r"copies of 'a' in .*rank_1.pt and .*rank_3.pt differ"):
        tensors["a"].read()
    assert torch.equal(tensors["a"].read(((0, 2),)), torch.zeros(2))
    with pytest.raises(ValueError, match=r"copies of 'b' in .*rank_0.pt and .*rank_2.pt differ"):
        tensors["b"].read()
    path = folder / "model_world_size_4_rank_2.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"rank_2.pt is no archive .*: expected a file of torch.save"):
        read_fsdp_shards(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"rank_2.pt is missing"):
        read_fsdp_shards(folder)
    torch.save({"a": torch.zeros(4)}, path)
    with pytest.raises(ValueError, match=r"rank_2.pt does not hold the same tensors"):
        read_fsdp_shards(folder)
    path.write_bytes(whole)
    torch.save({}, folder / "model_world_size_2_rank_0.pt")
    with pytest.raises(ValueError, match=r"worlds of \[2, 4\] ranks"):
        read_fsdp_shards(folder)


def test_a_mesh_of_torch_before_2_10(tmp_path: Path) -> None:
    """It holds its ranks as a tensor, and a mesh that is a part of another holds those of this part alone."""
    torch.save({"whole": torch.tensor([[4, 5, 6], [0, 1, 2]]), "part": torch.tensor([1, 5])}, tmp_path / "mesh.pt")
    for (kind, rank), expected in {
        ("whole", 4): [(2, 0), (3, 0)],
        ("whole", 2): [(2, 1), (3, 2)],
        ("part", 5): [(2, 1)],
    }.items():
        mesh = Stub()
        mesh.state = {"mesh": read_torch_file(tmp_path / "mesh.pt")[kind]}
        assert _mesh_position(mesh, rank) == expected


@pytest.mark.parametrize("version", sorted(path.name for path in FIXTURES.glob("torch-*")))
def test_files_of_other_torch_versions(version: str) -> None:
    folder = FIXTURES / version
    expected = {
        name: torch.tensor(values) for name, values in json.loads((folder / "expected.json").read_text()).items()
    }
    tensors = read_fsdp_shards(folder)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(tensors[name].read().double(), values.double()), name


@pytest.mark.parametrize(
    ("shape", "factor", "message"),
    [((2**40,), 4, "strided shards"), ((8,), 0, "of 0 parts"), ((8,), -3, "of -3 parts"), ((8,), 2**60, "")],
)
def test_a_strided_shard_counts_no_further_than_a_tensor_reaches(
    tmp_path: Path, shape: tuple[int, ...], factor: int, message: str
) -> None:
    def stub(name: str, **state: object) -> Stub:
        value = type("Stub", (Stub,), {"name": name})()
        value.state = state
        return value

    torch.save({"mesh": torch.tensor([0, 1]), "local": torch.zeros(4)}, tmp_path / "a.pt")
    stored = read_torch_file(tmp_path / "a.pt")
    meta = stub("TensorMeta")
    meta.args = (torch.Size(shape),)
    placement = stub("_StridedShard", dim=0, split_factor=factor)
    spec = stub("DTensorSpec", tensor_meta=meta, mesh=stub("DeviceMesh", mesh=stored["mesh"]), placements=(placement,))
    value = stub("DTensor", _spec=spec, _local_tensor=stored["local"])
    if message:
        with pytest.raises(ValueError, match=message):
            _locate(value, 0)
    else:  # more parts than elements: one each, and the first of each two for the first rank
        assert _locate(value, 0)[2] == [list(range(8))]

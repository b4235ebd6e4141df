"""Reads a directory of per-rank FSDP2 files, `model_world_size_{W}_rank_{R}.pt`, each a dict of DTensors and tensors.

A DTensor's pickle has its placements and its mesh. From the sizes and strides of the mesh's axes follows each rank's
coordinate, and from coordinate and placements the part of the tensor that its local tensor is: no process group and
no GPU takes part. What several ranks hold must be equal bit for bit.
"""

import re
from collections.abc import Sequence
from itertools import groupby, product
from math import prod
from pathlib import Path

from checkpoint.tensors.stored import Chunk, StoredArray, StoredTensor
from checkpoint.tensors.torch_file import Stub, read_torch_file
from errors import UserError, reading
from models.qwen35_moe.parameters import Shape

_NAME = re.compile(r"model_world_size_([1-9][0-9]{0,17})_rank_(0|[1-9][0-9]{0,17})\.pt")
_MAX_STRIDED = 2**22
"""Of a dimension in strided shards, whose indices are counted one by one."""


def is_shard_directory(folder: Path) -> bool:
    """Whether `folder` holds per-rank files."""
    return any(_NAME.fullmatch(path.name) for path in folder.glob("model_world_size_*.pt"))


def read_fsdp_shards(folder: Path) -> dict[str, StoredTensor]:
    """All tensors, by name. Raises UserError naming a file or tensor that is missing or does not fit the others."""
    found = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    (world_size, *others) = {int(match[1]) for match in found}
    if others:
        raise UserError(f"{folder} has files of worlds of {sorted([world_size, *others])} ranks: expected one")
    there = {int(match[2]) for match in found}
    # One more than there are is enough to find one that is missing, whatever number a name tells.
    for rank in range(min(world_size, len(there) + 1)):
        if rank not in there:
            raise UserError(f"{folder / f'model_world_size_{world_size}_rank_{rank}.pt'} is missing")
    paths = [folder / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
    ranks = [read_torch_file(path) for path in paths]
    for path, values in zip(paths, ranks):
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise UserError(f"{path} is no dictionary of tensors by their names")
        if values.keys() != ranks[0].keys():
            raise UserError(f"{path} does not hold the same tensors as {paths[0].name}")
    return {name: _assemble(name, [values[name] for values in ranks], paths) for name in ranks[0]}


def _assemble(name: str, values: Sequence[StoredArray | Stub], paths: list[Path]) -> StoredTensor:
    chunks: dict[object, Chunk] = {}
    shapes, dtypes = set(), set()
    for rank, (value, path) in enumerate(zip(values, paths)):
        with reading(f"{name!r} in {path}"):
            shape, local, indices = _locate(value, rank)
        if local.shape != tuple(map(len, indices)):
            raise UserError(
                f"{name!r} in {path} has a local shape of {list(local.shape)}: its placements make it "
                f"{[len(dim) for dim in indices]}"
            )
        shapes.add(shape)
        dtypes.add(local.dtype)
        for runs in product(*map(_runs, indices)):
            box = tuple((first, first + length) for first, _, length in runs)
            chunk = Chunk(box, local.part(tuple((start, start + length) for _, start, length in runs)))
            if box in chunks:
                chunks[box].copies.append(chunk)
            else:
                chunks[box] = chunk
    if len(shapes) > 1 or len(dtypes) > 1:
        raise UserError(f"{name!r} differs between ranks in shape or dtype: {shapes}, {dtypes}")
    return StoredTensor(name, shapes.pop(), dtypes.pop(), list(chunks.values()))


def _locate(value: StoredArray | Stub, rank: int) -> tuple[Shape, StoredArray, list[Sequence[int]]]:
    """The whole tensor's shape, this rank's array, and for each dimension the indices that the array has of it."""
    if isinstance(value, StoredArray):
        return value.shape, value, [range(size) for size in value.shape]
    spec, local = value._spec, value._local_tensor
    shape = tuple(spec.tensor_meta.args[0])
    indices: list[Sequence[int]] = [range(size) for size in shape]
    mesh = _mesh_position(spec.mesh, rank)
    if len(mesh) != len(spec.placements):
        raise UserError(f"{len(spec.placements)} placements on a mesh of {len(mesh)} axes")
    for (size, coordinate), placement in zip(mesh, spec.placements):
        kind = type(placement).name
        if kind in ("Shard", "_StridedShard"):
            dim = placement.dim % len(shape)
            if kind == "Shard":
                indices[dim] = _chunk(indices[dim], size, coordinate)
                continue
            # First into `split_factor` parts, as if the axes to the right had cut it already; then each over this axis.
            factor = placement.split_factor
            if factor < 1 or len(indices[dim]) > _MAX_STRIDED:
                raise ValueError(f"dimension {dim} of {len(indices[dim])} has strided shards of {factor} parts")
            parts = (_chunk(indices[dim], factor, part) for part in range(min(factor, len(indices[dim]))))
            indices[dim] = [index for part in parts for index in _chunk(part, size, coordinate)]
        elif kind != "Replicate":
            raise UserError(f"its placement is {kind}: expected shards and replicas")
    return shape, local, indices


def _chunk(indices: Sequence[int], parts: int, part: int) -> Sequence[int]:
    """One of the parts that torch.chunk makes, with empty ones at the end."""
    size = -(-len(indices) // parts)
    return indices[part * size : (part + 1) * size]


def _runs(indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """Consecutive indices as (first index, position in the list, length)."""
    if isinstance(indices, range):
        return [(indices.start, 0, len(indices))] if indices else []
    groups = groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])
    runs = [list(group) for _, group in groups]
    return [(run[0][1], run[0][0], len(run)) for run in runs]


def _mesh_position(mesh: Stub, rank: int) -> list[tuple[int, int]]:
    """(size of the axis, this rank's coordinate on it) for each axis of a mesh.

    A mesh tells its ranks as `_layout` and `_rank_map` (torch 2.10 and later) or as a tensor `mesh` (earlier).
    """
    if "_layout" not in mesh.state:
        shape = mesh.mesh.shape
        position = mesh.mesh.read().flatten().tolist().index(rank)
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return [(size, position // stride % size) for size, stride in zip(shape, strides)]
    layout = mesh._layout
    axes = [(axis.shape, axis.stride) for axis in layout.axes] if "axes" in layout.state else None
    axes = axes or list(zip(_as_tuple(layout.shape), _as_tuple(layout.stride)))
    position = list(mesh._flatten_rank_map).index(rank)
    result = []
    for sizes, strides in axes:
        # An axis that joins several counts through them, the last one fastest.
        size, coordinate = 1, 0
        for inner, stride in zip(_as_tuple(sizes), _as_tuple(strides)):
            size, coordinate = size * inner, coordinate * inner + position // stride % inner
        result.append((size, coordinate))
    return result


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)

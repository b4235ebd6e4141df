"""Every name that the project takes from torch's private modules, and the public way where there is one.

torch may move or change them in any release; those that pyproject.toml admits have been tried.
"""

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.storage import _storage_type_to_dtype_map as storage_types
from torch.utils._pytree import tree_leaves

__all__ = [
    "ReduceScatter",  # the base class for FSDPModule.set_custom_reduce_scatter, which is public; it is not
    "StorageInfo",  # what DCP's index says of where a tensor's bytes are; there is no public way to write one
    "all_to_all_single_autograd",  # torch.distributed.all_to_all_single has no gradient and breaks the graph
    "compute_local_shape_and_global_offset",  # DTensor tells its local tensor, but not where that lies
    "default_cache_dir",  # where torch.compile keeps what it makes, which its import writes into the environment
    "free_what_was_gathered",
    "fsdp_collectives",  # see fsdp_copies.py: there is no other way
    "functional_collectives",
    "mark_dynamic",
    "set_recompile_limit",
    "storage_types",  # by the names that files use; the public classes name their dtype one by one
    "tree_leaves",  # public in torch.utils.pytree from a later release on
]

fsdp_collectives = _fsdp_collectives
functional_collectives = torch.ops._c10d_functional
"""As operations, which activation checkpointing can keep; the functions around them are private too."""

mark_dynamic = torch._dynamo.maybe_mark_dynamic
"""torch._dynamo.mark_dynamic, which is documented, fails where the compiler finds a size to be fixed."""


def free_what_was_gathered(unit: FSDPModule) -> None:
    """Has what this unit's weights are copied from go at once. Else FSDP keeps it, in a forward pass, until the next
    unit has been copied; of the last one that is the end of the pass."""
    unit._set_unshard_async_op(True)


def set_recompile_limit(limit: int) -> None:
    """torch.compiler.config, the public one, does not have it."""
    torch._dynamo.config.recompile_limit = limit

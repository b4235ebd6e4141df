"""Where a rank's part of a parameter lies, what stays gathered, and gradients outside FSDP: one sum over all ranks."""

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from models.qwen35_moe import head
from models.qwen35_moe.config import ModelConfig
from models.qwen35_moe.parameters import Box
from models.qwen35_moe.parts import PARTS, part_of
from parallelisms.parallelize import local_region, reduce_replicated_gradients
from tests.distributed import run_ranks
from tests.models.qwen35_moe.shapes import tiny_config
from tests.parallelisms.layouts import Layout, build, own_batches, step

CONFIG = tiny_config(vocab_size=47)  # which 4 ranks share unevenly


def regions(layout: Layout) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], Box]]:
    """Each parameter's whole shape, and this rank's part: its shape, and where it lies."""
    model, _, _ = build(CONFIG, layout)
    found = {}
    for name, parameter in model.named_parameters():
        local, box = local_region(parameter)
        found[name] = (tuple(parameter.shape), tuple(local.shape), box)
    return found


def test_the_parts_of_all_ranks_cover_a_parameter_once() -> None:
    for layout in (Layout(world=4), Layout(world=4, ep=2), Layout(world=4, ep=4)):
        of_ranks = run_ranks(regions, 4, layout)
        for name, (shape, _, _) in of_ranks[0].items():
            count = torch.zeros(shape, dtype=torch.int32)
            for found in of_ranks:
                _, local_shape, box = found[name]
                assert local_shape == tuple(stop - start for start, stop in box), (layout, name)
                count[tuple(slice(start, stop) for start, stop in box)] += 1
            is_replicated = name.endswith(("A_log", "dt_bias", "mlp.gate.weight"))
            assert (count == (4 if is_replicated else 1)).all(), (layout, name)


def gathered(
    layouts: list[Layout], frozen: tuple[str, ...], config: ModelConfig = CONFIG
) -> list[tuple[list[bool], list[bool]]]:
    """Of each block, whether its dense weights lie whole in memory between forward and backward, and its experts' so
    far as `ep` leaves them to this rank."""
    found = []
    for layout in layouts:
        model, _, _ = build(config, layout, torch.bfloat16, is_trained=lambda name: part_of(name) not in frozen)
        model(own_batches(config, layout, [[4]] * layout.world, seed=0)[0])
        dense = [block.mlp.shared_expert.up_proj.weight for block in model.blocks]
        # FSDP's own part at ep > 1 is of both axes; what it gathers is still a DTensor of ep's.
        experts = [block.mlp.experts.down_proj for block in model.blocks]
        found.append(([not isinstance(each, DTensor) for each in dense], [_is_whole(each, layout) for each in experts]))
    return found


def _is_whole(experts: torch.Tensor, layout: Layout) -> bool:
    local = experts.to_local() if isinstance(experts, DTensor) else experts
    return local.numel() * layout.ep == CONFIG.num_experts * CONFIG.hidden_size * CONFIG.moe_intermediate_size


def test_weights_are_freed_after_the_forward_pass_where_they_are_sharded() -> None:
    all_kept, last, last_unit = [True] * 4, [False] * 3 + [True], [False, False, True, True]
    cases = {
        Layout(): (all_kept, all_kept),
        Layout(world=2, replicate=2): (all_kept, all_kept),
        Layout(world=2): (last, last),
        Layout(world=2, reshard="never"): (all_kept, all_kept),
        # Small dense weights are kept; else the last unit is, which has two blocks.
        Layout(world=4, ep=2): (all_kept, last),
        Layout(world=4, ep=2, reshard="always"): (last_unit, last),
        Layout(world=4, ep=2, reshard="never"): (all_kept, all_kept),
    }
    for world in (1, 2, 4):
        layouts = [layout for layout in cases if layout.world == world]
        assert run_ranks(gathered, world, layouts, ()) == [[cases[layout] for layout in layouts]] * world


def test_what_has_no_backward_pass_is_not_kept() -> None:
    # Attention of the last block is the first to train: it has full attention, the others linear.
    frozen = tuple(set(PARTS) - {"attention"})
    config = replace(CONFIG, num_hidden_layers=6, layer_types=(CONFIG.layer_types[0],) * 5 + CONFIG.layer_types[-1:])
    layouts = [Layout(world=4, ep=2), Layout(world=4, ep=2, reshard="never")]
    of_blocks = [([False] * 4 + [True] * 2, [False] * 5 + [True])] * 2
    assert run_ranks(gathered, 4, layouts, frozen, config) == [of_blocks] * 4


def held_at_the_loss(layouts: list[Layout]) -> list[tuple[int, bool]]:
    """Of each layout, how many blocks of memory as large as the whole head there are while the loss is computed, and
    whether FSDP holds what it gathered weights into."""
    config, found = tiny_config(vocab_size=1000), list[tuple[int, bool]]()
    for layout in layouts:
        model, _, _ = build(config, layout, torch.bfloat16)
        batch = own_batches(config, layout, [[4]] * layout.world, seed=0)[0]

        def note(hidden: torch.Tensor, *_: Any, model: Any = model, **__: Any) -> torch.Tensor:
            gc.collect()
            tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
            tensors = [each for each in tensors if each.dtype == torch.bfloat16]  # no shards
            blocks = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}
            number = sum(size == 2 * config.vocab_size * config.hidden_size for size in blocks.values())
            found.append((number, model._get_fsdp_state()._comm_ctx.all_gather_state is not None))
            return hidden.sum()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(head, "linear_cross_entropy", note)
            model(batch)
    return found


def test_weights_are_in_memory_once_as_the_loss_is_computed() -> None:
    # The embedding, which the root keeps, and the head.
    layouts = [Layout(world=4), Layout(world=4, ep=2), Layout(world=4, ep=4), Layout(world=4, replicate=2)]
    assert run_ranks(held_at_the_loss, 4, layouts) == [[(2, False)] * 4] * 4


def sums() -> tuple[list[list[float]], float]:
    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[2].requires_grad_(False)
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, rank]), torch.tensor([10.0])
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    (loss,) = reduce_replicated_gradients(parameters, torch.tensor([0.5 * rank]), mesh)
    return [parameter.grad.tolist() for parameter in parameters[:2] if parameter.grad is not None], loss.item()


def test_gradients_outside_fsdp_are_summed_with_the_loss() -> None:
    assert run_ranks(sums, 1) == [([[1.0, 0.0], [10.0]], 0.0)]
    assert run_ranks(sums, 4) == [([[4.0, 6.0], [40.0]], 3.0)] * 4


def steps_that_add_up() -> list[bool]:
    """Of two micro-batches, whether FSDP's reduction was told that gradients are there, in each backward pass."""
    layout = Layout(accumulation=2)
    model, meshes, optimizer = build(tiny_config(), layout, torch.bfloat16)
    told: list[bool] = []
    reduce = model.nothing_to_reduce
    allocate = reduce.allocate

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        told.append(reduce.adds_up)
        return allocate(*args, **kwargs)

    reduce.allocate = record
    for seed in range(2):
        step(model, meshes, optimizer, own_batches(tiny_config(), layout, [[10, 54], [40, 24]], seed))
    return [told[0], *(b for a, b in itertools.pairwise(told) if a != b)]


def test_the_first_micro_batch_of_each_step_finds_no_gradients() -> None:
    assert run_ranks(steps_that_add_up, 1) == [[False, True, False, True]]

"""What the compiler keeps of each kind of layer, counted, against the planner's formulas."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from models.ops.documents import Documents
from models.ops.kernels import Kernels
from models.qwen35_moe.block import Block
from models.qwen35_moe.config import FULL, LINEAR, ModelConfig
from models.qwen35_moe.rotary import Rotary
from parallelisms.activation_checkpoint import apply_activation_checkpointing
from parallelisms.degrees import Degrees
from training.formulas import backward_of_delta_rule, backward_of_layer, held_at_delta_rule, kept_by_layer, sizes

# No two widths have the ratio that they have in the other shape, so that a term that is missing, or of another width,
# shows in one of them.
SHAPES = {
    "35B-A3B": {},
    "other widths": {
        "hidden_size": 1536,
        "num_attention_heads": 12,
        "num_key_value_heads": 3,
        "linear_num_key_heads": 5,
        "linear_num_value_heads": 20,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 640,
        "shared_expert_intermediate_size": 1152,
    },
}
CASES = [(name, kind, mode) for name in SHAPES for kind in (LINEAR, FULL) for mode in ("none", "selective", "full")]
ONE = Degrees(1, 1, 1, 1)


# What models/ops/causal_conv1d_triton.py has of the convolution, but for its kernels: Triton is not there on every CPU.
@torch.library.custom_op("qwen35_moe_tests::convolution", mutates_args=())
def convolution(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, widths: list[int]) -> list[torch.Tensor]:
    raise NotImplementedError


@torch.library.custom_op("qwen35_moe_tests::convolution_backward", mutates_args=())
def convolution_backward(
    gradients: list[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


convolution.register_fake(lambda x, weight, offsets, widths: [x.new_empty(x.shape[0], width) for width in widths])
convolution_backward.register_fake(lambda _, x, weight, __: (torch.empty_like(x), torch.empty_like(weight)))
convolution.register_autograd(
    lambda ctx, gradients: (*convolution_backward(gradients, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
)


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(forward=convolution)
    monkeypatch.setattr("models.ops.causal_conv1d.causal_conv1d_triton", stand_in, raising=False)


class Counted(NamedTuple):
    """Bytes."""

    kept: int
    backward: fx.GraphModule


def count(shape: ModelConfig, mode: str, num_tokens: int) -> Counted:
    """What a block without memory hands from its forward to its backward pass, in the graphs that the compiler makes
    for the kernels of a GPU; without its parameters, and without rotary angles, which all layers share."""
    torch.compiler.reset()
    graphs: list[fx.GraphModule] = []
    partition = functools.partial(min_cut_rematerialization_partition, compiler="inductor")

    def keep(module: fx.GraphModule, _: Any) -> Callable:
        graphs.append(module)
        return module

    backend = aot_autograd(fw_compiler=keep, partition_fn=partition, decompositions=select_decomp_table)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            block = Block(shape, shape.layer_types[0], Kernels("varlen", "fla", "triton", "compiled"))
            hidden = torch.empty(num_tokens, shape.hidden_size, requires_grad=True)
            rotary = Rotary(*torch.empty(2, num_tokens, shape.rotary_dim // 2, dtype=torch.float32))
            bounds, offsets = torch.empty(2, dtype=torch.int32), torch.empty(num_tokens, dtype=torch.int32)
    finally:
        torch.set_default_dtype(before)
    documents = Documents(bounds, torch.tensor([0, num_tokens], dtype=torch.int32), offsets, num_tokens)
    apply_activation_checkpointing([(block, "forward")], mode)
    others = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *rotary, offsets)}
    storages: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in others:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = torch.compile(block, backend=backend)(hidden, rotary, documents)[0]
        out.backward(torch.empty_like(out))
    _, backward = graphs
    return Counted(sum(storage.nbytes() for storage in storages.values()), backward)


@functools.cache
def counted(name: str, kind: str, mode: str) -> tuple[ModelConfig, float, fx.GraphModule, int]:
    """Shape; bytes kept for each token, the difference of two runs; the backward pass and its tokens."""
    shape = ModelConfig(num_experts=32, num_hidden_layers=1, layer_types=(kind,), **SHAPES[name])
    few, many = count(shape, mode, 4999), count(shape, mode, 10007)  # primes: no width is a multiple
    return shape, (many.kept - few.kept) / 5008, many.backward, 10007


@pytest.mark.parametrize(("name", "kind", "mode"), CASES)
def test_what_a_layer_keeps_is_as_counted(name: str, kind: str, mode: str) -> None:
    shape, kept, _, _ = counted(name, kind, mode)
    formula = kept_by_layer(shape, kind, mode, ONE)
    print(f"{name} {kind} {mode}: {formula:,.0f}, counted {kept:,.0f}")
    assert formula == pytest.approx(kept, rel=0.002)


@pytest.mark.parametrize(("name", "kind", "mode"), CASES)
def test_what_is_alive_in_a_layers_backward_pass_is_as_counted(name: str, kind: str, mode: str) -> None:
    shape, _, backward, num_tokens = counted(name, kind, mode)
    alive, at_rule = (each / num_tokens for each in worst_moments(backward, num_tokens))
    formula = backward_of_layer(shape, kind, mode, ONE)
    print(f"{name} {kind} {mode}: {formula:,.0f}, counted {alive:,.0f}")
    assert formula == pytest.approx(alive, rel=0.015)
    if kind == LINEAR:
        assert held_at_delta_rule(shape, mode) == pytest.approx(at_rule, rel=0.002)


def test_the_delta_rules_kernels_take_states_for_chunks_and_for_documents() -> None:
    shape, tokens, state = ModelConfig.from_dict({}), 16384, 32 * 128 * 128
    held = tokens * held_at_delta_rule(shape, "selective")

    def own(num_chunks: int, num_documents: int, degrees: Degrees = ONE) -> float:
        of = backward_of_delta_rule(shape, "selective", degrees, tokens, num_chunks, num_documents)
        return of - held

    assert own(512, 4) - own(256, 4) == 256 * 2 * state  # bfloat16
    assert own(4096, 4096) - own(4096, 2048) == 2048 * 3 * 4 * state  # float32, of which two are never read
    # As allocated by flash-qla when its gradients are added up: v, states, and dq and dk of each of v's heads.
    assert own(256, 4) == tokens * 4096 * 2 * 3 + 256 * 2 * state
    assert own(512, 4, Degrees(1, 1, 1, 2)) == own(256, 4)  # shared tokens: all of them, of half the heads


# What the compiler does not fuse into one kernel with its neighbours.
KERNELS = ("mm", "_grouped_mm", "sort", "topk", "scatter", "scatter_add", "cumsum", "searchsorted", "sum", "mean")
VIEWS = ("view", "alias", "permute", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "getitem")


def worst_moments(graph: fx.GraphModule, num_tokens: int) -> tuple[int, int]:
    """The most bytes that grow with the tokens and are alive together, and those when the delta rule's gradients are
    there (0 without one), if every elementwise operation is done where its
    result is read by a kernel, every tensor goes when it was read last, and what is computed again of the experts' rows
    is one kernel, as the compiler has it, with a gradient that reads the same: SwiGLU's."""

    def name_of(node: fx.Node) -> str:
        return getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))

    def is_kernel(node: fx.Node) -> bool:
        return getattr(node.target, "namespace", "").startswith("qwen35_moe") or name_of(node) in KERNELS

    @functools.cache
    def root(node: fx.Node) -> fx.Node:
        is_view = node.op == "call_function" and name_of(node).removesuffix("_copy") in (*VIEWS, "split_with_sizes")
        return root(node.all_input_nodes[0]) if is_view else node

    nodes = list(graph.graph.nodes)
    made = {node for node in nodes if node.op == "placeholder" or is_kernel(node)}
    for node in nodes:
        if node.op == "output" or is_kernel(node):
            made |= {root(read) for read in node.all_input_nodes}

    @functools.cache
    def sources(node: fx.Node) -> frozenset[fx.Node]:
        node = root(node)
        return frozenset([node]) if node in made else frozenset().union(*map(sources, node.all_input_nodes))

    def size(node: fx.Node) -> int:
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
        tensors = [each for each in values if isinstance(each, torch.Tensor) and each.numel() % num_tokens == 0]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.dim())

    of_tokens = {node: size(node) for node in made if node.op != "output"}
    last = {read: i for i, node in enumerate(nodes) if node in made or node.op == "output"
            for of in node.all_input_nodes for read in sources(of)}  # fmt: skip

    @functools.cache
    def needs(node: fx.Node) -> frozenset[fx.Node]:
        return frozenset([node]).union(*(needs(read) for read in node.all_input_nodes))

    elementwise = [node for node in nodes if node in made and node.op == "call_function" and not is_kernel(node)]

    def read_by(node: fx.Node) -> frozenset[fx.Node]:
        return frozenset().union(*map(sources, node.all_input_nodes))

    def made_with(node: fx.Node, exist: set[fx.Node]) -> int:
        """Of the largest operation that is one kernel with this one: what it makes, and what must be there before."""
        rows, is_gradient = node.meta["val"].shape[0], any("tangents" in read.name for read in needs(node))
        if rows == num_tokens or is_gradient:
            return 0
        others = [each for each in elementwise if each.meta["val"].shape[0] == rows and node not in needs(each)]
        large = {read for read in read_by(node) if of_tokens[read] >= of_tokens[node]}
        sharing = [{each, *read_by(each)} - exist for each in others if large & read_by(each)]
        return max((sum(map(of_tokens.__getitem__, missing)) for missing in sharing), default=0)

    alive = sum(of_tokens[node] for node in made if node.op == "placeholder")
    worst, at_rule, exist = alive, 0, {node for node in made if node.op == "placeholder"}
    for i, node in enumerate(nodes):
        if node in made and node.op == "call_function":
            alive += of_tokens[node]
            exist.add(node)
            at_rule = alive if name_of(node) == "gated_delta_rule_backward" else at_rule
            worst = max(worst, alive + (made_with(node, exist) if node in elementwise else 0))
        alive -= sum(of_tokens[read] for read, at in last.items() if at == i)
    return worst, at_rule


def test_sizes_are_the_models() -> None:
    of = sizes(ModelConfig.from_dict({}), 1)
    assert of.total == 34_660_610_688  # 35B-A3B's
    assert of.experts == 40 * 256 * 3 * 2048 * 512
    assert (of.root, of.head) == (2 * 248320 * 2048 + 2048, 0)
    sharded = sizes(ModelConfig.from_dict({}), 2)
    assert (sharded.root, sharded.head) == (248320 * 2048 + 2048, 248320 * 2048)

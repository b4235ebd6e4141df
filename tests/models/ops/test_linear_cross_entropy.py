"""The fused head and loss against F.cross_entropy on all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import models.ops.linear_cross_entropy as module
from models.ops.linear_cross_entropy import linear_argmax, linear_cross_entropy
from tests.models.ops.compare import OperationLog, assert_close, relative_error, run

HIDDEN, VOCABULARY = 6, 11


def make_inputs(
    num_tokens: int, share_trained: float = 0.7, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(hidden, weight), labels."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) >= share_trained] = -100
    return [hidden.to(dtype), weight.to(dtype)], labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100, reduction="sum")


def test_the_largest_logit_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden, weight), _ = make_inputs(40)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * VOCABULARY * 7)  # 7 tokens
    with OperationLog() as log:
        found = linear_argmax(hidden, weight)
    assert torch.equal(found, (hidden @ weight.T).argmax(dim=-1))
    assert num_matmuls(log) == 6
    assert max(size for name, size in zip(log.names, log.sizes) if name == "mm") == 7 * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_the_reference(dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(40, dtype=dtype)
    expected = run(lambda *x: linear_cross_entropy(*x, labels, 15), inputs)
    actual = run(lambda *x: linear_cross_entropy(*x, labels, 15, backend="compiled"), inputs)
    # float32: sums in another order. bfloat16: a probability at a rounding's edge goes the other way, 0.4% of it.
    assert_close(actual, expected, {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype])


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 45), st.sampled_from([0.0, 0.3, 1.0]))
def test_equals_cross_entropy(num_tokens: int, chunk_size: int, share_trained: float) -> None:
    # 1e-12: float64 sums of at most 40 token losses.
    inputs, labels = make_inputs(num_tokens, share_trained)
    actual = run(lambda *x: linear_cross_entropy(*x, labels, chunk_size), inputs)
    assert_close(actual, run(lambda *x: plain(*x, labels), inputs), 1e-12)


@pytest.mark.parametrize("num_tokens", [15, 16, 17, 32, 33])
def test_chunk_borders(num_tokens: int) -> None:
    inputs, labels = make_inputs(num_tokens)
    actual = run(lambda *x: linear_cross_entropy(*x, labels, 16), inputs)
    assert_close(actual, run(lambda *x: plain(*x, labels), inputs), 1e-12)


def test_large_logits_do_not_overflow() -> None:
    (hidden, weight), labels = make_inputs(20, dtype=torch.float32)
    inputs = [1000 * hidden, weight]
    expected = run(lambda *x: plain(*x, labels), [x.double() for x in inputs])
    # 1e-4: logits of a thousand are rounded at 6e-5, and the softmax is as far off.
    assert_close(run(lambda *x: linear_cross_entropy(*x, labels, 7), inputs), expected, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_trained_is_exactly_zero(dtype: torch.dtype) -> None:
    inputs, labels = make_inputs(20, 0.0, dtype)
    loss, gradients = run(lambda *x: linear_cross_entropy(*x, labels, 8), inputs)
    assert loss == 0
    assert [x.dtype for x in gradients] == [dtype, dtype]
    assert not any(x.any() for x in gradients)


def test_dtypes_and_float32_softmax() -> None:
    """bfloat16, as FSDP's mixed precision hands over: a float32 loss, gradients in bfloat16."""
    inputs, labels = make_inputs(40, dtype=torch.bfloat16)
    loss, gradients = run(lambda *x: linear_cross_entropy(*x, labels, 16), inputs)
    assert loss.dtype == torch.float32
    assert [x.dtype for x in gradients] == [torch.bfloat16, torch.bfloat16]
    # Logits are rounded to bfloat16 (0.4% of a logit of up to 8), and so is the gradient by them.
    assert_close((loss, gradients), run(lambda *x: plain(*x, labels), [x.double() for x in inputs]), 2e-2)
    # From these rounded logits on, all is float32: 1e-6.
    logits = (inputs[0] @ inputs[1].T).double()
    assert relative_error(loss, F.cross_entropy(logits, labels, reduction="sum")) <= 1e-6


def test_weight_gradient_is_accumulated_in_float32() -> None:
    """400 chunks of one token: added up in bfloat16, the later ones would vanish beside the sum."""
    inputs, _ = make_inputs(400, dtype=torch.bfloat16)
    hidden = inputs[0].abs()
    labels = torch.zeros(400, dtype=torch.int64)
    _, gradients = run(lambda *x: linear_cross_entropy(*x, labels, 1), [hidden, inputs[1]])
    _, expected = run(lambda *x: plain(*x, labels), [hidden.double(), inputs[1].double()])
    assert relative_error(gradients[1], expected[1]) <= 5e-3  # bfloat16 logits and result


def test_scale_is_not_rounded_to_bfloat16() -> None:
    """1/3 is 0.19% more in bfloat16, and so would be all gradients but the head's."""
    (hidden, weight), labels = make_inputs(4000, 1.0, dtype=torch.bfloat16)
    norms = []
    for scale in (1.0, 1 / 3):
        x = hidden.clone().requires_grad_()
        (linear_cross_entropy(x, weight, labels) * scale).backward()
        norms.append(x.grad.double().norm())
    # 0.04%: each of the 24,000 elements is rounded by up to 0.4%, either way, which averages out.
    assert abs(3 * norms[1] / norms[0] - 1) <= 4e-4


def test_scaled_loss() -> None:
    inputs, labels = make_inputs(20)
    actual = run(lambda *x: linear_cross_entropy(*x, labels, 8) / 7 * 3, inputs)
    assert_close(actual, run(lambda *x: plain(*x, labels) / 7 * 3, inputs), 1e-12)


def num_matmuls(log: OperationLog) -> int:
    return sum(name in ("mm", "addmm", "matmul") for name in log.names)


def test_only_the_gradients_that_are_wanted() -> None:
    (hidden, weight), labels = make_inputs(20)
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(plain(*both, labels), both)
    for wanted in ([], [0], [1], [0, 1]):
        inputs = [hidden.clone(), weight.clone()]
        for i in wanted:
            inputs[i].requires_grad_()
        with OperationLog() as log:
            loss = linear_cross_entropy(*inputs, labels, 8)
        assert num_matmuls(log) == 3 * (1 + len(wanted))  # 3 chunks
        assert loss.requires_grad == bool(wanted)
        if wanted:
            loss.backward()
        for i in (0, 1):
            if i in wanted:
                assert relative_error(inputs[i].grad, expected[i]) <= 1e-12
            else:
                assert inputs[i].grad is None


def test_evaluation_computes_no_gradients() -> None:
    inputs, labels = make_inputs(20)
    inputs = [x.requires_grad_() for x in inputs]
    with torch.no_grad(), OperationLog() as log:
        loss = linear_cross_entropy(*inputs, labels, 8)
    assert not loss.requires_grad
    assert num_matmuls(log) == 3
    assert not [name for name in log.names if name.startswith(("exp", "scatter"))]  # no softmax either
    assert relative_error(loss, plain(*inputs, labels).detach()) <= 1e-12


def test_default_chunk_keeps_to_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8 * VOCABULARY * 5)  # five rows of float64 logits
    inputs, labels = make_inputs(100)
    with OperationLog() as log:
        actual = run(lambda *x: linear_cross_entropy(*x, labels), inputs)
    assert_close(actual, run(lambda *x: plain(*x, labels), inputs), 1e-12)
    assert max(log.sizes) == inputs[0].numel() < 100 * VOCABULARY  # the hidden states; never all logits
    assert num_matmuls(log) == 3 * 20


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_impossible_labels_are_refused(label: int) -> None:
    inputs, labels = make_inputs(5)
    labels[2] = label
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(*inputs, labels)


def test_is_right_under_the_compiler() -> None:
    # Compiled itself, torch 2.11 gives it gradients of zero.
    inputs, labels = make_inputs(20, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: linear_cross_entropy(*x), backend="aot_eager")
    actual, expected = (run(lambda *x, f=f: f(*x, labels, 8), inputs) for f in (compiled, linear_cross_entropy))
    assert_close(actual, expected, 1e-6)  # float32


@pytest.mark.parametrize("num_tokens", [15, 33])
def test_an_adapter_of_low_rank_is_added_to_the_logits(num_tokens: int) -> None:
    (hidden, weight), labels = make_inputs(num_tokens)
    generator = torch.Generator().manual_seed(1)
    low = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((num_tokens, 2), (VOCABULARY, 2))]
    actual = run(lambda h, w, a, b: linear_cross_entropy(h, w, labels, 16, low_rank=(a, b)), [hidden, weight, *low])
    expected = run(
        lambda h, w, a, b: F.cross_entropy(h @ w.T + a @ b.T, labels, ignore_index=-100, reduction="sum"),
        [hidden, weight, *low],
    )
    assert_close(actual, expected, 1e-12)


def test_a_frozen_head_has_no_gradient_computed() -> None:
    (hidden, weight), labels = make_inputs(20, dtype=torch.float32)
    low = [torch.randn(20, 2), torch.randn(VOCABULARY, 2)]
    for tensor in (hidden, *low):
        tensor.requires_grad_()
    with OperationLog() as log:
        linear_cross_entropy(hidden, weight, labels, low_rank=(low[0], low[1])).backward()
    assert all(tensor.grad is not None for tensor in (hidden, *low))
    assert num_matmuls(log) == 5  # two of the logits, then three gradients

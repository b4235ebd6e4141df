"""The start-up self-test: right kernels pass it, each kind of wrong one is caught and named, and stops the run."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from config.options import Compile
from config.reading import load_config
from errors import RunError
from models.ops import linear_cross_entropy as loss_module
from models.ops.documents import Documents
from models.ops.gated_delta_rule import CHUNK
from models.ops.kernels import CHOICES, MEASURED_ON, Kernels, select_kernels
from models.qwen35_moe import check_kernels as module
from models.qwen35_moe.check_kernels import check_kernels
from models.qwen35_moe.config import ModelConfig
from parallelisms.degrees import Degrees, shape_on_a_rank
from tests.models.qwen35_moe.shapes import tiny_config

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
FASTEST = Kernels(**{name: [c for c in choices if c not in MEASURED_ON][-1] for name, choices in CHOICES.items()})
INPUTS = {
    "attention": ("q", "k", "v"),
    "gated_delta_rule": ("q", "k", "v", "g", "beta"),
    "causal_conv1d": ("x", "weight"),
    "cross_entropy": ("hidden", "weight"),
    "routed_experts": ("x", "weights", "gate_up_proj", "down_proj"),
}
ALONG_THE_SEQUENCE = ("attention", "gated_delta_rule", "causal_conv1d")


def only(operation: str) -> Kernels:
    """The fastest kernel of one operation, plain PyTorch for the others."""
    return Kernels()._replace(**{name: getattr(FASTEST, name) for name in Kernels._fields if name == operation})


def named(operation: str) -> str:
    return f"kernels.{operation} = '{getattr(FASTEST, operation)}'" if operation in CHOICES else "routed_experts"


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """replace(operation, kernel): its kernel is kernel(reference, *arguments); the others' are the reference."""
    kernels: dict[str, Callable[..., Any]] = {}

    def put(operation: str) -> None:
        name = "linear_cross_entropy" if operation == "cross_entropy" else operation
        original = getattr(module, name)
        reference = (lambda *x: original(*x, backend=CHOICES[operation][0])) if operation in CHOICES else original

        def function(*arguments: Any, backend: str = "") -> torch.Tensor:
            is_reference = arguments[0].dtype == torch.float64
            assert not backend or is_reference == (backend == CHOICES[operation][0])
            if is_reference or operation not in kernels:
                return reference(*arguments)
            return kernels[operation](reference, *arguments)

        monkeypatch.setattr(module, name, function)

    for operation in INPUTS:
        put(operation)
    return kernels.__setitem__


class ChangedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("replace")
def test_right_kernels_pass(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Plain PyTorch in the compute dtype for a kernel; nothing of the process changes but the log."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="train"):
        assert check_kernels(FASTEST, tiny_config(), CPU, dtype) == []
    announced, line = caplog.messages
    assert "two minutes on a bare machine" in announced
    assert line.startswith("kernels agree with plain PyTorch: off by ")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_agreed_is_compared_again_only_where_something_has_changed(
    replace: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compared = []
    replace("causal_conv1d", lambda reference, *arguments: compared.append(1) or reference(*arguments))
    kernels, folder = only("causal_conv1d"), tmp_path / "compiled"

    def compares(kernels: Kernels = kernels, dtype: torch.dtype = torch.bfloat16, **changed: Any) -> bool:
        compared.clear()
        assert check_kernels(kernels, tiny_config(**changed), CPU, dtype, folder) == []
        return bool(compared)

    assert compares()
    with caplog.at_level(logging.INFO, logger="train"):
        assert not compares()
    (line,) = caplog.messages
    (note,) = folder.iterdir()
    assert line == f"kernels agreed with plain PyTorch before, all being the same as now: noted in {note}"
    assert "off by" in note.read_text()
    layer_types = 2 * tiny_config().layer_types  # more blocks of the same kinds
    assert not compares(num_hidden_layers=len(layer_types), layer_types=layer_types)
    assert compares(num_hidden_layers=1, layer_types=layer_types[:1])
    assert compares(dtype=torch.float32)
    assert compares(linear_num_value_heads=8)
    assert compares(kernels._replace(attention="varlen"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        assert compares()
    assert not compares()
    torch.use_deterministic_algorithms(True)
    try:
        assert compares()
    finally:
        torch.use_deterministic_algorithms(False)
    for package in ("fla-core", "flash-qla", "triton"):  # as pip notes what it has installed
        metadata = tmp_path / f"{package.replace('-', '_')}-9.9.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
        monkeypatch.syspath_prepend(tmp_path)
        assert [compares(), compares()] == [True, False], package

    source = tmp_path / "ops"
    source.mkdir()
    (source / "permute.py").write_text("1")
    monkeypatch.setattr("models.ops.__path__", [str(source)])
    assert [compares(), compares()] == [True, False]
    (source / "permute.py").write_text("2")
    assert [compares(), compares()] == [True, False]


@pytest.mark.usefixtures("replace")
def test_what_cannot_be_noted_is_said_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nope")):
        caplog.clear()
        assert check_kernels(only("causal_conv1d"), tiny_config(), CPU, torch.bfloat16, folder) == []
        assert f"cannot note in {folder}/kernels-agree-" in caplog.messages[-1]


def test_what_does_not_agree_is_not_noted(replace: Callable, tmp_path: Path) -> None:
    replace("causal_conv1d", lambda reference, *arguments: reference(*arguments) * 1.05)
    for _ in range(2):
        assert check_kernels(only("causal_conv1d"), tiny_config(), CPU, torch.bfloat16, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("operation", "name"), [(o, name) for o, names in INPUTS.items() for name in names])
@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_a_wrong_gradient_is_named(replace: Callable, operation: str, name: str, factor: float) -> None:
    """Of one input: 5 % too large, and not a number."""

    def kernel(reference: Callable, *arguments: Any) -> torch.Tensor:
        changed = list(arguments)
        index = INPUTS[operation].index(name)
        changed[index] = ChangedGradient.apply(changed[index], factor)
        return reference(*changed)

    replace(operation, kernel)
    wrong = check_kernels(only(operation), tiny_config(), CPU, torch.bfloat16)
    assert len(wrong) == (2 if operation == "attention" else 1)  # cuDNN's is tried on two kinds of streams
    for line in wrong:
        assert line.startswith(f"{named(operation)} ")
        found = line.partition(": ")[2].partition(", relative to")[0]
        assert found.startswith(f"gradient of {name} off by ")
        assert "," not in found  # nothing else is accused
        error = float(found.rpartition(" ")[2])
        assert error != error if factor != factor else 0.04 < error < 0.06


@pytest.mark.parametrize("operation", INPUTS)
def test_one_output_that_is_not_a_number(replace: Callable, operation: str) -> None:
    def kernel(reference: Callable, *arguments: Any) -> torch.Tensor:
        out = reference(*arguments)
        is_last = torch.arange(out.numel()).view(out.shape) == out.numel() - 1
        return out + torch.where(is_last, float("nan"), 0.0).to(out.dtype)

    replace(operation, kernel)
    line = check_kernels(only(operation), tiny_config(), CPU, torch.bfloat16)[0]
    assert line.startswith(f"{named(operation)} ")
    assert ": output off by nan, relative to" in line


@pytest.mark.parametrize("boundary", range(len(module._LENGTHS) - 1))
@pytest.mark.parametrize("operation", ALONG_THE_SEQUENCE)
def test_a_leak_over_one_boundary(replace: Callable, operation: str, boundary: int) -> None:
    def kernel(reference: Callable, *arguments: Any) -> torch.Tensor:
        lengths = arguments[-1].lengths()
        if len(lengths) > boundary + 1:
            lengths[boundary : boundary + 2] = [sum(lengths[boundary : boundary + 2])]
        return reference(*arguments[:-1], Documents.from_lengths(lengths))

    replace(operation, kernel)
    line = check_kernels(only(operation), tiny_config(), CPU, torch.bfloat16)[0]
    assert line.startswith(f"{named(operation)} computes wrong numbers here: output off by ")
    assert "gradient of " in line


def test_a_state_that_is_lost_between_chunks(replace: Callable) -> None:
    """The delta rule's; decays that are too strong would hide it."""

    def kernel(reference: Callable, *arguments: Any) -> torch.Tensor:
        lengths = arguments[-1].lengths()
        chunks = [min(CHUNK, length - start) for length in lengths for start in range(0, length, CHUNK)]
        return reference(*arguments[:-1], Documents.from_lengths(chunks))

    replace("gated_delta_rule", kernel)
    (line,) = check_kernels(only("gated_delta_rule"), tiny_config(), CPU, torch.bfloat16)
    assert all(f"gradient of {name} off by" in line for name in INPUTS["gated_delta_rule"])
    assert "here: output off by " in line


def test_cudnn_is_tried_where_it_takes_its_own_kernel(replace: Callable) -> None:
    """It is another one where all documents have one length."""

    def kernel(reference: Callable, *arguments: Any) -> torch.Tensor:
        return reference(*arguments) * (1.05 if len(set(arguments[-1].lengths())) == 1 else 1.0)

    replace("attention", kernel)
    (line,) = check_kernels(only("attention"), tiny_config(), CPU, torch.bfloat16)
    assert "use [kernels] attention = 'varlen' or 'sdpa', or [kernels] self_test = false" in line
    assert check_kernels(Kernels(attention="varlen"), tiny_config(), CPU, torch.bfloat16) == []


@pytest.mark.parametrize("backend", MEASURED_ON)
def test_what_is_not_chosen_everywhere_is_tried_too(replace: Callable, backend: str) -> None:
    """And the way out is one that can be taken without another package."""
    kernels = Kernels(attention=backend)
    assert check_kernels(kernels, tiny_config(), CPU, torch.bfloat16) == []
    replace("attention", lambda reference, *arguments: reference(*arguments) * 1.05)
    lines = check_kernels(kernels, tiny_config(), CPU, torch.bfloat16)
    assert len(lines) == 2  # documents of different lengths, and of one, which go to cuDNN
    for line in lines:
        assert line.startswith(f"kernels.attention = '{backend}' computes wrong numbers here: output off by 0.05")
        assert "use [kernels] attention = 'cudnn' or 'varlen' or 'sdpa', or [kernels] self_test = false" in line


def test_all_wrong_operations_are_told(replace: Callable) -> None:
    def kernel(reference: Callable, *arguments: Any) -> torch.Tensor:
        return reference(*arguments) * 1.05

    for operation in INPUTS:
        replace(operation, kernel)
    wrong = check_kernels(FASTEST, tiny_config(), CPU, torch.bfloat16)
    assert all(any(line.startswith(f"{named(operation)} ") for line in wrong) for operation in INPUTS)
    assert all("self_test = false to go on anyway" in line and len(line.splitlines()) == 1 for line in wrong)


@pytest.mark.parametrize("operation", INPUTS)
def test_a_library_that_does_not_run_is_named(replace: Callable, operation: str, tmp_path: Path) -> None:
    """As one that is installed but does not import; the other operations are compared all the same."""

    def kernel(*_: object) -> torch.Tensor:
        raise ModuleNotFoundError("\nNo module named 'cutlass.cute'\nand much more")

    replace(operation, kernel)
    other = next(each for each in INPUTS if each != operation)
    replace(other, lambda reference, *arguments: reference(*arguments) * 1.05)
    lines = check_kernels(FASTEST, tiny_config(), CPU, torch.bfloat16, folder=tmp_path)
    of_operation = [line for line in lines if line.startswith(f"{named(operation)} ")]
    assert of_operation
    for line in of_operation:
        assert " does not run here: ModuleNotFoundError: No module named 'cutlass.cute'; " in line
        assert "self_test = false to go on anyway" in line
    assert any("computes wrong numbers" in line for line in lines if line.startswith(f"{named(other)} "))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("replace")
def test_fla_is_tuned_on_a_long_stream_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the reference runs without the demand for determinism, the kernels with it."""
    calls: list[tuple[str, int, bool]] = []
    rule = module.gated_delta_rule

    def record(*arguments: Any, backend: str) -> torch.Tensor:
        calls.append((backend, arguments[0].shape[0], torch.are_deterministic_algorithms_enabled()))
        return rule(*arguments, backend="flash_qla" if backend == "fla" else backend)

    monkeypatch.setattr(module, "gated_delta_rule", record)
    torch.use_deterministic_algorithms(True)
    try:
        assert check_kernels(Kernels(gated_delta_rule="fla"), tiny_config(), CPU, torch.bfloat16) == []
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    num_tokens = sum(module._LENGTHS)
    assert calls == [("fla", 8192, True), ("torch", num_tokens, False), ("fla", num_tokens, True)]


def test_the_loss_is_compiled_for_the_shapes_of_the_run_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for any: a compiler that has met two shapes takes the sizes for variables, and its code is slower."""
    sizes: list[list[Any]] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        sizes.append([size for x in inputs for size in (x.shape if isinstance(x, torch.Tensor) else [x])])
        return graph

    loss_and_gradient = loss_module._loss_and_gradient
    compiled = {loss_and_gradient: torch.compile(loss_and_gradient, backend=record)}
    monkeypatch.setattr(loss_module, "_compiled", lambda function: compiled.get(function, function))
    torch._dynamo.reset()
    assert check_kernels(only("cross_entropy"), tiny_config(), CPU, torch.bfloat16) == []
    hidden, weight = torch.zeros(50, 8, requires_grad=True), torch.zeros(33, 8)
    loss_module.linear_cross_entropy(hidden, weight, torch.zeros(50, dtype=torch.int64), backend="compiled")
    assert sizes == [[32, tiny_config().vocab_size, 32], [50, 33, 50]]
    assert all(type(size) is int for size in [*sizes[0], *sizes[1]])


@pytest.mark.parametrize(
    ("device", "options", "stops"),
    [("cuda", [], True), ("cuda", ["--kernels.self_test=false"], False), ("cpu", [], False)],
)
def test_where_a_run_stops(device: str, options: list[str], stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """build_model up to where it would take memory, on a GPU that is not there."""

    class Parallelised(Exception):
        pass

    def parallelize_fn(*_: Any, **__: Any) -> None:
        raise Parallelised

    monkeypatch.setattr(train, "select_kernels", lambda *_: Kernels())
    shapes: list[ModelConfig] = []

    def check(_: Kernels, shape: ModelConfig, *__: Any) -> list[str]:
        shapes.append(shape)
        return ["attention is wrong", "so is the rule"]

    monkeypatch.setattr(train, "check_kernels", check)
    monkeypatch.setattr(train, "parallelize_fn", parallelize_fn)
    config = load_config(["--config", "qwen35moe_tiny.toml", *options])
    assert config.compile == Compile()
    meshes: Any = SimpleNamespace(data_parallel=SimpleNamespace(size=lambda: 2), degrees=Degrees(1, 2, 1, 2))
    if stops:
        with pytest.raises(RunError, match=r"^attention is wrong; so is the rule$"):
            train.build_model(config, tiny_config(), meshes, torch.device(device))
        assert shapes == [shape_on_a_rank(tiny_config(), 2)]  # the heads that kernels see in training
    else:
        with pytest.raises(Parallelised):
            train.build_model(config, tiny_config(), meshes, torch.device(device))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [ModelConfig.from_dict({}), tiny_config(head_dim=64, mrope_section=(3, 3, 2))], ids=["35B", "tiny"]
)
def test_the_kernels_that_are_chosen_pass(
    shape: ModelConfig, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """And leave neither memory nor changed generators behind."""
    device = torch.device("cuda")
    head_dims = (shape.linear_key_head_dim, shape.linear_value_head_dim)
    kernels = select_kernels({}, "cuda", dtype, head_dims, shape.linear_conv_kernel_dim, shape.head_dim)
    check_kernels(kernels, shape, device, dtype)  # the workspaces that libraries keep are there
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    held = torch.cuda.memory_allocated()
    with caplog.at_level(logging.INFO, logger="train"):
        assert check_kernels(kernels, shape, device, dtype) == []
    print(kernels, caplog.messages[-1])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert torch.cuda.memory_allocated() - held < 2**20  # what libraries remember of the documents' boundaries


@pytest.mark.gpu
@needs_gpu
def test_a_broken_kernel_stops_a_run_on_a_gpu(tmp_path: Path) -> None:
    """The convolution's gradient, 5 % too large: one line that names it, exit code 1, nothing trained."""
    program = """
import sys
import train
from models.ops import causal_conv1d_triton
backward = causal_conv1d_triton.backward
causal_conv1d_triton.backward = lambda *x: tuple(gradient * 1.05 for gradient in backward(*x))
with train.exit_on_error():
    train.main(sys.argv[1:])
"""
    one_process = ["--parallelism.expert_parallel_degree=1", "--checkpoint.enable=false", "--training.steps=1"]
    one_process += ["--lr_scheduler.warmup_steps=0"]
    command = [sys.executable, "-c", program, "--config", "qwen35moe_tiny.toml", f"--job.output_dir={tmp_path}"]
    done = subprocess.run([*command, *one_process], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("kernels.causal_conv1d = 'triton' "))
    assert "computes wrong numbers here: gradient of x off by 0.05" in line
    assert "use [kernels] causal_conv1d = 'torch', or [kernels] self_test = false to go on anyway" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
    subprocess.run([*command, *one_process, "--kernels.self_test=false"], cwd=ROOT, check=True)
    assert (tmp_path / "metrics.jsonl").exists()

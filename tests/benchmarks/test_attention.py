"""The benchmark of attention's kernels reads its streams, and says in one line what it cannot do."""

import pytest
import torch

from benchmarks.attention import TEXT, VISION, backends_of, lengths_of, main
from errors import UserError
from tests.commands import status_of


@pytest.mark.parametrize(
    ("stream", "lengths"),
    [("4096x2", [4096, 4096]), ("7", [7]), ("100+64x3+1", [100, 64, 64, 64, 1]), ("5x1", [5])],
)
def test_streams_are_read(stream: str, lengths: list[int]) -> None:
    assert lengths_of(stream) == lengths


@pytest.mark.parametrize("stream", ["", "x", "4096x", "0", "5+", "-3", "4x-1", "5+4x0", "٣", "4096x0", "a+1"])
def test_what_is_no_stream_is_refused(stream: str) -> None:
    with pytest.raises(UserError, match=r"^--streams: expected lengths like 4096x2"):
        lengths_of(stream)


def test_backends_are_read() -> None:
    hinders = {"varlen": "", "cudnn": "", "fa4": "the package flash-attn-4"}
    assert backends_of("", hinders) == ["varlen", "cudnn"]
    assert backends_of("sdpa,cudnn", hinders) == ["sdpa", "cudnn"]
    for asked, told in (
        ("cudnn,flash", "--backends: expected some of sdpa, varlen, cudnn, fa4, got 'flash'"),
        ("cudnn,", "--backends: expected some of sdpa, varlen, cudnn, fa4, got ''"),
        ("fa4", "--backends: 'fa4' needs the package flash-attn-4"),
    ):
        with pytest.raises(UserError) as error:
            backends_of(asked, hinders)
        assert str(error.value) == told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, []) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("expected a CUDA GPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels run on CUDA alone")
@pytest.mark.parametrize(("heads", "options"), [(TEXT, []), (VISION, ["--vision"])])
def test_it_measures(heads: tuple[int, int, int], options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*options, "--streams", "300+40", "--backends", "varlen"])
    (line,) = capsys.readouterr().out.splitlines()
    assert f"'heads': {heads}" in line
    assert "'documents': 2" in line

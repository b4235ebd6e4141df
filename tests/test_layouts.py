"""The tiny run itself, from its options on, in eight layouts: five steps with the losses and norms of one process.

tests/parallelisms/test_layouts.py compares every gradient; here are the data, the options and train.py's main too.
"""

from pathlib import Path

import pytest

from tests.test_train import ROOT, metrics, run

LAYOUTS = {
    "1 process, 4 micro-batches": (1, "--activation_checkpoint.mode=full"),
    "2, fsdp": (2, "--parallelism.expert_parallel_degree=1"),
    "2, ep 2, with workers": (2, "--activation_checkpoint.mode=none", "--data.num_workers=1"),
    "2, ep 2, too little room": (2, "--parallelism.expert_room=1"),
    "2, replicas": (2, "--parallelism.data_parallel_replicate_degree=2"),
    "3, which do not divide the batch": (3, "--training.local_batch_size=1"),
    "4, ep 4": (4, "--training.local_batch_size=1"),
    "4, replicas with ep 2": (4, "--parallelism.data_parallel_replicate_degree=2"),
}
OPTIONS = ("--training.steps=5", "--metrics.log_interval=1", "--checkpoint.enable=false", "--metrics.tensorboard=false")
ALONE = "--data.num_workers=0"  # a rank's workers import for seconds before the first step


@pytest.mark.slow
def test_five_steps_of_the_tiny_run_on_eight_layouts(tmp_path: Path) -> None:
    tiny = ROOT / "train_configs/qwen35moe_tiny.toml"
    run(tiny, tmp_path / "one", *OPTIONS, ALONE, "--training.local_batch_size=8", ranks=1)
    expected = metrics(tmp_path / "one")
    assert len(expected) == 5
    for number, (name, (ranks, *options)) in enumerate(LAYOUTS.items()):
        alone = () if "with workers" in name else (ALONE,)
        run(tiny, tmp_path / str(number), *OPTIONS, *alone, *options, ranks=ranks)
        found = metrics(tmp_path / str(number))
        for key, bound in (("loss", 1e-6), ("grad_norm", 1e-5)):
            values = [[line[key] for line in lines] for lines in (found, expected)]
            worst = max(abs(a / b - 1) for a, b in zip(*values))
            print(f"{name}: {key} within {worst:.1e}")
            assert values[0] == pytest.approx(values[1], rel=bound), (name, key)
        if "room" in name:
            assert found[-1]["repeated_steps"] > found[0]["repeated_steps"] == 1
        else:
            assert not any(line.get("repeated_steps") for line in found), name

"""Layouts that the planner recommends for 8 and 16 GPUs, on as many CPU processes and a tiny shape: they start, train
as one process does, save and resume."""

from pathlib import Path

import pytest

from config.reading import load_config
from tests.checkpoint.runs import Run
from training.plan import Change, Where, alternatives

STEPS = ("--training.steps=2", "--checkpoint.interval=1", "--checkpoint.keep=0", "--training.global_batch_size=16")
# As many heads and experts as any of the layouts needs.
SHAPE = (
    "--model.config.hidden_size=64",
    "--model.config.num_attention_heads=16",
    "--model.config.linear_num_key_heads=16",
    "--model.config.linear_num_value_heads=16",
    "--model.config.head_dim=16",
    "--model.config.linear_key_head_dim=8",
    "--model.config.linear_value_head_dim=8",
    "--model.config.num_experts=16",
    "--model.config.rope_parameters.mrope_section=[1, 1, 0]",
)


def recommended(gpus: int, gpu: str) -> list[Change]:
    """The best for each length of documents (of 16 for one), and of those that spread experts, share tokens or
    replicate."""
    found: list[Change] = []
    for length, batch in ((4096, 256), (32768, 64), (262144, 16))[: 3 if gpus == 8 else 1]:
        words = ["--config=qwen35moe_35b_a3b.toml", f"--training.sequence_length={length}"]
        config = load_config([*words, f"--training.global_batch_size={batch}"])
        plans = alternatives(config, Where(gpus, 8, gpu))
        for axis in ("", "expert", "context", "replicate") if length == 4096 else ("",):
            best = next((change for plan, change in plans if not axis or getattr(plan.case.degrees, axis) > 1), {})
            change = {key: value for key, value in best.items() if key[1] != "local_batch_size"}
            if change and change not in found:
                found.append(change)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "gpu"), [(8, "h200"), (16, "h100")])
def test_recommended_layouts_train_as_one_process_and_resume(tmp_path: Path, gpus: int, gpu: str) -> None:
    one = Run(tmp_path / "one", 1, *STEPS, *SHAPE, "--training.local_batch_size=16").finish()
    layouts = recommended(gpus, gpu)
    assert len(layouts) >= 3
    if gpus > 8:  # the best, and what fewer GPUs do not have: more than two cores do in a minute
        layouts = [each for each in layouts if each == layouts[0] or each not in recommended(8, "h200")]
        assert len(layouts) >= 2
    for number, change in enumerate(layouts):
        options = [f"--{section}.{key}={value}" for (section, key), value in change.items()]
        print(gpus, *options)
        folder = tmp_path / str(number)
        lines = Run(folder, gpus, *STEPS, *SHAPE, *options).finish()
        for key, bound in (("loss", 1e-6), ("grad_norm", 1e-5)):
            assert [line[key] for line in lines] == pytest.approx([line[key] for line in one], rel=bound), (
                options,
                key,
            )
        if gpus > 8 and number:
            continue
        resume = f"--checkpoint.resume={folder}/checkpoints/step-00000001"
        again = Run(tmp_path / f"{number}-again", gpus, *STEPS, *SHAPE, *options, resume).finish()
        assert [line["step"] for line in again] == [2]
        assert [line["loss"] for line in again] == [line["loss"] for line in lines[1:]], options

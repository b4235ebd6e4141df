"""Turns a checkpoint into a Hugging Face directory, in one process, a block of a tensor at a time.

python checkpoint/convert_to_hf.py CHECKPOINT OUT [--architecture causal_lm|image_text_to_text]
    [--dtype bfloat16|float32|keep] [--experts keep|stacked|per_expert] [--max-shard-size 5GB]
    [--base HF_DIR] [--merge] [--verify]

Adapters become peft's adapter_config.json and adapter_model.safetensors, or with --merge a whole model.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file from anywhere

from checkpoint.adapters import serving_note
from checkpoint.directories import check_is_free
from checkpoint.export import DTYPES, Options, adapter_of, export_to_hf
from errors import OneLineParser, exit_on_error
from models.qwen35_moe.hf_weights import MTP, NOT_TEXT, PREFIXES, VISION


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB" or a plain number (powers of ten, as Hugging Face counts)."""
    match = re.fullmatch(r"(\d+)\s*([KMG]B)?", text.strip().upper())
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 200MB")
    return int(match[1]) * {None: 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]


def main(arguments: list[str]) -> None:
    """The command line. Raises UserError."""
    parser = OneLineParser(description=__doc__.splitlines()[0] if __doc__ else None)
    checkpoint_help = "a step-* directory, a run's output_dir (its newest step), or per-rank FSDP2 files"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=checkpoint_help)
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to make")
    parser.add_argument("--architecture", choices=PREFIXES, help="class to export (default: the model's own)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the trained tensors, a few of them float32 as published (default: bfloat16; of "
        "adapters keep); keep: as trained, or of what adapters are merged into as in their base",
    )
    parser.add_argument(
        "--experts",
        choices=("keep", "stacked", "per_expert"),
        default="keep",
        help="one tensor a layer or one an expert (default: as in the model that it came from)",
    )
    parser.add_argument(
        "--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="of a file (default: %(default)s)"
    )
    base_help = "whose vision and MTP tensors are taken along (default: the model that the run was loaded from)"
    parser.add_argument("--base", type=Path, metavar="HF_DIR", help=base_help)
    parser.add_argument("--merge", action="store_true", help="of adapters: the whole weights of their base with them")
    parser.add_argument("--verify", action="store_true", help="read OUT again and compare every tensor bit for bit")
    given = parser.parse_args(arguments)
    check_is_free(given.out)
    if not given.checkpoint.is_dir():
        parser.error(f"{given.checkpoint} is no directory: expected a step-* directory, or a run's output_dir")
    if given.base and not (given.base / "config.json").is_file():
        parser.error(f"--base {given.base} has no config.json: expected a Hugging Face directory")
    adapter = adapter_of(given.checkpoint)
    dtype = DTYPES[given.dtype or ("keep" if adapter else "bfloat16")]
    options = Options(
        given.architecture, dtype, given.experts, given.max_shard_size, given.base, given.verify, given.merge
    )
    plan = export_to_hf(given.checkpoint, given.out, options, progress=True)
    verified = ", verified" if given.verify else ""
    if adapter and not given.merge:
        note = serving_note(adapter.targets)
        print(f"{len(plan.tensors)} tensors of adapters of rank {adapter.rank}{verified}; {note}")
        return
    counts = {kind: sum(tensor.key.startswith(kind) for tensor in plan.tensors) for kind in NOT_TEXT}
    text = len(plan.tensors) - sum(counts.values())
    print(
        f"{plan.config['architectures'][0]}: {text} text, {counts[VISION]} vision and {counts[MTP]} MTP tensors"
        + verified
    )


if __name__ == "__main__":
    with exit_on_error("convert_to_hf: ", interrupted="interrupted, nothing is left"):
        main(sys.argv[1:])

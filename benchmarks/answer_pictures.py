"""How many questions about held-out pictures transformers answers rightly with a model that was exported here.

    python -m benchmarks.answer_pictures HF_DIR [--data data/tiny_vision/held_out.parquet] [--limit N]

Each answer is generated greedily from all that stands before it in its chat, and has to be the whole of the given one.
"""

import argparse
import io
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from errors import OneLineParser, exit_on_error


class Answerer:
    """A model, its tokenizer and its image processor in transformers; AutoProcessor would want torchvision."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    @torch.no_grad()
    def answer(self, messages: list[dict], pictures: list[Image.Image]) -> str:
        """What the model says next."""
        pad, merged = self.model.config.image_token_id, self.processor.merge_size**2
        prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokens = self.tokenizer(prompt, add_special_tokens=False).input_ids
        inputs = {}
        if pictures:
            seen = self.processor(pictures, return_tensors="pt")
            sizes = iter((seen["image_grid_thw"].prod(dim=1) // merged).tolist())
            tokens = [each for token in tokens for each in [token] * (next(sizes) if token == pad else 1)]
            inputs = {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}
        given = torch.tensor([tokens])
        out = self.model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            mm_token_type_ids=(given == pad).int(),
            max_new_tokens=8,
            do_sample=False,
            **inputs,
        )
        return self.tokenizer.decode(out[0, len(tokens) :], skip_special_tokens=True).strip()


def text_of(message: dict) -> str:
    """A message's text parts, end to end."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def without_nulls(message: dict) -> dict:
    """As a template takes it: Arrow gives a part every field."""
    content = message["content"]
    if not isinstance(content, str):
        content = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {"role": message["role"], "content": content}


def main(arguments: list[str]) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="HF_DIR")
    parser.add_argument("--data", type=Path, default=Path("data/tiny_vision/held_out.parquet"))
    parser.add_argument("--limit", type=int, default=0, help="questions to ask; 0: all")
    options = parser.parse_args(arguments)
    answerer, asked, right = Answerer(options.folder), Counter[str](), Counter[str]()
    for chat in pyarrow.parquet.read_table(options.data).to_pylist():
        messages = [without_nulls(message) for message in chat["messages"]]
        pictures = [Image.open(io.BytesIO(image["bytes"])) for image in chat["images"]]
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or (options.limit and asked.total() >= options.limit):
                continue
            before = messages[:number]
            shown = sum(
                part["type"] == "image" for m in before if not isinstance(m["content"], str) for part in m["content"]
            )
            question, expected = text_of(before[-1]).strip(), text_of(message)
            asked[question] += 1
            right[question] += answerer.answer(before, pictures[:shown]) == expected
    for question, count in asked.most_common():
        print(f"{right[question]:4} of {count:4}  {question}")
    print(f"{right.total()} of {asked.total()} answers are right, {right.total() / asked.total():.1%}")


if __name__ == "__main__":
    with exit_on_error():
        main(sys.argv[1:])

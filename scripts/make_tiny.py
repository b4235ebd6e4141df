"""Makes the text and the tokenizer in this folder from what every CPython carries: offline, the same each time.

python scripts/make_tiny.py        (another Python version has other text; README.md says which one made the files)
"""

import ast
import json
import re
import shutil
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from textwrap import indent

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 4096  # special tokens included
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Where merges may not reach across: the pattern of the family's published tokenizers, with which transformers replaces
# whatever a tokenizer.json beside a config.json of this family says; so it says the same.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def module_documentation(name: str, source: str) -> str:
    """The docstrings of a module's public classes and functions, each below its signature; empty if it has none."""
    parts: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, heading: str) -> None:
        if text := ast.get_docstring(node):
            parts.append(f"{heading}\n\n{indent(text, '    ')}\n")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        prefix = name if isinstance(node, ast.Module) else heading.removeprefix("class ").partition("(")[0]
        for child in node.body:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                visit(child, f"{prefix}.{child.name}({ast.unparse(child.args)})")
            elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
                bases = ", ".join(map(ast.unparse, child.bases))
                visit(child, f"class {prefix}.{child.name}({bases})")

    visit(ast.parse(source), f"module {name}")
    return "\n".join(parts)


def python_documents(library: Path) -> list[str]:
    """The language reference's topics, then the documentation of the library's modules.

    Modules that mention a copyright or a licence of their own are left out: what remains is under Python's alone.
    """
    documents = [topics[name] for name in sorted(topics)]
    for path in sorted(library.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not path.stem.startswith("_") and not re.search("copyright|licen[sc]e", source, re.IGNORECASE):
            documents.append(module_documentation(path.stem, source))
    return [document for document in documents if document]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """Byte-level BPE: any text becomes tokens and comes back, composed (NFC) as the family's tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    # The last ids, as in Qwen's vocabularies.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def main() -> None:
    """Writes python_reference.jsonl, its licence and tokenizer/tokenizer.json into data/tiny."""
    folder, library = Path(__file__).resolve().parents[1] / "data/tiny", Path(sysconfig.get_path("stdlib"))
    documents = python_documents(library)
    with open(folder / "python_reference.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
    shutil.copyfile(library / "LICENSE.txt", folder / "LICENSE.txt")
    train_tokenizer(documents).save(str(folder / "tokenizer" / "tokenizer.json"))


if __name__ == "__main__":
    main()

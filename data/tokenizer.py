"""The tokenizer: what tokenizer.json says and nothing else; its identity; and whether an export tokenises the same.

`AutoTokenizer` may build another pre-tokenizer than the file's, by the config.json beside it, so it is not asked here.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from errors import UserError, reading

if TYPE_CHECKING:  # seconds to import, and of no use to workers that read text
    from transformers import PreTrainedTokenizerFast

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NOT_TOKENS = ("version", "truncation", "padding", "decoder")  # of tokenizer.json, what decides no token

PROBES = (
    "Cafe\u0301 e\u0301te\u0301 n\u0303 A\u030a \u1e9b\u0323",  # decomposed accents
    "a  b   c\t\td\n\n\n e \r\n\tf \u00a0g\u2009h   ",  # runs of white space
    "1 12 123 1234567890 3.14 1e-5 ½ ² ١٢٣ १२३",
    "def f(x: int) -> str:\n    return f'{x!r}' if x != 0 else \"\"  # it's\n",
    "🙂 👩‍👩‍👧 🇩🇪 ❤️ ‼",
    "don't I'LL we've x_y __init__ https://example.org/a?b=c&d=%20 <|x|> </s> [INST]",
    "Ελληνικά Русский עברית العَرَبِيَّة हिन्दी বাংলা தமிழ் ไทย ລາວ 한국어 日本語 中文 繁體 ქართული Հայերեն አማርኛ ខ្មែរ မြန်မာ",
)
"""Texts in which tokenizers differ."""


def _settings(folder: str) -> dict[str, Any]:
    """tokenizer_config.json. Raises UserError for one that is missing, damaged or brings code."""
    path = Path(folder, "tokenizer_config.json")
    if not path.is_file():
        raise UserError(f"data.tokenizer = {folder!r}: expected a directory with {path.name}")
    with reading(path):
        settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected a JSON object")
    if settings.get("auto_map"):
        raise UserError(
            f"{path}: auto_map = {settings['auto_map']!r} is code of its own, which is never run: expected none"
        )
    return settings


def _special_tokens(folder: str, tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names: all of them are tokens of tokenizer.json."""
    path, tokens = Path(folder, "tokenizer_config.json"), {}
    settings = _settings(folder)
    for name in _SPECIAL:
        given = settings.get(name)
        token = given.get("content") if isinstance(given, dict) else given
        if token is None and not given:
            continue
        if not isinstance(token, str) or not _is_text(token) or tokenizer.token_to_id(token) is None:
            raise UserError(f"{path}: {name} = {given!r:.100} is no token of tokenizer.json: expected one that is")
        tokens[name] = token
    return tokens


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def chat_template(folder: str) -> str | dict[str, str] | None:
    """The template, or those by name; as in transformers, chat_template.jinja comes before tokenizer_config.json."""
    paths = {path.stem: path for path in sorted(Path(folder, "additional_chat_templates").glob("*.jinja"))}
    found = {}
    for name, path in {"default": Path(folder, "chat_template.jinja"), **paths}.items():
        if path.is_file():
            with reading(path):
                found[name] = path.read_text(encoding="utf-8")
    if found:
        return found["default"] if found.keys() == {"default"} else found
    template = _settings(folder).get("chat_template")
    if isinstance(template, list):
        named = [each if isinstance(each, dict) else {} for each in template]
        template = {each.get("name"): each.get("template") for each in named}
    texts = [*template.keys(), *template.values()] if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) and _is_text(text) for text in texts):
        raise UserError(f"{Path(folder, 'tokenizer_config.json')}: chat_template: expected a text, or a list of them")
    return template


def template_in(file: str) -> str | None:
    """The chat template in a file of its own, if one is named. Raises UserError."""
    if not file:
        return None
    if not Path(file).is_file():
        raise UserError(f"data.chat_template = {file!r}: expected a file with a chat template")
    with reading(file):
        return Path(file).read_text(encoding="utf-8")


def read_tokenizer(folder: str) -> Tokenizer:
    """What tokenizer.json describes, without the truncation and padding that it may ask for. Raises UserError."""
    path = Path(folder, "tokenizer.json")
    if not folder or not path.is_file():
        hint = "" if folder else ", as there is no model.path to take it from"
        raise UserError(f"data.tokenizer = {folder!r}: expected a directory with tokenizer.json{hint}")
    with reading(path):
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_batch_fast(list(PROBES), add_special_tokens=False)  # what cannot tokenise says so now
        added = [(token["content"], token["id"]) for token in json.loads(text).get("added_tokens", ())]
    for content, number in added:
        if tokenizer.token_to_id(content) != number:  # the library gives it the next free id, and says nothing
            raise UserError(
                f"{path}: token {content!r} has id {number}: expected {tokenizer.token_to_id(content)}, as its place "
                "in the vocabulary is"
            )
    if not tokenizer.get_vocab_size():
        raise UserError(f"data.tokenizer = {folder!r}: expected a tokenizer with a vocabulary")
    return tokenizer


def load_tokenizer(folder: str) -> "PreTrainedTokenizerFast":
    """The same as transformers' class, for chat templates: its tokens are the file's. Raises UserError."""
    from transformers import PreTrainedTokenizerFast

    backend = read_tokenizer(folder)
    special, template = _special_tokens(folder, backend), chat_template(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path=folder, chat_template=template, **special
    )
    tokenizer._tokenizer = backend  # type: ignore[assignment]  # the class may have added tokens to its own copy
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest token."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def check_tokenizer(folder: str, vocab_size: int, needs_end: bool) -> None:
    """Raises UserError for a tokenizer that cannot be used. `needs_end`: it must have an end-of-sequence token."""
    tokenizer = read_tokenizer(folder)
    special = _special_tokens(folder, tokenizer)
    last = num_ids(tokenizer) - 1
    if last >= vocab_size:
        raise UserError(
            f"data.tokenizer = {folder!r}: has token {last}, expected all below the model's vocab_size = {vocab_size}"
        )
    if needs_end and "eos_token" not in special:
        raise UserError(f"data.end_of_document = True: expected an eos_token in {folder!r}, or false")


def tokenizer_identity(folder: str, data_format: str | None = None, template_file: str = "") -> str:
    """A hash of all that decides tokens, however the files are written: equal for equal tokens.

    It covers tokenizer.json; with `data_format` also what a run adds: "text" the end-of-sequence token, "chat" the chat
    template as well, that in `template_file` if there is one. Raises UserError.
    """
    path = Path(folder, "tokenizer.json")
    with reading(path):
        contents = json.loads(path.read_text(encoding="utf-8"))
        parts = {key: value for key, value in contents.items() if key not in _NOT_TOKENS and value is not None}
        # Versions of the library write a merge as "a b" or ["a", "b"], and absent settings as null, false or "".
        model = {key: value for key, value in contents["model"].items() if value or key == "vocab"}
        if "merges" in model:
            model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        parts["model"] = model
    if data_format is not None:
        parts["special"] = _special_tokens(folder, read_tokenizer(folder))
    if data_format == "chat":
        parts["chat_template"] = template_in(template_file) or chat_template(folder)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def verify_tokenizer(trained_folder: str, export_folder: str, texts: Iterable[str]) -> None:
    """Raises UserError with the first of `texts` that `AutoTokenizer` tokenises otherwise than training did."""
    from transformers import AutoTokenizer

    trained = read_tokenizer(trained_folder)
    for folder in (trained_folder, export_folder):  # of the first they are a copy, so that is named if both are wrong
        _settings(folder)
    with reading(export_folder):
        exported = AutoTokenizer.from_pretrained(export_folder, trust_remote_code=False)
    special = [token.content for token in trained.get_added_tokens_decoder().values()]
    for text in (*texts, *(f"a {token} b{token}" for token in special)):
        expected = trained.encode(text, add_special_tokens=False).ids
        found = exported(text, add_special_tokens=False).input_ids
        if found != expected:
            raise UserError(
                f"{trained_folder}: AutoTokenizer makes {len(found)} other tokens of {text!r:.80} than the "
                f"{len(expected)} of tokenizer.json, which was trained with: expected a tokenizer whose normalizer and "
                f"pre_tokenizer are those of {type(exported).__name__}"
            )

"""The tokenizer is its file: the same tokens whatever lies beside it, an identity, and one line if it is damaged."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from data.tokenizer import (
    PROBES,
    chat_template,
    check_tokenizer,
    load_tokenizer,
    read_tokenizer,
    tokenizer_identity,
    verify_tokenizer,
)
from errors import UserError

FAMILY = {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}
TINY = Path(__file__).resolve().parents[2] / "data" / "tiny" / "tokenizer"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "tokenizer"))


def change(path, edit):
    contents = json.loads(path.read_text())
    edit(contents)
    path.write_text(json.dumps(contents))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_tokens_are_the_files_with_a_config_of_this_family_beside_it(folder):
    (folder / "config.json").write_text(
        '{"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}'
    )
    change(folder / "tokenizer.json", lambda contents: contents.update(normalizer=None))  # the family's class has NFC
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(str(folder))
    for text in PROBES:
        assert ids(loaded, text) == ids(file, text).ids == read_tokenizer(str(folder)).encode(text).ids
    decomposed = "e\u0301te\u0301"
    other = ids(AutoTokenizer.from_pretrained(folder), decomposed)  # what is not asked here
    assert other == file.encode(unicodedata.normalize("NFC", decomposed)).ids
    assert ids(loaded, decomposed) != other


def test_what_the_settings_say_adds_no_token(folder):
    """A word of the vocabulary as end-of-sequence token would be cut out of texts, if it were added to them."""
    change(folder / "tokenizer_config.json", lambda settings: settings.update(eos_token="Ġthe", bos_token=None))
    loaded = load_tokenizer(str(folder))
    assert loaded.eos_token_id == read_tokenizer(str(TINY)).token_to_id("Ġthe")
    assert ids(loaded, "of the Ġthe") == read_tokenizer(str(TINY)).encode("of the Ġthe").ids
    change(folder / "tokenizer_config.json", lambda settings: settings.update(eos_token={"content": "<|im_end|>"}))
    assert load_tokenizer(str(folder)).eos_token_id == 4095


def test_which_chat_template_counts(folder):
    """As in transformers: the files, and only without them the settings."""
    change(folder / "tokenizer_config.json", lambda settings: settings.update(chat_template="{{ 'settings' }}"))
    (folder / "chat_template.jinja").write_text("{{ 'file' }}")

    def rendered():
        ours, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tools=tools, tokenize=False)
            for tokenizer in (ours, theirs)
            for tools in (None, [{"name": "f"}])
        ]
        assert texts[:2] == texts[2:]
        return texts[:2]

    assert rendered() == ["file", "file"]
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    assert rendered() == ["file", "tools"]
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "chat_template.jinja").unlink()
    assert rendered() == ["settings", "settings"]
    several = [{"name": "default", "template": "{{ 'a' }}"}, {"name": "tool_use", "template": "{{ 'b' }}"}]
    change(folder / "tokenizer_config.json", lambda settings: settings.update(chat_template=several))
    assert rendered() == ["a", "b"]
    change(folder / "tokenizer_config.json", lambda settings: settings.pop("chat_template"))
    assert chat_template(str(folder)) is None


# Identity

EDITS = {
    "normalizer": lambda contents: contents.update(normalizer={"type": "NFKC"}),
    "pre_tokenizer": lambda contents: contents["pre_tokenizer"]["pretokenizers"].pop(0),
    "merges": lambda contents: contents["model"]["merges"].pop(),
    "order of merges": lambda contents: contents["model"]["merges"].reverse(),
    "vocabulary": lambda contents: contents["model"]["vocab"].update(
        {"Ġof": 3, "%": contents["model"]["vocab"]["Ġof"]}
    ),
    "added": lambda contents: contents["added_tokens"][0].update(lstrip=True),
    "dropout": lambda contents: contents["model"].update(dropout=0.1),
    "byte_fallback": lambda contents: contents["model"].update(byte_fallback=True),
    "post_processor": lambda contents: contents.update(
        post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_another_tokenizer_has_another_identity(folder, what):
    before = tokenizer_identity(str(folder))
    change(folder / "tokenizer.json", EDITS[what])
    assert tokenizer_identity(str(folder)) != before
    assert tokenizer_identity(str(folder), "text") != tokenizer_identity(str(TINY), "text")


def test_the_same_tokenizer_written_otherwise_has_the_same_identity(folder):
    before = [tokenizer_identity(str(folder), data_format) for data_format in (None, "text", "chat")]
    assert len(set(before)) == 3

    def edit(contents):
        contents["model"]["merges"] = [
            " ".join(pair) if isinstance(pair, list) else pair.split(" ") for pair in contents["model"]["merges"]
        ]
        contents["model"].pop("fuse_unk", None)
        contents["model"]["continuing_subword_prefix"] = ""
        contents["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        contents["model"]["vocab"] = dict(reversed(contents["model"]["vocab"].items()))

    change(folder / "tokenizer.json", edit)
    assert [tokenizer_identity(str(folder), data_format) for data_format in (None, "text", "chat")] == before


def test_the_end_token_and_the_template_count_where_they_are_used(folder):
    before = {data_format: tokenizer_identity(str(folder), data_format) for data_format in (None, "text", "chat")}
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    after = {data_format: tokenizer_identity(str(folder), data_format) for data_format in before}
    assert [after[key] == before[key] for key in (None, "text", "chat")] == [True, True, False]
    change(folder / "tokenizer_config.json", lambda settings: settings.update(eos_token="<|im_end|>"))
    changed = {data_format: tokenizer_identity(str(folder), data_format) for data_format in before}
    assert [changed[key] == after[key] for key in (None, "text", "chat")] == [True, False, False]


# Exports


def test_an_export_that_tokenises_otherwise_is_told(folder):
    verify_tokenizer(str(TINY), str(folder), PROBES)
    (folder / "config.json").write_text(
        '{"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}'
    )
    plain = ["The with statement.", "x = 3"]
    verify_tokenizer(str(TINY), str(folder), [*plain, *PROBES])  # its pre-tokenizer and normaliser are the family's own
    change(folder / "tokenizer.json", lambda contents: contents.update(normalizer=None))
    verify_tokenizer(str(folder), str(folder), plain)
    with pytest.raises(UserError, match=r"makes \d+ other tokens of '.*' than the \d+ of tokenizer\.json"):
        verify_tokenizer(str(folder), str(folder), [*plain, "e\u0301te\u0301"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    family = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    tokenizer.normalizer, tokenizer.pre_tokenizer = family.normalizer, family.pre_tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    verify_tokenizer(str(folder), str(folder), [*plain, *PROBES])


def test_an_export_without_a_special_token(folder):
    change(folder / "tokenizer.json", lambda contents: contents["added_tokens"].pop())
    change(folder / "tokenizer_config.json", lambda settings: settings.pop("additional_special_tokens"))
    with pytest.raises(UserError, match=r"other tokens of 'a <\|im_end\|> b<\|im_end\|>'"):
        verify_tokenizer(str(TINY), str(folder), [])


# What is refused


def refusal(folder, vocab_size=4096):
    with pytest.raises(UserError) as raised:
        check_tokenizer(str(folder), vocab_size, True)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)
    return str(raised.value)


def test_code_of_its_own_is_never_run(folder):
    auto_map = {"AutoTokenizer": ["code.Tokenizer", None]}
    change(folder / "tokenizer_config.json", lambda settings: settings.update(auto_map=auto_map))
    (folder / "code.py").write_text("raise SystemExit('ran')")
    assert "auto_map = {'AutoTokenizer'" in refusal(folder)
    for function in (load_tokenizer, lambda name: verify_tokenizer(str(TINY), name, [])):
        with pytest.raises(UserError, match="is code of its own, which is never run"):
            function(str(folder))


def test_what_a_tokenizer_needs(folder, tmp_path):
    assert "has token 4095, expected all below the model's vocab_size = 4095" in refusal(folder, 4095)
    change(folder / "tokenizer_config.json", lambda settings: settings.pop("eos_token"))
    assert "data.end_of_document = True: expected an eos_token in" in refusal(folder)
    check_tokenizer(str(folder), 4096, False)
    change(folder / "tokenizer_config.json", lambda settings: settings.update(eos_token="<|none|>"))
    assert "eos_token = '<|none|>' is no token of tokenizer.json" in refusal(folder)
    change(folder / "tokenizer.json", lambda contents: contents["added_tokens"][2].update(id=7000))
    assert "token '<|im_end|>' has id 7000: expected 4095" in refusal(folder)
    assert "expected a directory with tokenizer.json" in refusal(tmp_path)
    Tokenizer(models.BPE({}, [])).save(str(folder / "tokenizer.json"))
    assert "expected a tokenizer with a vocabulary" in refusal(folder)
    empty = Tokenizer(models.BPE({"a": 0}, []))
    empty.normalizer, empty.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel()
    empty.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    assert "expected a directory with tokenizer_config.json" in refusal(folder)


@pytest.mark.parametrize("name", ["eos_token", "bos_token", "pad_token"])
@pytest.mark.parametrize("value", [3, [], {}, {"content": 3}, "", "\ud800", {"content": None}, True, 1.5])
def test_special_tokens_that_are_none(folder, name, value):
    change(folder / "tokenizer_config.json", lambda settings: settings.update({name: value}))
    try:
        check_tokenizer(str(folder), 4096, False)
    except UserError as error:
        assert f"{name} = " in str(error) and "is no token of tokenizer.json" in str(error)  # noqa: PT017, PT018
    else:
        assert not value
        assert getattr(load_tokenizer(str(folder)), name) is None


@pytest.mark.parametrize(
    "value", [3, {"a": 1}, [1], [{"name": "default"}], "\ud800", [{"name": 3, "template": "x"}], True]
)
def test_templates_that_are_none(folder, value):
    (folder / "chat_template.jinja").unlink()
    change(folder / "tokenizer_config.json", lambda settings: settings.update(chat_template=value))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: chat_template: expected a text, or a list of them"):
        chat_template(str(folder))


def _damaged(contents: bytes, seed: int) -> bytes:
    """Bytes after one of several kinds of damage."""
    draw = random.Random(seed)
    place = draw.randrange(len(contents))
    kind = seed % 6
    if kind == 0:
        return contents[:place]
    if kind == 1:
        return contents[:place] + bytes([draw.randrange(256)]) + contents[place + 1 :]
    if kind == 2:
        return draw.choice([b"", b"null", b"[]", b"{}", b"3", b"\xff\xfe", b"\x00" * 9, b"[" * 99_999, b'{"model": 3}'])
    tree = json.loads(contents)
    node, keys = tree, []  # a random place in the tree takes another value
    while isinstance(node, dict | list) and node and (not keys or draw.random() < 0.7):
        keys.append(draw.choice(list(node) if isinstance(node, dict) else range(len(node))))
        parent, node = node, node[keys[-1]]
    parent[keys[-1]] = draw.choice([None, 3, -1, 2**70, "x", [], {}, [None], 1.5, True, "\ud800", {"type": "x"}])
    return json.dumps(tree).encode()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_damaged_files_are_refused_in_one_line_or_still_work(tmp_path, name):
    """With a small vocabulary, so that the damage hits the settings too."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(TINY, folder)
    change(folder / "tokenizer.json", lambda contents: _shrink(contents))
    contents = (folder / name).read_bytes() if name != "chat_template.jinja" else b'["not JSON but a template"]'
    load_tokenizer(str(folder))
    num_refused = 0
    for seed in range(150):
        (folder / name).write_bytes(_damaged(contents, seed))
        try:
            check_tokenizer(str(folder), 4096, False)
            tokenizer_identity(str(folder), "chat")
            loaded = load_tokenizer(str(folder))
            loaded.backend_tokenizer.encode("The text. 3")
        except UserError as error:
            num_refused += 1
            assert str(folder) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert num_refused > (5 if name == "chat_template.jinja" else 20)


def _shrink(contents):
    vocab = contents["model"]["vocab"]
    contents["model"]["vocab"] = {token: number for token, number in vocab.items() if number < 256}
    contents["model"]["merges"] = []
    for number, token in enumerate(contents["added_tokens"]):
        token["id"] = 256 + number

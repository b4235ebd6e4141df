"""What is asked of a chat template: its options, of the run and of a sample; families that end turns otherwise; and
conversations cut from the left. The oracle for spans: the {% generation %} marks of templates, read by the library."""

import itertools
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from config.options import Data
from config.reading import load_config
from data.chat import end_of_turn_ids
from data.packing import BadSample
from data.samples import EncodeChat
from data.tokenizer import tokenizer_identity
from errors import UserError
from models.ops.labels import IGNORED

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).parent / "templates"
TINY = str(ROOT / "data" / "tiny" / "tokenizer")
SPECIAL = {
    "harmony_style": ["<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>"],
    "deepseek_style": ["<|User|>", "<|Assistant|>", "<|end_of_sentence|>", "<|calls_begin|>", "<|calls_end|>",
                       "<|output|>"],
    "qwen35_style": [],
}  # fmt: skip


def tokenizer_of(style):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[style]})
    return tokenizer


TOKENIZERS = {style: tokenizer_of(style) for style in SPECIAL}


def encode(style, record, max_tokens=10_000, **data):
    data = Data(format="chat", chat_template=str(TEMPLATES / f"{style}.jinja"), **data)
    return EncodeChat(data, TOKENIZERS[style], max_tokens)(record if isinstance(record, dict) else {"messages": record})


def trained(style, sample):
    """The runs of trained tokens, decoded."""
    is_trained = sample.labels != IGNORED
    runs = itertools.groupby(range(len(is_trained)), lambda place: is_trained[place])
    return [TOKENIZERS[style].decode(sample.labels[list(run)].tolist()) for flag, run in runs if flag]


def text(style, sample):
    return TOKENIZERS[style].decode(sample.tokens.tolist())


def user(content):
    return {"role": "user", "content": content}


def answer(content, **others):
    return {"role": "assistant", "content": content, **others}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": "a b", "n": 3}}}
TURNS = [user("One?"), answer("Two."), user("Three?"), answer("Four."), user("Five?"), answer("Six.")]


@pytest.mark.parametrize("name", ["think", "user", "loop", "tojson", "m", "", "enable_thinkin"])
def test_a_word_of_the_template_is_no_option_of_it(name):
    template = TOKENIZERS["qwen35_style"].chat_template
    with pytest.raises(UserError, match="the chat template does not read it"):
        EncodeChat(Data(format="chat", template_options={name: False}), _with_template(template), 1000)


def test_options_of_the_run_and_of_a_sample():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ who|default('user') }}\n{{ m.content }}"
        "<|im_end|>"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = TOKENIZERS["qwen35_style"]

    def first(options, own):
        encoder = EncodeChat(Data(format="chat", template_options=options), _with_template(template), 1000)
        return tokenizer.decode(encoder({"messages": TURNS[:2], **own}).tokens.tolist()).partition("\n")[0]

    assert first({}, {}) == "<|im_start|>user"
    assert first({"who": "U"}, {}) == "<|im_start|>U"
    assert first({"who": "U"}, {"chat_template_kwargs": {"who": "V"}}) == "<|im_start|>V"
    assert first({}, {"chat_template_kwargs": '{"who": "V"}'}) == "<|im_start|>V"
    with pytest.raises(UserError, match=r"data\.template_options\.whom = 1: the chat template does not read it"):
        first({"whom": 1}, {})
    with pytest.raises(
        UserError, match=r"data\.template_options\.messages = 1: expected an option of the chat template"
    ):
        first({"messages": 1}, {})
    with pytest.raises(BadSample, match="has chat_template_kwargs with whom = 1: the chat template does not read it"):
        first({}, {"chat_template_kwargs": {"whom": 1}})
    with pytest.raises(BadSample, match="has the special token '<\\|im_end\\|>' in a text"):
        first({}, {"chat_template_kwargs": {"who": "<|im_end|>"}})


def _with_template(template):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    return tokenizer


def test_samples_with_and_without_thinking_in_any_order():
    """What stands before an answer depends on a sample's own options, and is learnt for each."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not plain %}Answer:\n{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not plain %}Answer:\n{% endif %}{% endif %}"
    )
    encoder = EncodeChat(Data(format="chat"), _with_template(template), 1000)
    for plain in (False, True, True, False):
        sample = encoder({"messages": TURNS[:2], "chat_template_kwargs": {"plain": plain}})
        assert trained("qwen35_style", sample) == ["Two.<|im_end|>"]
        assert ("Answer:" in text("qwen35_style", sample)) != plain


def test_options_in_a_configuration(tmp_path):
    (tmp_path / "a.toml").write_text(
        'extends = "qwen35moe_tiny.toml"\n[data]\ntemplate_options = {enable_thinking = false, n = [1]}\n'.replace(
            "qwen35", str(ROOT / "train_configs" / "qwen35")
        )
    )
    base = ["--config", str(tmp_path / "a.toml")]
    assert load_config(base).data.template_options == {"enable_thinking": False, "n": [1]}
    over = load_config([*base, "--data.template_options.enable_thinking=true", "--data.template_options.word", "low"])
    assert over.data.template_options == {"enable_thinking": True, "n": [1], "word": "low"}
    for value in ("3", '"x"'):
        (tmp_path / "b.toml").write_text(f"[data]\ntemplate_options = {value}\n")
        with pytest.raises(UserError, match=r"data\.template_options = .*: expected a table"):
            load_config(["--config", str(tmp_path / "b.toml")])
    (tmp_path / "b.toml").write_text("[data]\ntemplate_options = {day = 2026-01-01}\n")
    with pytest.raises(UserError, match=r"data\.template_options = .*: expected a table of strings, numbers"):
        load_config(["--config", str(tmp_path / "b.toml")])


def test_a_template_in_a_file(tmp_path):
    sample = encode("qwen35_style", TURNS[:2])
    assert text("qwen35_style", sample).endswith("<think>\n\n</think>\n\nTwo.<|im_end|>\n")
    assert tokenizer_identity(TINY, "chat") != tokenizer_identity(TINY, "chat", str(TEMPLATES / "qwen35_style.jinja"))
    with pytest.raises(UserError, match=r"data\.chat_template = '.*none\.jinja': expected a file with a chat template"):
        EncodeChat(Data(format="chat", chat_template=str(tmp_path / "none.jinja")), TOKENIZERS["qwen35_style"], 10)


def test_three_tokens_that_end_turns():
    """Nobody writes <|end|> behind an answer: it stands there in earlier turns only, and is not trained on."""
    sample = encode("harmony_style", TURNS[:4])
    assert trained("harmony_style", sample) == [
        "<|channel|>final<|message|>Two.", "<|channel|>final<|message|>Four.<|return|>",
    ]  # fmt: skip
    turns = [
        user("One?"),
        answer("", tool_calls=[CALL]),
        {"role": "tool", "content": "3"},
        answer("Two.", thinking="Hm."),
    ]
    call, last = trained("harmony_style", encode("harmony_style", turns))
    assert call == ' to=functions.add<|channel|>commentary json<|message|>{"x": "a b", "n": 3}<|call|>'
    assert last == (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Two.<|return|>"
    )


def test_all_tokens_that_end_answers_are_told_to_generation(tmp_path):
    tokenizer = TOKENIZERS["harmony_style"]
    tokenizer.save_pretrained(tmp_path)
    data = Data(format="chat", chat_template=str(TEMPLATES / "harmony_style.jinja"))
    expected = tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    assert end_of_turn_ids(str(tmp_path), data) == expected
    assert end_of_turn_ids(TINY, Data(format="chat")) == [4095]


def test_arguments_as_the_text_that_a_template_wants():
    turns = [user("One?"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, answer("Two.")]
    sample = encode("deepseek_style", turns)
    assert trained("deepseek_style", sample) == [
        '<|calls_begin|>add\n{"x": "a b", "n": 3}<|calls_end|><|end_of_sentence|>', "Two.<|end_of_sentence|>",
    ]  # fmt: skip


@pytest.mark.parametrize("style", ["harmony_style", "deepseek_style"])
def test_spans_are_those_of_the_templates_own_marks(style):
    template = (TEMPLATES / f"{style}.jinja").read_text()
    conversations = [TURNS[:2], TURNS[:4], TURNS, [user("é\n"), answer("1\n\n2 "), user("  x"), answer("`ü`")]]
    as_text = {"type": "function", "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}
    if style == "deepseek_style":
        conversations.append([user("One?"), answer("", tool_calls=[as_text]), user("x"), answer("Two.")])
    for messages in conversations:
        sample = encode(style, messages)
        marks = TOKENIZERS[style].apply_chat_template(
            messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert sample.tokens.tolist() == marks["input_ids"]
        expected = [bool(mark) for mark in marks["assistant_masks"]]
        if style == "harmony_style":  # whose mark leaves out what only the last answer ends in
            expected[-1] = True
        assert (sample.labels[:-1] != IGNORED).tolist() == expected[1:]


def test_the_first_turns_are_left_out_until_the_rest_fits():
    system = {"role": "system", "content": "S"}
    whole = encode("qwen35_style", [system, *TURNS])
    sizes = {}
    for begin in (2, 4):
        rest = encode("qwen35_style", [system, *TURNS[begin:]])
        sizes[begin] = len(rest.tokens)
        for size in (len(rest.tokens), len(rest.tokens) + 1):
            short = encode("qwen35_style", [system, *TURNS], size, too_long="truncate_left")
            assert short.tokens.tolist() == rest.tokens.tolist()
            assert short.labels.tolist() == rest.labels.tolist()
            told = f"{len(whole.tokens)} tokens, more than the {size} of a row: its first {begin // 2} turn"
            assert short.note[0] == "truncated"
            assert told in short.note[1]
    assert sizes[4] < sizes[2] < len(whole.tokens)
    kept = encode("qwen35_style", [system, *TURNS], len(whole.tokens), too_long="truncate_left")
    assert (kept.tokens.tolist(), kept.note) == (whole.tokens.tolist(), None)
    with pytest.raises(BadSample, match="more than the 10 of a row"):
        encode("qwen35_style", [system, *TURNS], 10, too_long="truncate_left")


def test_weights_and_calls_go_with_their_turns():
    turns = [
        user("Long? " * 20), answer("x", weight=0), user("One?"), answer("", tool_calls=[CALL], weight=0),
        {"role": "tool", "content": "3"}, answer("Two."), user("Three?"), answer("Four.", weight=0),
    ]  # fmt: skip
    short = encode("qwen35_style", turns, len(encode("qwen35_style", turns[2:]).tokens), too_long="truncate_left")
    assert trained("qwen35_style", short) == ["Two.<|im_end|>"]
    assert "Long?" not in text("qwen35_style", short)
    assert "One?" in text("qwen35_style", short)


def tiny(record):
    data = Data(format="chat")
    sample = EncodeChat(data, AutoTokenizer.from_pretrained(TINY), 10_000)(record)
    return text("qwen35_style", sample), trained("qwen35_style", sample)


def test_the_tiny_template_is_plain_for_plain_chats():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    plain = (TEMPLATES / "chatml.jinja").read_text()
    lines = (ROOT / "data" / "tiny" / "chat" / "conversations.jsonl").read_text().splitlines()
    for messages in [TURNS, *(json.loads(line)["messages"] for line in lines)]:
        for prompt in (False, True):
            ours, expected = (
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=prompt, chat_template=each
                )
                for each in (None, plain)
            )
            assert ours == expected


def test_the_tiny_template_writes_tools_reasoning_and_pictures_as_the_family_does():
    tool = {"type": "function", "function": {"name": "add", "description": "Sums.", "parameters": {}}}
    turns = [
        user("One?"), answer("So.", reasoning="Old."), user("Sum?"), answer("", reasoning="Hm.", tool_calls=[CALL]),
        {"role": "tool", "content": "7"}, answer("Seven.", reasoning="Ah."),
    ]  # fmt: skip
    rendered, spans = tiny({"messages": turns, "tools": [tool], "system": "Be brief."})
    assert rendered.startswith(
        "<|im_start|>system\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n"
    )
    assert '"description": "Sums."' in rendered
    assert "</tool_call>\n\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n" in rendered
    assert spans == [
        "So.<|im_end|>",
        "<think>\nHm.\n</think>\n\n<tool_call>\n<function=add>\n<parameter=x>\na b\n</parameter>\n<parameter=n>\n3\n"
        "</parameter>\n</function>\n</tool_call><|im_end|>",
        "<think>\nAh.\n</think>\n\nSeven.<|im_end|>",
    ]
    assert "<|im_end|>\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n" in rendered
    _, spans = tiny({"messages": turns, "tools": [tool], "chat_template_kwargs": {"preserve_thinking": True}})
    assert spans[0] == "<think>\nOld.\n</think>\n\nSo.<|im_end|>"
    _, spans = tiny({"messages": [user("x"), turns[-1]], "chat_template_kwargs": {"enable_thinking": True}})
    assert spans[-1] == "Ah.\n</think>\n\nSeven.<|im_end|>"
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "video"}]
    shown = tokenizer.apply_chat_template([user(parts)], tokenize=False)
    expected = "<|vision_start|><|image_pad|><|vision_end|>What?<|vision_start|><|video_pad|><|vision_end|>"
    assert shown == f"<|im_start|>user\n{expected}<|im_end|>\n"


def _trained_by(template, messages):
    tokenizer = tokenizer_of("deepseek_style")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL["harmony_style"] + SPECIAL["deepseek_style"]})
    tokenizer.chat_template = template
    sample = EncodeChat(Data(format="chat"), tokenizer, 1000)({"messages": messages})
    is_trained = sample.labels != IGNORED
    runs = itertools.groupby(range(len(is_trained)), lambda place: is_trained[place])
    return [tokenizer.decode(sample.labels[list(run)].tolist()) for flag, run in runs if flag]


CALLED = [user("One?"), answer("", tool_calls=[CALL]), {"role": "tool", "content": "4"}, answer("Two.")]


def test_calls_where_nothing_stands_before_an_answer():
    template = (
        "{% for m in messages %}{% if m.role in ('user', 'tool') %}<|User|>{{ m.content }}<|output|>"
        "{% elif m.tool_calls %}<|calls_begin|>{{ m.tool_calls[0].function|tojson }}<|end_of_sentence|>"
        "{% else %}{{ m.content }}<|end_of_sentence|>{% endif %}{% endfor %}"
    )
    call = '<|calls_begin|>{"name": "add", "arguments": {"x": "a b", "n": 3}}<|end_of_sentence|>'
    assert _trained_by(template, CALLED) == [call, "Two.<|end_of_sentence|>"]
    asks = template.replace("<|output|>", "<|output|>{{ '->' if loop.last }}")
    with pytest.raises(BadSample, match="cannot be found"):  # the prompt does not stand in the rendering
        _trained_by(asks, CALLED)


def test_a_name_that_stands_in_the_answer_to_its_call_too():
    template = (
        "{% set ns = namespace(name='') %}{% for m in messages %}{% if m.tool_calls %}"
        "{% set ns.name = m.tool_calls[0].function.name %}<|start|>assistant to={{ ns.name }}<|message|>"
        "{{ m.tool_calls[0].function.arguments|tojson }}<|call|>"
        "{% elif m.role == 'tool' %}<|start|>{{ ns.name }}<|message|>{{ m.content }}<|end|>"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    )
    call = ' to=add<|message|>{"x": "a b", "n": 3}<|call|>'
    assert _trained_by(template, CALLED) == [call, "<|message|>Two.<|end|>"]
    twice = template.replace("arguments|tojson }}", "arguments|tojson }} {{ ns.name }}")
    assert _trained_by(twice, CALLED) == [call.replace("<|call|>", " add<|call|>"), "<|message|>Two.<|end|>"]


def test_an_answer_that_ends_and_is_asked_for_again_is_refused():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% for c in m.tool_calls|default([]) %}<|Assistant|>{{ c.function|tojson }}<|end_of_sentence|>{% endfor %}"
        "{% if m.content %}<|Assistant|>{{ m.content }}<|end_of_sentence|>{% endif %}"
        "{% else %}<|User|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
    )
    assert len(_trained_by(template, CALLED)) == 2
    for message in (answer("Then.", tool_calls=[CALL]), answer("", tool_calls=[CALL, CALL])):
        with pytest.raises(BadSample, match="cannot be found"):
            _trained_by(template, [user("One?"), message])

"""Chat: the text that is trained on, decoded and compared, for three styles of templates; the unclear is refused."""

import itertools
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from config.options import Data
from data.chat import ChatTemplate
from data.packing import BadSample
from data.samples import EncodeChat
from errors import UserError
from models.ops.labels import IGNORED

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).parent / "templates"
STYLES = ("chatml", "qwen35_style", "llama3_style")


def load_tokenizer(style):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny" / "tokenizer")
    if style == "llama3_style":
        special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (TEMPLATES / f"{style}.jinja").read_text()
    return tokenizer


TOKENIZERS = {style: load_tokenizer(style) for style in STYLES}


def encode(style, messages, tools=None, template=None, max_tokens=10_000, **data):
    tokenizer = TOKENIZERS[style]
    if template is not None:
        tokenizer = load_tokenizer("chatml")
        tokenizer.chat_template = template
    encoder = EncodeChat(Data(format="chat", **data), tokenizer, max_tokens)
    return encoder({"messages": messages, "tools": tools, "id": 3})


def trained_texts(style, messages, tools=None, **options):
    """The runs of trained tokens, decoded. Checks that the tokens are those of the library's own rendering."""
    tokenizer, sample = TOKENIZERS[style], encode(style, messages, tools, **options)
    if "template" not in options:
        rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
        assert sample.tokens.tolist() == rendered
    is_trained = sample.labels != IGNORED
    assert (sample.labels[:-1] == sample.tokens[1:])[is_trained[:-1]].all()
    assert sample.labels[-1] == IGNORED
    runs = itertools.groupby(range(len(is_trained)), lambda place: is_trained[place])
    return [tokenizer.decode(sample.labels[list(run)].tolist()) for trained, run in runs if trained]


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, reasoning=None, calls=None, **more):
    message = {"role": "assistant", "content": text, **more}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls is not None:
        calls = [{"name": name, "arguments": arguments} for name, arguments in calls]
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def tool(text):
    return {"role": "tool", "content": text}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]
TURNS = [system("Be brief."), user("Hi?"), assistant("Ho."), user("Hi? Ho."), assistant("Ho.\nHi?")]
END = {"chatml": "<|im_end|>", "qwen35_style": "<|im_end|>", "llama3_style": "<|eot_id|>"}


@pytest.mark.parametrize("style", STYLES)
def test_every_turn_of_the_assistant_with_its_end_and_nothing_else(style):
    """Although the last answer repeats the question, and the first one both of them."""
    assert trained_texts(style, TURNS) == ["Ho." + END[style], "Ho.\nHi?" + END[style]]


@pytest.mark.parametrize("style", STYLES)
def test_the_last_turn_only(style):
    assert trained_texts(style, TURNS, train_on="last") == ["Ho.\nHi?" + END[style]]
    assert trained_texts(style, TURNS[:4], train_on="last") == ["Ho." + END[style]]


@pytest.mark.parametrize("style", STYLES)
def test_weights_of_messages(style):
    turns = [*TURNS[:2], {**TURNS[2], "weight": 0}, TURNS[3], {**TURNS[4], "weight": 1}]
    assert trained_texts(style, turns) == ["Ho.\nHi?" + END[style]]
    with pytest.raises(BadSample, match=r"message 2 with weight 0\.5, expected 0 or 1"):
        encode(style, [*TURNS[:2], {**TURNS[2], "weight": 0.5}])
    with pytest.raises(BadSample, match="no turn of the assistant that is to be trained on") as raised:
        encode(style, turns[:3])
    assert raised.value.reason == "nothing_to_train"


@pytest.mark.parametrize("style", ["qwen35_style", "llama3_style"])
def test_templates_that_trim(style):
    turns = [user("Hi?\n"), assistant("\n\n Ho.  \n"), user("  Hi"), assistant("x \n y\t")]
    assert trained_texts(style, turns) == ["Ho." + END[style], "x \n y" + END[style]]


def test_a_template_that_does_not_trim():
    assert trained_texts("chatml", [user("Hi?"), assistant("Ho. \n")]) == ["Ho. \n<|im_end|>"]
    # Two line ends, one of the template's and one of the answer's, are one token: no border lies between them.
    with pytest.raises(BadSample, match="a token that lies across the border of a turn") as raised:
        encode("chatml", [user("Hi?"), assistant("\nHo.")])
    assert raised.value.reason == "unclear_spans"


# Reasoning

THOUGHTS = [user("One?"), assistant("1", "first\n\nthoughts"), user("Two?"), assistant("2", "second thoughts")]


def test_reasoning_is_trained_on_where_the_template_shows_it():
    """What the prompt for an answer ends with, <think> and a line end, is not: it is given when the model is used."""
    assert trained_texts("qwen35_style", THOUGHTS) == ["1<|im_end|>", "second thoughts\n</think>\n\n2<|im_end|>"]
    assert trained_texts("qwen35_style", THOUGHTS[:2]) == ["first\n\nthoughts\n</think>\n\n1<|im_end|>"]


def test_reasoning_inside_of_the_content():
    turns = [user("One?"), assistant("<think>\nfirst\n</think>\n\n1"), user("Two?"), assistant("<think>so</think>2")]
    assert trained_texts("qwen35_style", turns) == ["1<|im_end|>", "so\n</think>\n\n2<|im_end|>"]
    # Another template takes it for text like any other.
    assert trained_texts("chatml", turns[:2]) == ["<think>\nfirst\n</think>\n\n1<|im_end|>"]


def test_reasoning_that_is_written_as_a_model_writes_it_behind_its_prompt():
    turns = [user("One?"), assistant("first\n</think>\n\n1"), user("Two?"), assistant("so\n</think>\n2")]
    assert trained_texts("qwen35_style", turns) == ["1<|im_end|>", "so\n</think>\n\n2<|im_end|>"]


@pytest.mark.parametrize("content", ["so</think>\n\nA", "so </think>\n\nA", "so\n</think>A", "so\n</think>\n\nA"])
def test_a_closing_tag_at_a_lines_beginning_or_end(content):
    reasoning = content.partition("</think>")[0].strip()  # which this template does
    assert trained_texts("qwen35_style", [user("1?"), assistant(content)]) == [f"{reasoning}\n</think>\n\nA<|im_end|>"]
    earlier = [user("1?"), assistant(content), user("2?"), assistant("2")]
    assert trained_texts("qwen35_style", earlier)[0] == "A<|im_end|>"


@pytest.mark.parametrize("content", ["</think>\n\nA", "</think>A", "<think>\n\n</think>\n\nA"])
def test_no_reasoning_in_a_content(content):
    assert trained_texts("qwen35_style", [user("1?"), assistant(content)]) == ["A<|im_end|>"]


def test_an_opening_tag_in_an_answer_is_text():
    turns = [user("One?"), assistant("<think>so</think>Use <think> here."), user("Two?"), assistant("A <think> tag.")]
    assert trained_texts("qwen35_style", turns)[0] == "Use <think> here.<|im_end|>"
    assert trained_texts("qwen35_style", turns)[1].endswith("A <think> tag.<|im_end|>")
    assert trained_texts("qwen35_style", turns[:2]) == ["so\n</think>\n\nUse <think> here.<|im_end|>"]


@pytest.mark.parametrize(
    "content",
    [
        "Lead. <think>hmm</think>Answer",  # the template would drop the lead
        "<think>a</think>X<think>b</think>Y",
        "<think>a</think>The tag </think> ends it.",
        "<think>so <think> on</think>Y",
        "Write the tag </think> where it ends.",  # no reasoning, but what an answer says
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_tags_of_reasoning_in_other_places_are_refused_where_the_template_cuts_there(content, is_last):
    turns = [user("One?"), assistant(content)] + ([] if is_last else [user("Two?"), assistant("2")])
    with pytest.raises(BadSample) as raised:
        encode("qwen35_style", turns)
    assert raised.value.reason in ("unrendered", "unclear_spans")
    assert trained_texts("chatml", turns)[0] == f"{content}<|im_end|>"


def test_a_think_token_that_the_prompt_does_not_give_is_trained_on():
    template = (TEMPLATES / "qwen35_style.jinja").read_text().replace('"<|im_start|>assistant\\n<think>\\n" }}\n    {%- if e', '"<|im_start|>assistant\\n" }}\n    {%- if e')  # fmt: skip  # noqa: E501
    assert trained_texts("chatml", THOUGHTS, template=template) == [
        "1<|im_end|>", "<think>\nsecond thoughts\n</think>\n\n2<|im_end|>",
    ]  # fmt: skip


def test_empty_think_blocks_only_if_wanted():
    turns = [user("One?"), assistant("1"), user("Two?"), assistant("2", "")]
    rendered = TOKENIZERS["qwen35_style"].apply_chat_template(turns, tokenize=False)
    assert rendered.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n2<|im_end|>\n")
    assert trained_texts("qwen35_style", turns) == ["1<|im_end|>", "2<|im_end|>"]
    wanted = trained_texts("qwen35_style", turns, train_empty_thinking=True)
    assert wanted == ["1<|im_end|>", "<think>\n\n</think>\n\n2<|im_end|>"]


@pytest.mark.parametrize("empty", ["<think></think>", "<think>\n\n</think>\n\n", "<think> </think>\n"])
def test_an_empty_think_block_that_only_some_turns_have_is_not_trained_on(empty):
    """Also where no prompt for an answer ends with it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.before }}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [user("One?"), assistant("1", before=empty), user("Two?"), assistant("2", before="So: ")]
    assert trained_texts("chatml", turns, template=template) == ["1<|im_end|>", "So: 2<|im_end|>"]
    wanted = trained_texts("chatml", turns, template=template, train_empty_thinking=True)
    assert wanted == [f"{empty}1<|im_end|>", "So: 2<|im_end|>"]


# Tools

ADD = ("add", {"a": 1, "b": "two\nlines"})
XML = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\ntwo\nlines\n</parameter>\n</function>\n</tool_call>"  # noqa: E501


def test_tool_calls_are_trained_on_and_responses_are_not():
    turns = [user("Sum?"), assistant("I add.", calls=[ADD, ADD]), tool("3"), tool("4"), assistant("3 and 4")]
    assert trained_texts("qwen35_style", turns, TOOLS) == [
        f"I add.\n\n{XML}\n{XML}<|im_end|>", "3 and 4<|im_end|>",
    ]  # fmt: skip


def test_a_turn_of_tool_calls_alone():
    turns = [user("Sum?"), assistant("", calls=[ADD]), tool("3"), assistant("3")]
    assert trained_texts("qwen35_style", turns, TOOLS) == [XML + "<|im_end|>", "3<|im_end|>"]
    # The same before the last question, where there is no think block.
    longer = [*turns, user("Again?"), assistant("3")]
    assert trained_texts("qwen35_style", longer, TOOLS) == [XML + "<|im_end|>", "3<|im_end|>", "3<|im_end|>"]
    wanted = trained_texts("qwen35_style", turns, TOOLS, train_empty_thinking=True)
    assert wanted == ["<think>\n\n</think>\n\n" + XML + "<|im_end|>", "<think>\n\n</think>\n\n3<|im_end|>"]
    thinking = [turns[0], assistant("", "Add.", calls=[ADD]), *turns[2:]]
    assert trained_texts("qwen35_style", thinking, TOOLS)[0] == f"Add.\n</think>\n\n{XML}<|im_end|>"
    json = '{"name": "add", "parameters": {"a": 1, "b": "two\\nlines"}}<|eot_id|>'
    assert trained_texts("llama3_style", turns) == [json, "3<|eot_id|>"]


def test_arguments_written_as_a_string_and_what_arrow_fills_up():
    turns = [user("Sum?"), assistant("", calls=[("add", '{"a": 1, "b": "two\\nlines"}')]), tool("3")]
    turns = [{"name": None, "tool_calls": None, "weight": None, **turn} for turn in turns]
    sample = encode("qwen35_style", turns, None)
    clean = encode("qwen35_style", [user("Sum?"), assistant(None, calls=[ADD]), tool("3")])
    assert sample.tokens.tolist() == clean.tokens.tolist()
    assert sample.labels.tolist() == clean.labels.tolist()


def test_tools_as_a_string():
    import json

    sample, other = (encode("qwen35_style", TURNS, tools) for tools in (TOOLS, json.dumps(TOOLS)))
    assert sample.tokens.tolist() == other.tokens.tolist()


# Everything that a conversation says is shown


def test_a_template_of_other_names_for_reasoning():
    """As gpt-oss has it; the sample's own name does not matter."""
    template = (TEMPLATES / "qwen35_style.jinja").read_text().replace("reasoning_content", "thinking")
    for name in ("reasoning_content", "reasoning", "thinking"):
        turns = [user("One?"), {"role": "assistant", "content": "1", name: "so"}]
        assert trained_texts("chatml", turns, template=template) == ["so\n</think>\n\n1<|im_end|>"]
        sample, other = encode("qwen35_style", turns), encode("chatml", turns, template=template)
        assert sample.tokens.tolist() == other.tokens.tolist()


DROPPING = {
    "calls": (lambda text: text.replace('message.tool_calls|default([])', "[]"), "whose tool_call the chat template"),
    "arguments": (
        lambda text: text.replace("call.function.arguments|items", "{}|items"),
        "whose tool_call the chat template leaves out: 'two",
    ),
    "tool results": (
        lambda text: text.replace('"\\n<tool_response>\\n" ~ content', '"\\n<tool_response>\\n"'),
        "message 2 whose content the chat template leaves out: 'is 3'",
    ),
    "system": (
        lambda text: text.replace('~ shown(messages[0].content, "system")|trim', ""),
        "message 0 whose content the chat template leaves out: 'Be brief.'",
    ),
    "reasoning": (lambda text: text.replace("reasoning|trim", '""'), "whose reasoning_content the chat template"),
    "tools": (lambda text: text.replace('"\\n" ~ (tool|tojson)', '""'), "tools of which the chat template leaves out"),
}  # fmt: skip


@pytest.mark.parametrize("what", DROPPING)
def test_what_a_template_drops_is_refused(what):
    change, message = DROPPING[what]
    template = (TEMPLATES / "qwen35_style.jinja").read_text()
    call = ("add", {"b": "two\nlines"})
    turns = [user("Sum?"), assistant("", "Add.", calls=[call]), tool("is 3"), assistant("3")]
    if what == "system":
        turns, tools = [system("Be brief."), *turns], None
    else:
        tools = TOOLS if what == "tools" else None
    assert encode("chatml", turns, tools, template=template).tokens.size
    assert change(template) != template
    with pytest.raises(BadSample, match=message) as raised:
        encode("chatml", turns, tools, template=change(template))
    assert raised.value.reason == "unrendered"


@pytest.mark.parametrize("arguments", [{"a": 17}, {"a": [True, 17]}, {"a": {"b": 17.5}}, {"": None}, {"key": ""}])
def test_numbers_and_names_of_arguments_that_a_template_drops(arguments):
    template = (TEMPLATES / "qwen35_style.jinja").read_text()
    turns = [user("Sum?"), assistant("", calls=[("add", arguments)])]
    encode("chatml", turns, template=template)
    dropping = template.replace("call.function.arguments|items", "call.function.arguments|items if value is string")
    if "key" in arguments:
        dropping = template.replace('"<parameter=" ~ name ~ ">', '"<parameter=>')
    with pytest.raises(BadSample, match="of whose tool call the template leaves out") as raised:
        encode("chatml", turns, template=dropping)
    assert raised.value.reason == "unrendered"


def test_reasoning_of_earlier_turns_may_be_left_out_but_none_after_the_question():
    answer = assistant("1", "aaa")
    assert trained_texts("qwen35_style", [user("1?"), answer, user("2?"), assistant("2")]) == [
        "1<|im_end|>", "2<|im_end|>",
    ]  # fmt: skip
    for style in ("chatml", "llama3_style"):  # never shown: the earlier turns' neither
        with pytest.raises(BadSample, match="message 1 whose reasoning_content the chat template leaves out: 'aaa'"):
            encode(style, [user("1?"), answer, user("2?"), assistant("2")])


def test_thoughts_inside_of_a_content_that_a_template_cuts_off():
    """As DeepSeek's and Nemotron's do, in the last turn too: what led to the answer would not be trained on."""
    cut = "m.content.split('</think>')[-1] if m.role == 'assistant' else m.content"
    template = TOKENIZERS["chatml"].chat_template.replace("message.content", f"({cut.replace('m.', 'message.')})")
    assert trained_texts("chatml", [user("1?"), assistant("1")], template=template) == ["1<|im_end|>"]
    with pytest.raises(BadSample, match="whose reasoning_content the chat template leaves out: 'so'") as raised:
        encode("chatml", [user("1?"), assistant("<think>so</think>1")], template=template)
    assert raised.value.reason == "unrendered"


def test_a_turn_of_the_user_that_is_a_tool_response():
    """To templates of this family it is no question, so the reasoning before it is shown."""
    response = "<tool_response>\n3\n</tool_response>"
    turns = [user("Sum?"), assistant("", "Add.", calls=[ADD]), user(response), assistant("3", "So.")]
    assert trained_texts("qwen35_style", turns) == [
        f"Add.\n</think>\n\n{XML}<|im_end|>",
        "So.\n</think>\n\n3<|im_end|>",
    ]
    end = "So.\n</think>\n\n3<|im_end|>"
    turns[2] = user(f"It says {response}, why?")
    assert trained_texts("qwen35_style", turns) == [f"{XML}<|im_end|>", end]


def test_what_stands_between_the_prompt_and_the_answer_is_trained_on():
    """As Llama 4 puts <|python_start|> before a content that goes with tool calls."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}[python]{% endif %}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name ~ call.function.arguments|tojson }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [user("Sum?"), assistant("I add.", calls=[("add", {"a": 1})]), tool("3"), assistant("3")]
    expected = ['[python]I add.add{"a": 1}<|im_end|>', "3<|im_end|>"]
    assert trained_texts("chatml", turns, template=template) == expected


def test_tool_results_that_are_shown_as_json():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content|tojson if m.role == 'tool' else m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [user("Sum?"), assistant("?"), tool('say "3"\n<b>'), assistant("3")]
    assert trained_texts("chatml", turns, template=template) == ["?<|im_end|>", "3<|im_end|>"]


# Templates that do not end


def test_a_template_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("data.template._RENDER_SECONDS", 0.2)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = TOKENIZERS["chatml"].chat_template
    hangs = f"{{% if messages[0].content == 'hang' %}}{loop}{{% endif %}}{template}"
    tokenizer = load_tokenizer("chatml")
    tokenizer.chat_template = hangs
    encoder = EncodeChat(Data(format="chat"), tokenizer, 100)
    for _ in range(3):
        with pytest.raises(BadSample, match=r"takes the chat template more than 0\.2 s") as raised:
            encoder({"messages": [user("hang"), assistant("x")]})
        assert raised.value.reason == "template_error"
        assert encoder({"messages": [user("go"), assistant("x")]}).tokens.size
    with pytest.raises(UserError, match=r"its chat template took more than 0\.2 s for each of 4 conversations"):
        encoder({"messages": [user("hang"), assistant("x")]})
    tokenizer.chat_template = loop
    with pytest.raises(UserError, match="its chat template fails: takes the chat template more"):
        EncodeChat(Data(format="chat"), tokenizer, 100)


def test_a_template_that_makes_too_much(monkeypatch):
    monkeypatch.setattr("data.template._MAX_RENDERING", 5000)
    template = "{{ 'x' * 6000 if messages[0].content == 'much' }}" + TOKENIZERS["chatml"].chat_template
    assert encode("chatml", [user("?"), assistant("!")], template=template).tokens.size
    with pytest.raises(BadSample, match="is rendered as more than 5,000 characters"):
        encode("chatml", [user("much"), assistant("!")], template=template)


# What is refused


@pytest.mark.parametrize(
    ("messages", "reason", "message"),
    [
        (None, "empty", "has no messages"),
        ([], "empty", "has no messages"),
        ("Hi", "wrong_type", "has no messages: expected a list in 'messages', or its JSON"),
        ([["user", "Hi"]], "wrong_type", "message 0 without a role"),
        ([{"role": 3, "content": "x"}], "wrong_type", "message 0 without a role"),
        ([user("x"), {"role": "assistant"}], "wrong_type", "message 1 without content"),
        ([user({"type": "text", "text": "x"})], "wrong_type", "message 0 whose content is no string and no list"),
        (
            [user([{"type": "audio", "audio": "x"}])],
            "unused_field",
            "a content part of type 'audio', expected 'text', ",
        ),
        (
            [user([{"type": "image", "image": "x"}])],
            "no_vision",
            "has 1 images and videos, but the model is built with",
        ),
        ([user([{"type": "text", "text": "x", "bbox": [1]}])], "unused_field", "a content part that has 'bbox'"),
        ([user("x"), assistant("y", reasoning=3)], "wrong_type", "message 1 whose reasoning_content is no string"),
        ([user("x"), assistant("y", calls=[("f", "{")])], "wrong_type", "whose arguments are not JSON"),
        ([user("x"), {**assistant("y"), "tool_calls": "f"}], "wrong_type", "whose tool_calls are no list"),
        ([user("x"), assistant("y", calls=[(None, {})])], "wrong_type", "a tool call without a name"),
        ([user("x"), assistant("y", calls=[(" ", {})])], "wrong_type", "a tool call without a name"),
        ([user("x"), system("y")], "template_error", "refused by the chat template: System message must be"),
        ([{"role": "judge", "content": "x"}], "template_error", "Unexpected message role"),
        ([user("x")], "nothing_to_train", "no turn of the assistant"),
        ([user("x"), assistant("")], "empty", "has message 1 of the assistant that says nothing"),
        ([user("x\ud800"), assistant("y")], "undecodable", "has half a surrogate pair in a text"),
        ([user("x"), assistant("", calls=[("f", {"\udfff": 1})])], "undecodable", "half a surrogate pair"),
        ([user("x"), assistant("y<|im_end|>z")], "special_token", "the special token '<|im_end|>' in a text"),
        ([user("<|im_start|>assistant\nx<|im_end|>"), assistant("y")], "special_token", "<|im_start|>"),
        ([user("x"), assistant("", calls=[("f", {"<|im_end|>": 1})])], "special_token", "<|im_end|>"),
    ],
)
def test_samples_that_are_refused(messages, reason, message):
    with pytest.raises(BadSample) as raised:
        encode("qwen35_style", messages)
    assert message in str(raised.value)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content|upper }}<|im_end|>{% endfor %}", "changed"),
        ("{% for m in messages %}{{ m.content[:2] }}<|im_end|>{% endfor %}", "cut"),
        ("{% for m in messages %}{{ m.content ~ '<|im_end|>' if not loop.last }}{% endfor %}!<|im_end|>", "dropped"),
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'user' or messages|length < 4 or loop.last %}"
            "<|im_end|>{% endif %}{% endfor %}",
            "without an end, so that two turns run together",
        ),
    ],
)
def test_templates_that_do_not_show_where_the_turns_are(template, why):
    with pytest.raises((BadSample, ValueError)) as raised:
        encode("chatml", [user("Abc?"), assistant("Def."), assistant("Ghi."), assistant("Jkl.")], template=template)
    expected = "unrendered" if why == "dropped" else "unclear_spans"
    assert getattr(raised.value, "reason", expected) == expected, why


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "expected one with a chat template"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token ends the assistant's"),
        ("{{ raise_exception('no') }}", "its chat template fails: is refused by the chat template: no"),
    ],
)
def test_tokenizers_that_are_refused(template, message):
    tokenizer = load_tokenizer("chatml")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as raised:
        ChatTemplate(tokenizer, train_on="all", train_empty_thinking=False)
    assert "\n" not in str(raised.value)


# Long ones


def test_conversations_longer_than_a_row():
    whole = encode("chatml", TURNS)
    with pytest.raises(BadSample, match=f"has {len(whole.tokens)} tokens, more than the 30 of a row") as raised:
        encode("chatml", TURNS, max_tokens=30)
    assert raised.value.reason == "too_long"
    assert encode("chatml", TURNS, max_tokens=len(whole.tokens)).note is None
    cut = encode("chatml", TURNS, max_tokens=30, too_long="truncate")
    assert cut.tokens.tolist() == whole.tokens[:30].tolist()
    assert cut.labels.tolist() == whole.labels[:30].tolist()
    assert cut.note[0] == "truncated"
    with pytest.raises(BadSample, match="none to train on among the first"):
        encode("chatml", TURNS, max_tokens=10, too_long="truncate")


# Any conversation: what is trained on is what the assistant's texts say, in every style


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\ue0f0\ue0f1\u0301"), min_size=1, max_size=12)
TURN = st.one_of(
    TEXT.map(user),
    st.tuples(TEXT, st.none() | TEXT).map(lambda texts: assistant(*texts)),
    TEXT.map(tool),
)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=150, deadline=None)
@given(turns=st.lists(TURN, min_size=1, max_size=6))
def test_what_is_trained_on_is_the_assistants_texts(style, turns):
    refused = None
    try:
        texts = trained_texts(style, turns)
    except BadSample as error:
        refused = error.reason
    thinks = any(turn.get("reasoning_content", "").strip() for turn in turns)
    asks = any(turn["role"] == "user" for turn in turns)
    if refused is not None:
        reasons = ("unclear_spans", "nothing_to_train", "template_error", "special_token", "unrendered", "empty")
        assert refused in reasons
        if refused == "empty":
            assert any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns)
        if refused == "unrendered":  # reasoning that the template never shows, or not without a question
            assert thinks
            assert not (style == "qwen35_style" and asks)
        if refused == "special_token":  # hypothesis finds them in the sources
            assert any("<" in text for turn in turns for text in turn.values() if isinstance(text, str))
        if refused == "unclear_spans":  # an empty turn, or one whose first line end joins the template's
            assert any(turn["content"] != turn["content"].strip() or not turn["content"] for turn in turns)
        return
    assert not thinks or (style == "qwen35_style" and asks)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers):
        content = answer["content"] if style == "chatml" else answer["content"].strip()
        reasoning = answer.get("reasoning_content", "").strip()
        expected = [content + END[style]]
        if style == "qwen35_style" and reasoning:
            expected.append(f"{reasoning}\n</think>\n\n{content}{END[style]}")
        # The tokenizer composes characters, which hypothesis finds one in a thousand times.
        assert unicodedata.normalize("NFC", text) in [unicodedata.normalize("NFC", each) for each in expected]


def test_two_renderings_cost_little():
    """A guard against quadratic work: a conversation of 400 turns."""
    turns = [user("Hi?"), assistant("Ho.")] * 200
    sample = encode("qwen35_style", turns)
    assert np.sum(sample.labels != IGNORED) > 400

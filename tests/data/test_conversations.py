"""What is learned of conversations, what is data, and what happens to long ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from jaxcl.data.chat_templates import CHAT_TEMPLATES
from jaxcl.data.conversations import EncodedConversations, Learn, encode_conversations, end_of_turn
from jaxcl.data.messages import Message
from jaxcl.data.pairs import encode_answers, encode_prompts
from jaxcl.data.spec import DataConfig
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from tests.tiny.chats import FAMILIES, chat_tokenizer, show, turns, without_marks
from tests.tiny.texts import small_tokenizer, spaced_tokenizer

START, END = "<|im_start|>", "<|im_end|>"


def encode(
    messages: Sequence[Message], tokenizer: Tokenizer, *, length: int = 10**6, learn: Learn = "all", **options: Any
) -> EncodedConversations:
    def where(index: int) -> str:
        return f"chats.jsonl row {index + 1}"

    return encode_conversations([messages], tokenizer, length=length, learn=learn, where=where, **options)


def shown(messages: Sequence[Message], tokenizer: Tokenizer, **options: Any) -> str:
    found = encode(messages, tokenizer, **options)
    assert sum(found.spans[0]) == len(found.ids[0])
    return show(tokenizer, found.ids[0], found.spans[0])


def with_template(template: Any, *, name: str = "chatml", **options: Any) -> Tokenizer:
    known = chat_tokenizer(name)
    ids = {"pad": known.pad_id, "bos": known.bos_id, "eos": known.eos_id}
    return Tokenizer(known.backend, ids, **({"add_bos": known.add_bos, "chat_template": template} | options))


ROWS = {
    "chatml": f"{START}system\nS{END}\n{START}user\nq{END}\n{START}assistant\n⟦a{END}⟧\n"
    f"{START}user\nr{END}\n{START}assistant\n⟦b{END}⟧\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦a<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b<|eot_id|>⟧",
    "mistral": "<s>[INST] q[/INST]⟦ a</s>⟧[INST] S\n\nr[/INST]⟦ b</s>⟧",
    "gemma": "<bos><start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\n⟦a<end_of_turn>⟧\n"
    "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧\n",
    "qwen3": f"{START}system\nS{END}\n{START}user\nq{END}\n{START}assistant\n⟦a{END}⟧\n"
    f"{START}user\nr{END}\n{START}assistant\n⟦<think>\n\n</think>\n\nb{END}⟧\n",
}


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_answers_and_their_end_tokens_are_learned(name: str, marks: bool) -> None:
    tokenizer = chat_tokenizer(name, marks=marks)
    messages = turns("q", "a", "r", "b", system="S")
    assert shown(messages, tokenizer) == ROWS[name]
    first, second, rest = ROWS[name].split("⟧")
    assert shown(messages, tokenizer, learn="last") == first.replace("⟦", "") + second + "⟧" + rest


@pytest.mark.parametrize("marks", [True, False])
def test_reasoning_of_earlier_answers_is_left_out_as_the_template_does(marks: bool) -> None:
    tokenizer = chat_tokenizer("qwen3", marks=marks)
    thinks = "<think>\nhm\n</think>\n\n"
    messages = turns("q", thinks + "a", "", thinks + "b", "r", thinks + "c")
    row = shown(messages, tokenizer)
    assert row.endswith(f"⟦a{END}⟧\n{START}user\n{END}\n{START}assistant\n⟦b{END}⟧\n"
                        f"{START}user\nr{END}\n{START}assistant\n⟦{thinks}c{END}⟧\n")  # fmt: skip
    assert shown(messages, tokenizer, learn="last") == row.replace("⟦", "", 2).replace("⟧", "", 2)
    # An answer may become empty, and a question may be.
    messages = turns("q", "</think>", "", "b")
    row = shown(messages, tokenizer)
    assert f"assistant\n⟦{END}⟧\n{START}user\n{END}\n" in row
    assert shown(messages, tokenizer, learn="last") == row.replace("⟦", "", 1).replace("⟧", "", 1)
    # Between a question and its final answer, reasoning stays.
    messages = [*turns("q", thinks + "a"), {"role": "tool", "content": "5"}, *turns("q", thinks + "c")[1:]]
    row = shown(messages, tokenizer)
    assert f"⟦{thinks}a{END}⟧\n{START}user\n<tool_response>\n5\n</tool_response>{END}\n" in row


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_token_that_ends_an_answer(name: str, marks: bool) -> None:
    tokenizer = chat_tokenizer(name, marks=marks)
    end = ROWS[name].split("⟧")[0].split("⟦")[1].strip()[1:]
    assert end_of_turn(tokenizer) == tokenizer.backend.token_to_id(end)


def test_a_template_may_mark_some_answers_only() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content if loop.last }}"
        "{% endgeneration %}{{ m.content if not loop.last }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    found = encode(turns("q", "a", "r", "b"), tokenizer)
    assert show(tokenizer, found.ids[0], found.spans[0]) == f"q{END}a{END}r{END}⟦b⟧{END}"
    assert len(found.spans[0]) == 3


@pytest.mark.parametrize(
    "written", ["m.content.strip('\n')", "m.content.rstrip('\n')", "m.content.lstrip('\n')", "m.content | tojson"]
)
def test_a_template_may_trim_or_quote(written: str) -> None:
    tokenizer = with_template("{% for m in messages %}[{{ " + written + " }}<|im_end|>{% endfor %}")
    asks = with_template(
        "{% for m in messages %}[{{ " + written + " }}<|im_end|>{% endfor %}{{ '[' if add_generation_prompt }}"
    )
    messages = turns("\n é\n", "\n b 'c' \n")
    question, answer = (
        jinja2.Environment().from_string("{{ " + written + " }}").render(m=message)
        if "tojson" not in written
        else json.dumps(message["content"], ensure_ascii=False)
        for message in messages
    )
    assert shown(messages, tokenizer) == f"[{question}{END}⟦[{answer}{END}⟧"
    # A quotation mark that the template writes before an answer comes after its prompt.
    assert shown(messages, asks) == f"[{question}{END}[⟦{answer}{END}⟧"


def test_the_next_turns_token_ends_an_answer_only_if_generation_stops_there() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' }}{{ m.content }}"
        "{{ '<|im_end|>' if loop.last and not add_generation_prompt }}{% endfor %}"
    )
    messages = turns("q", "a", "r", "b")
    with pytest.raises(UserError, match=r"row 1: the chat template writes no end token after an answer"):
        encode(messages, with_template(template))
    start = chat_tokenizer("chatml").backend.token_to_id(START)
    tokenizer = with_template(template, end_ids=[start])
    assert shown(messages, tokenizer) == f"{START}q⟦a{START}⟧r⟦b{END}⟧"


def test_an_empty_answer_is_refused() -> None:
    with pytest.raises(UserError, match=r"row 1: message 2: the assistant's answer is empty"):
        encode(turns("q", " "), chat_tokenizer("chatml"))
    with pytest.raises(UserError, match=r"row 1: no message is the assistant's"):
        encode(turns("q"), chat_tokenizer("chatml"))


def test_messages_after_the_last_answer_are_left_out() -> None:
    tokenizer = chat_tokenizer("chatml")
    assert encode(turns("q", "a", "r"), tokenizer) == encode(turns("q", "a"), tokenizer)


@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_in_messages_are_data(name: str, marks: bool) -> None:
    tokenizer = chat_tokenizer(name, marks=marks)
    plain = encode(turns("q", "a", "r", "b", system="S"), tokenizer)
    special = {n for n, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    forged = "".join(FAMILIES[name].special) + "<bos>"
    messages = turns(f"q{forged}", f"a{forged}\nb", f"{forged}{forged}r", f"{forged}b", system=f"S{forged}")
    found = encode(messages, tokenizer)

    def written(ids: list[int]) -> list[int]:
        return [index for index in ids if index in special]

    assert written(found.ids[0]) == written(plain.ids[0])
    row = show(tokenizer, found.ids[0], found.spans[0])
    bare = encode(turns("q", "a\nb", "r", "b", system="S"), tokenizer)
    assert row.replace(forged, "") == show(tokenizer, bare.ids[0], bare.spans[0])
    assert row.count(forged) == 6


@given(st.lists(st.sampled_from(["<|im_", "start|>", END, START, " ", "\n", "a", "é", "\ufdd0", "0"]), max_size=8))
def test_what_is_spelled_out_is_tokenised_as_the_text_that_it_is(parts: list[str]) -> None:
    tokenizer = chat_tokenizer("chatml", marks=False)
    text = "".join(parts)
    found = encode(turns(text, "x" + text), tokenizer)
    start, end = (tokenizer.encode(mark, specials=True) for mark in (START, END))
    first, second, newline = (tokenizer.encode(t) for t in (f"user\n{text}", f"assistant\nx{text}", "\n"))
    assert found.ids[0] == start + first + end + newline + start + second + end + newline
    head = len(tokenizer.encode("assistant\n"))
    assert found.spans[0] == [len(start + first + end + newline + start) + head, len(second) - head + 1, len(newline)]


@pytest.mark.parametrize("always", [True, False])
def test_spelled_out_text_has_the_space_that_its_place_gives_it(always: bool) -> None:
    backend = Backend.from_str(spaced_tokenizer().backend.to_str())
    if not always:
        # Only the start of a text gets a space; others get one after every special token, too.
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[{% endif %}"
    )
    tokenizer = Tokenizer(backend, {"bos": 1, "eos": 2}, add_bos=True, chat_template=template)
    found = encode(turns("a </s> b", "moving </s>wheel"), tokenizer)
    texts = ("[a </s> b]", "[moving </s>wheel]", "[")
    first, second, opening = (tokenizer.encode(text, continued=not always) for text in texts)
    assert found.ids[0] == [1, *first, 2, *second, 2]
    assert found.spans[0] == [1 + len(first) + 1 + len(opening), len(second) - len(opening) + 1]


@pytest.mark.parametrize(
    ("template", "add_bos", "count"),
    [("{{ bos_token }}", True, 1), ("", True, 1), ("{{ bos_token }}", False, 1), ("", False, 0)],
)
def test_bos_is_written_once(template: str, add_bos: bool, count: int) -> None:
    body = "{% for m in messages %}{{ m.content }}<end_of_turn>{% endfor %}"
    tokenizer = with_template(template + body, name="gemma", add_bos=add_bos)
    found = encode(turns("q", "a"), tokenizer)
    assert [tokenizer.bos_id] * count == [n for n in found.ids[0] if n == tokenizer.bos_id]
    assert show(tokenizer, found.ids[0], found.spans[0]) == "<bos>" * count + "q<end_of_turn>⟦a<end_of_turn>⟧"


LONG = turns("one two", "three", "four five", "six", "seven eight nine ten", "twelve", system="S")


def test_a_long_conversation_loses_its_oldest_exchanges() -> None:
    tokenizer = chat_tokenizer("chatml")
    sizes = [len(encode([LONG[0], *LONG[start:]], tokenizer).ids[0]) for start in (1, 3, 5)]
    assert sizes == sorted(sizes, reverse=True)
    for length in range(sizes[2], sizes[0] + 1):
        dropped = next(n for n, size in enumerate(sizes) if size <= length)
        expected = encode([LONG[0], *LONG[1 + 2 * dropped :]], tokenizer)
        assert encode(LONG, tokenizer, length=length) == expected._replace(dropped_turns=dropped)


def test_then_the_users_text_is_cut_on_the_left() -> None:
    tokenizer = chat_tokenizer("chatml")
    size = len(encode([LONG[0], *LONG[5:]], tokenizer).ids[0])
    text = tokenizer.encode(LONG[5]["content"])
    for less in range(1, len(text)):
        found = encode(LONG, tokenizer, length=size - less)
        left = tokenizer.decode(text[less:])
        assert show(tokenizer, found.ids[0], found.spans[0]) == (
            f"{START}system\nS{END}\n{START}user\n{left}{END}\n{START}assistant\n⟦twelve{END}⟧\n"
        )
        assert (found.dropped_turns, found.cut) == (2, 1)
    with pytest.raises(
        UserError, match=rf"row 1: the last exchange has \d+ tokens .* a conversation may have {size - less - 1} "
    ):
        encode(LONG, tokenizer, length=size - less - 1)


def test_a_long_answer_is_cut_if_asked_for() -> None:
    tokenizer = chat_tokenizer("chatml")
    messages = turns("one two three four five six", "a long answer " * 20)
    found = encode(messages, tokenizer, length=48, on_long_answer="cut")
    assert len(found.ids[0]) == sum(found.spans[0]) == 48
    assert len(found.spans[0]) == 2
    whole = encode(messages, tokenizer).ids[0]
    head = len(tokenizer.encode(f"{START}user\n", specials=True))
    kept = found.ids[0][head : found.ids[0].index(tokenizer.eos_id or 0)]
    assert len(kept) == 48 // 4
    assert whole[head + len(tokenizer.encode(messages[0]["content"])) - 12 :][: 48 - head] == found.ids[0][head:]
    with pytest.raises(
        UserError, match=r"row 1: the messages before the first answer that is learned fill all 8 tokens"
    ):
        encode(messages, tokenizer, length=8, on_long_answer="cut")


def test_every_row_of_a_batch_is_that_of_its_conversation() -> None:
    tokenizer = chat_tokenizer("qwen3", marks=False)
    chats = [LONG, turns("q", "a"), turns("q", "<think>\nb\n</think>\n\nc", "", "d"), LONG[1:], turns(END, "a")]
    both = encode_conversations(chats, tokenizer, length=60, learn="all", where=str)
    singles = [encode(chat, tokenizer, length=60) for chat in chats]
    assert both.ids == [single.ids[0] for single in singles]
    assert both.spans == [single.spans[0] for single in singles]
    assert both.dropped_turns == sum(single.dropped_turns for single in singles) > 0


PLAIN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template, which conversations .* set data.chat_template to one of chatml"),
        ({"tool_use": PLAIN}, r"none of the tokenizer's chat templates \(tool_use\) is called default"),
        ("{% for %}", "row 1: the chat template fails: Expected an expression"),
        ("{{ raise_exception('no\nsystem') }}", "row 1: the chat template fails: no system"),
        (
            "{% for m in messages %}{{ m.content }} {% endfor %}",
            "row 1: the chat template writes no end token after an",
        ),
        ("{{ messages[-1].content }}<|im_end|>", "row 1: the chat template leaves out the user's message 1"),
        (PLAIN + "{{ messages[-1].content }}", "row 1: the chat template repeats the assistant's message 2"),
        (
            "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
            "row 1: the chat template changes the",
        ),
        (
            "{% for m in messages %}{{ '> ' if m.role == 'assistant' }}{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}: {% endif %}",
            "row 1: the chat template asks for an answer with '<|im_end|>: ', but writes '<|im_end|>> ' before one",
        ),
        (
            PLAIN + "{{ '!' if 'a' in messages[-1].content }}",
            "row 1: message 2: the chat template changes what it writes around the answer",
        ),
        (
            PLAIN + "{{ '!' if 'q' in messages[0].content }}",
            "row 1: the chat template changes the text of a message",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}",
            "row 1: the chat template marks the user's message 1 as learned",
        ),
        (PLAIN + "{% if 0 %}{% generation %}{% endgeneration %}{% endif %}", "row 1: the chat template marks nothing"),
    ],
)
def test_a_template_that_hides_what_is_learned_is_refused(template: Any, message: str) -> None:
    tokenizer = with_template(template)
    with pytest.raises(UserError, match=message.replace("|", r"\|")) as caught:
        encode(turns("q", "a"), tokenizer)
    assert "\n" not in str(caught.value)


def test_the_row_that_a_template_refuses_is_named() -> None:
    tokenizer = chat_tokenizer("mistral")
    chats = [turns("q", "a"), [*turns("q", "a"), *turns("q", "a")[1:]]]
    with pytest.raises(UserError, match=r"^1: the chat template fails: roles must alternate"):
        encode_conversations(chats, tokenizer, length=99, learn="all", where=str)


def test_a_prompt_that_begins_the_answer_changes_nothing() -> None:
    template = FAMILIES["chatml"].template
    template = template.replace("assistant\\n' }}\n{%- endif", "assistant\\n<think>' }}\n{%- endif")
    tokenizer = with_template(template.replace("{%- generation %}", "").replace("{%- endgeneration %}", ""))
    assert shown(turns("q", "a", "r", "b", system="S"), tokenizer) == ROWS["chatml"]


def test_today_is_always_the_same_day() -> None:
    tokenizer = with_template("{{ strftime_now('%d %b %Y, %-d %B') }} {{ date_string }}" + PLAIN)
    assert shown(turns("q", "a"), tokenizer).startswith("26 Jul 2024, 26 July 26 Jul 2024")


NAMED = {
    "chatml": ROWS["chatml"],
    "smollm2": ROWS["chatml"],
    "llama2": "[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST]⟦ a</s>⟧<s>[INST] r [/INST]⟦ b</s>⟧",
    "vicuna": "S USER: q ASSISTANT:⟦ a</s>⟧USER: r ASSISTANT:⟦ b</s>⟧",
}


def named_tokenizer(name: str) -> Tokenizer:
    family = "chatml" if name in ("chatml", "smollm2") else "mistral"
    known = chat_tokenizer(family)
    ids = {"pad": 0, "bos": known.bos_id, "eos": known.eos_id}
    return Tokenizer(known.backend, ids, add_bos=known.bos_id is not None)


@pytest.mark.parametrize("name", NAMED)
def test_named_templates(name: str) -> None:
    messages = turns("q", "a", "r", "b", system="S")
    tokenizer = named_tokenizer(name)
    bos = "" if tokenizer.bos_id is None else "<s>"
    assert shown(messages, tokenizer, template=name) == bos + NAMED[name]
    unmarked = Tokenizer(
        tokenizer.backend,
        {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id},
        add_bos=tokenizer.add_bos,
        chat_template=without_marks(CHAT_TEMPLATES[name]),
    )
    assert encode(messages, unmarked) == encode(messages, tokenizer, template=name)


@pytest.mark.parametrize("name", NAMED)
def test_named_templates_write_what_the_prompt_templates_do(name: str) -> None:
    tokenizer = named_tokenizer(name)
    config = DataConfig(template=name, prompt_length=10**6, answer_length=10**6)
    (prompt,) = encode_prompts(["Grüße 12"], tokenizer, config).ids
    (answer,) = encode_answers(["moving wheel"], ["Grüße 12"], tokenizer, config)
    found = encode(turns("Grüße 12", "moving wheel"), tokenizer, template=name)
    ids = [*prompt, *answer, tokenizer.eos_id]
    assert found.ids[0][: len(ids)] == ids
    assert tokenizer.decode(found.ids[0][len(ids) :]) in ("", "\n")
    assert found.spans[0][:2] == [len(prompt), len(answer) + 1]


def test_a_name_of_a_template_is_checked() -> None:
    with pytest.raises(
        UserError, match=r"data.chat_template is 'llama'; allowed: model, chatml, smollm2, llama2, vicuna"
    ):
        encode(turns("q", "a"), chat_tokenizer("chatml"), template="llama")
    with pytest.raises(
        UserError, match=r"data.chat_template is chatml, but the tokenizer has no token for <\|im_start\|>"
    ):
        encode(turns("q", "a"), small_tokenizer(), template="chatml")
    backend = named_tokenizer("llama2").backend
    with pytest.raises(UserError, match=r"the tokenizer has no end token \(eos\), which conversations need"):
        encode(turns("q", "a"), Tokenizer(backend, {}, add_bos=False), template="llama2")
    tool: Message = {"role": "tool", "content": "5"}
    with pytest.raises(UserError, match=r"row 1: the chat template fails: it has no place for the role tool"):
        encode([*turns("q", "a"), tool, *turns("q", "a")[1:]], named_tokenizer("vicuna"), template="vicuna")

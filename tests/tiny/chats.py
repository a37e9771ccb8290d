"""Chat templates of five families, with generation marks, and tokenizers that have their special tokens."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxcl.data.images.processor import ImageProcessor
from jaxcl.data.images.tokens import see
from jaxcl.data.messages import Message
from jaxcl.data.tokenizer import Tokenizer
from tests.tiny.texts import small_tokenizer

CHATML = r"""
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
LLAMA3 = r"""
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
# The system's message goes before the last one of the user.
MISTRAL = r"""
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' }}
        {%- if system is defined and loop.index0 + 2 >= rest | length %}
            {{- system + '\n\n' }}
        {%- endif %}
        {{- message['content'] + '[/INST]' }}
    {%- else %}
        {%- generation %}
        {{- ' ' + message['content'] | trim + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}"""
GEMMA = r"""
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set prefix = messages[0]['content'] + '\n\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set prefix = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}
    {%- if role == 'model' %}
        {%- generation %}
        {{- message['content'] | trim + '<end_of_turn>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<end_of_turn>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}"""
# Answers before the last question lose their reasoning; later ones always have some, perhaps empty.
QWEN3 = r"""
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set result = message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
    {%- if ns.searching and message.role == 'user' and not result %}
        {%- set ns.searching = false %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last and (loop.last or thoughts) %}
            {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""


class Family(NamedTuple):
    """A template, the tokens that it writes, and those of them that are not special."""

    template: str
    special: list[str]
    plain: list[str]
    bos: str | None
    eos: str


FAMILIES = {
    "chatml": Family(CHATML, ["<|im_start|>", "<|im_end|>"], [], None, "<|im_end|>"),
    "llama3": Family(
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        [],
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "mistral": Family(MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], [], "<s>", "</s>"),
    "gemma": Family(GEMMA, ["<start_of_turn>", "<end_of_turn>"], ["\n\n", "\n\n\n"], "<bos>", "<eos>"),
    "qwen3": Family(QWEN3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], None, "<|im_end|>"),
}


def without_marks(template: str) -> str:
    """A template that writes the same and does not say what is learned."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


@functools.cache
def chat_tokenizer(name: str, *, marks: bool = True) -> Tokenizer:
    """A small tokenizer of a family, with its template."""
    family = FAMILIES[name]
    backend = Backend.from_str(small_tokenizer().backend.to_str())
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.special])
    backend.add_tokens([AddedToken(text, normalized=False) for text in family.plain])
    ids = {"pad": 0, "eos": backend.token_to_id(family.eos)}
    if family.bos:
        ids["bos"] = backend.token_to_id(family.bos)
    template = family.template if marks else without_marks(family.template)
    tokenizer = Tokenizer(backend, ids, add_bos=family.bos is not None, chat_template=template)
    tokenizer.frame_texts(masked=False)
    return tokenizer


def turns(*texts: str, system: str | None = None) -> list[Message]:
    """A conversation of user and assistant in turn."""
    opening: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return opening + [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def show(tokenizer: Tokenizer, ids: list[int], spans: list[int]) -> str:
    """A row as text, with what is learned in braces."""
    shown, place = "", 0
    for number, count in enumerate(spans):
        text = tokenizer.decode(ids[place : place + count], skip_special=False)
        shown += f"⟦{text}⟧" if number % 2 else text
        place += count
    return shown


# Of models that see: contents are lists of parts.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def seeing_tokenizer(images: ImageProcessor) -> Tokenizer:
    """A small tokenizer with SmolVLM's template and the tokens of images."""
    backend = Backend.from_str(small_tokenizer().backend.to_str())
    special = ["<|im_start|>", "<end_of_utterance>", *images.specials()]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    ids = {"pad": 0, "bos": backend.token_to_id("<|im_start|>"), "eos": backend.token_to_id("<end_of_utterance>")}
    tokenizer = Tokenizer(backend, ids, add_bos=False, chat_template=SMOLVLM)
    tokenizer.frame_texts(masked=False)
    see(tokenizer, images, backend.token_to_id("<image>"))
    return tokenizer

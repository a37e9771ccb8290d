"""Chat templates: the tokenizer's own, or one of those written out here."""

from __future__ import annotations

import re

from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of the system's message and, after it, those of user and assistant in turn.
_TURNS = (
    "{{%- set given = messages[0]['role'] == 'system' -%}}"
    "{{%- set system = {system} if given else '' -%}}"
    "{{%- for message in (messages[1:] if given else messages) -%}}"
    "{{%- if message['role'] == 'user' -%}}{{{{ {user} }}}}"
    "{{%- elif message['role'] == 'assistant' -%}}{{{{ {before} }}}}"
    "{{%- generation -%}}{{{{ ' ' + message['content'] | trim + eos_token }}}}{{%- endgeneration -%}}"
    "{{%- else -%}}{{{{ raise_exception('it has no place for the role ' + message['role']) }}}}"
    "{{%- endif -%}}{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{ {before} }}}}{{%- endif -%}}"
)
#: Chat templates by name, for models that come without one. For a single question they write what the prompt templates
#: of the same names do.
CHAT_TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "smollm2": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n' }}{% endif %}" + _CHATML
    ),
    "llama2": _TURNS.format(
        system="'<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n'",
        user="bos_token | default('') + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]'",
        before="''",
    ),
    "vicuna": _TURNS.format(
        system="messages[0]['content'] + ' '",
        user="(system if loop.first else '') + 'USER: ' + message['content'] + ' '",
        before="'ASSISTANT:'",
    ),
}
_TOKENS = re.compile(r"<\|\w+\|>")


def find_template(name: str, tokenizer: Tokenizer) -> str:
    """A chat template.

    Args:
      name: `model` for the tokenizer's own (of several, the one called `default`), or a name of `CHAT_TEMPLATES`.
      tokenizer: the model's tokenizer.

    Raises:
      UserError: there is no such template, or the tokenizer lacks a token that a template of `CHAT_TEMPLATES` writes.
    """
    named = ", ".join(CHAT_TEMPLATES)
    if name in CHAT_TEMPLATES:
        if tokenizer.eos_id is None:
            raise UserError("the tokenizer has no end token (eos), which conversations need")
        missing = [
            mark for mark in _TOKENS.findall(CHAT_TEMPLATES[name]) if tokenizer.backend.token_to_id(mark) is None
        ]
        if missing:
            raise UserError(
                f"data.chat_template is {name}, but the tokenizer has no token for {missing[0]} and would spell it "
                "out; allowed are llama2, vicuna or a tokenizer that has it"
            )
        return CHAT_TEMPLATES[name]
    if name != "model":
        raise UserError(f"data.chat_template is {name!r}; allowed: model, {named}")
    template = tokenizer.chat_template
    if template is None:
        raise UserError(
            "the tokenizer has no chat template, which conversations are rendered by; set data.chat_template to one of "
            f"{named}"
        )
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise UserError(
            f"none of the tokenizer's chat templates ({', '.join(template)}) is called default; set data.chat_template "
            f"to one of {named}"
        )
    return template["default"]

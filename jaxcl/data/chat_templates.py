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
#: Chat templates by name, for models that come without one. For a single question they write what the prompt templates
#: of the same names do.
CHAT_TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "smollm2": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
        "trained by Hugging Face<|im_end|>\n' }}{% endif %}" + _CHATML
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
        missing = [
            mark for mark in _TOKENS.findall(CHAT_TEMPLATES[name]) if tokenizer.backend.token_to_id(mark) is None
        ]
        if missing:
            raise UserError(
                f"data.chat_template is {name}, but the tokenizer has no token for {missing[0]} and would spell it out"
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

"""Chat templates of models."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcl.data.template_worker import TemplateError, render
from jaxcl.data.tokenizer_settings import ChatTemplate
from jaxcl.errors import UserError


def as_chat(template: ChatTemplate, prompt: str, special_tokens: Mapping[str, str] | None = None) -> str:
    """The text that a chat model continues with its answer, as `apply_chat_template` of transformers renders it.

    Args:
      template: a Jinja chat template, as in Hugging Face tokenizers, or several by name; `default` is taken.
      prompt: the user's message.
      special_tokens: texts of special tokens by transformers' names (`bos_token`, ...), which some templates write.

    Returns:
      The conversation up to the answer.

    Raises:
      UserError: the template cannot be rendered.

    >>> as_chat("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>", "Hello")
    '<user>Hello<assistant>'
    """
    if not isinstance(template, str):
        if "default" not in template:
            raise UserError(
                f"none of the model's chat templates ({', '.join(template)}) is called default; use --raw to do without"
            )
        template = template["default"]
    conversation = [{"role": "user", "content": prompt}]
    try:
        ((text, _),) = render(template, [conversation], special_tokens or {}, ask=True)
    except TemplateError as error:
        raise UserError(f"the model's chat template cannot be used: {error}; use --raw to do without it") from None
    return text

"""Chat templates of models."""

from __future__ import annotations

from collections.abc import Mapping

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
    from transformers.utils.chat_template_utils import render_jinja_template

    if not isinstance(template, str):
        if "default" not in template:
            raise UserError(
                f"none of the model's chat templates ({', '.join(template)}) is called default; use --raw to do without"
            )
        template = template["default"]
    conversation = [{"role": "user", "content": prompt}]
    try:
        rendered, _ = render_jinja_template(
            [conversation], chat_template=template, add_generation_prompt=True, **(special_tokens or {})
        )
    except Exception as error:  # a template runs any expression, which can fail in any way
        message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"the model's chat template cannot be used: {message}; use --raw to do without it") from None
    return rendered[0]

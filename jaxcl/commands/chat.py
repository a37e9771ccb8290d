"""Chat templates of models."""

from __future__ import annotations

from typing import Any, NoReturn

from jaxcl.errors import UserError


def as_chat(template: str, prompt: str, *, bos: str = "", eos: str = "") -> str:
    """The text that a chat model continues with its answer.

    Args:
      template: a Jinja chat template, as in Hugging Face tokenizers.
      prompt: the user's message.
      bos: text of the bos token, which some templates write.
      eos: text of the end token.

    Returns:
      The conversation up to the answer.

    Raises:
      UserError: the template cannot be rendered.

    >>> as_chat("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>", "Hello")
    '<user>Hello<assistant>'
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    # Templates come with downloaded models, so they run in a sandbox.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except TemplateError as error:
        raise UserError(f"the model's chat template cannot be used: {error}; use --raw to do without it") from None

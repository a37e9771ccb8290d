"""What the files beside a `tokenizer.json` say: special tokens, chat templates, and the tokens that end a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from jaxcl.data.files import parse_json, read_text, write_json
from jaxcl.errors import UserError

#: One chat template (Jinja), or several by name, of which `default` frames a plain conversation.
ChatTemplate = str | dict[str, str]

GENERATION_FILE = "generation_config.json"
# What transformers calls the files of chat templates; they win over `chat_template` in tokenizer_config.json.
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"


class TokenizerSettings(NamedTuple):
    """Settings of a tokenizer.

    Attributes:
      content: the keys of its settings files.
      special_tokens: texts of special tokens by transformers' names (`bos_token`, ...).
      chat_template: its chat templates, if it has any.
      end_ids: ids that end a text by the model's configuration, in the order found.
    """

    content: dict[str, Any]
    special_tokens: dict[str, str]
    chat_template: ChatTemplate | None
    end_ids: tuple[int, ...]


def read_settings(folder: Path) -> TokenizerSettings:
    """Reads the settings beside a `tokenizer.json`.

    Args:
      folder: where it is.

    Raises:
      UserError: a file cannot be read, is not JSON, or names an end token by something other than ids.
    """
    content: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content |= _object(folder / name)
    texts = {key: _text_of(value) for key, value in content.items() if key.endswith("_token")}
    for key, text in texts.items():
        if text is not None and any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"{folder}: {key} holds half of a surrogate pair; expected text")
    special_tokens = {key: text for key, text in texts.items() if text is not None}
    ends = (_end_ids(folder / name) for name in (GENERATION_FILE, "config.json"))
    return TokenizerSettings(
        content, special_tokens, _chat_template(folder, content), tuple(i for ids in ends for i in ids)
    )


def write_end_ids(folder: Path, end_ids: tuple[int, ...], others: dict[str, int | None]) -> None:
    """Adds the tokens that end a text to `generation_config.json`, so that `transformers` stops there, too.

    Args:
      folder: where the file is or will be; what it says already is kept.
      end_ids: the tokens.
      others: further ids by transformers' names; `None` is left out.
    """
    file = folder / GENERATION_FILE
    ids = list(dict.fromkeys([*_end_ids(file), *end_ids]))
    if ids:
        known = {name: value for name, value in others.items() if value is not None}
        write_json(file, known | _object(file) | {"eos_token_id": ids})


def _object(path: Path) -> dict[str, Any]:
    content = parse_json(read_text(path), path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _end_ids(path: Path) -> list[int]:
    value = _object(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise UserError(f"{path}: eos_token_id is {value!r}; allowed are a token id or a list of them")
    return ids


def _chat_template(folder: Path, content: dict[str, Any]) -> ChatTemplate | None:
    files = {"default": folder / TEMPLATE_FILE}
    files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
    found: Any = {name: read_text(path) for name, path in files.items() if path.is_file()}
    if not found:
        found = content.get("chat_template")
    if isinstance(found, list):
        try:
            found = {entry["name"]: entry["template"] for entry in found}
        except (KeyError, TypeError):
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: chat_template: each entry needs a name and a template"
            ) from None
    if isinstance(found, dict) and not all(isinstance(template, str) for template in found.values()):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template: expected templates, which are texts")
    if isinstance(found, dict) and list(found) == ["default"]:
        return found["default"]
    return found if isinstance(found, str | dict) else None

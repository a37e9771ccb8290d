"""Chat templates as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from jaxcl.commands.chat import as_chat
from jaxcl.data.tokenizer import Tokenizer
from jaxcl.errors import UserError
from tests.tiny.texts import small_tokenizer

SAYS = "Grüße <b>'x'"
TURNS = "{% for m in messages %}{{ m.content }}{% endfor %}[assistant]"
BASE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
TOOL = {"name": "tool_use", "template": "TOOL"}
TEMPLATES: dict[str, Any] = {
    "plain": BASE,
    "other special tokens": "{{ eos_token }}{{ cls_token }}{{ unk_token }}" + TURNS,
    "loop controls": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}[assistant]",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y') }} " + TURNS,
    "tojson": "{% for m in messages %}{{ m | tojson }}{% endfor %}[assistant]",
    "tools": "{% if tools is not none %}TOOLS{% endif %}" + TURNS,
    "named": [{"name": "default", "template": BASE}, TOOL],
}


def write(folder: Path, template: Any) -> None:
    small_tokenizer().save(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template, "unk_token": "<pad>"}))


def theirs(folder: Path) -> str:
    conversation = [{"role": "user", "content": SAYS}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def ours(folder: Path) -> str:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_template is not None
    return as_chat(tokenizer.chat_template, SAYS, tokenizer.special_tokens)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_gives_what_transformers_makes_of_it(template: Any, tmp_path: Path) -> None:
    write(tmp_path / "a", template)
    assert ours(tmp_path / "a") == theirs(tmp_path / "a")
    # It survives being written anew.
    Tokenizer.load(tmp_path / "a").save(tmp_path / "b")
    assert ours(tmp_path / "b") == theirs(tmp_path / "b") == theirs(tmp_path / "a")


def test_files_win_over_the_setting(tmp_path: Path) -> None:
    write(tmp_path, "OLD " + TURNS)
    (tmp_path / "chat_template.jinja").write_text("NEW " + TURNS)
    assert ours(tmp_path) == theirs(tmp_path) == f"NEW {SAYS}[assistant]"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOL")
    assert ours(tmp_path) == theirs(tmp_path)
    assert Tokenizer.load(tmp_path).chat_template == {"default": "NEW " + TURNS, "tool_use": "TOOL"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('only\nfor\nsystems') }}", "only for systems"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ 1 // 0 }}", "modulo by zero"),
        ("{{ messages.append(1) }}", "is unsafe; use"),
        ({"tool_use": "TOOL"}, r"none of the model's chat templates \(tool_use\) is called default"),
    ],
)
def test_an_error_of_a_template_is_one_line(template: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        as_chat(template, "hello")
    assert "\n" not in str(caught.value)
    assert "use --raw" in str(caught.value)


def test_a_list_of_something_else_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [BASE])
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template: each entry needs a name"):
        Tokenizer.load(tmp_path)

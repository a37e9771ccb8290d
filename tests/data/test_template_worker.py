"""Hostile templates end with one line, and what the worker renders is what transformers renders here."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest

from jaxcl.data import template_worker
from jaxcl.data.chat_templates import CHAT_TEMPLATES
from jaxcl.data.template_worker import TemplateError, render

CHAT: list[Any] = [{"role": "user", "content": "q \ud800 é"}, {"role": "assistant", "content": "a"}]
EACH = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HANGS = "{% if messages[0].content == 'hang' %}" + LOOPS + "{% endif %}"


def test_a_worker_renders_what_would_be_rendered_here() -> None:
    many = [[{"role": "user", "content": f"{number} " + "x" * (number % 7)}, CHAT[1]] for number in range(600)]
    many[300] = CHAT
    options: dict[str, Any] = {"ask": True, "learned": True}
    found = render(EACH + "{{ bos_token }}", many, {"bos_token": "<s>"}, **options)
    assert found == render(EACH + "{{ bos_token }}", many, {"bos_token": "<s>"}, trusted=True, **options)
    assert found[300] == ("q \ud800 éa<s>", [(0, 5), (5, 6)])
    assert not any(spans for _, spans in render(EACH, many, {}))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * (10**9 * 4) }}", "it needs more than 1,024 MiB of memory"),
        ("{{ 'a' | center(4000000000) }}", "it needs more than 1,024 MiB of memory"),
        ("{{ 'a' * 5000000 }}", "it writes 5,000,000 characters; allowed here are 4,194,"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{% include 'x' %}", "no loader for this environment"),
        ("{{ '{:99999999999}'.format(1) }}", "memory|Too many decimal digits|ValueError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(1000000) | list }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('no\n' * 10**6) }}", "no no"),
    ],
)
def test_what_a_template_may_not_do_is_one_short_line(template: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message) as caught:
        render(template, [CHAT], {})
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
    assert render("{{ messages[0].role }}", [CHAT], {}) == [("user", [])]


def test_a_template_without_end_is_ended_and_its_conversation_named() -> None:
    said = [[{"role": "user", "content": word}] for word in ("fine", "good", "hang", "well")]
    template_worker.close()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(TemplateError, match="it takes more than 2 seconds") as caught:
        render(HANGS, said, {})
    assert caught.value.index == 2
    # Processor time of the worker, start included: far below what it has between requests.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 30
    assert len(render(HANGS, said[:2], {})) == 2


def test_one_worker_serves_until_it_dies_or_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    render(EACH, [CHAT], {})
    first = template_worker._worker()
    render(EACH, [CHAT], {})
    assert template_worker._worker() is first

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(template_worker, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(EACH, [CHAT], {})
    assert not first.usable
    assert render("{{ messages | length }}", [CHAT], {}) == [("2", [])]
    assert template_worker._worker() is not first


def test_templates_of_jaxcl_itself_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from jaxcl.data.chat_rendering import Renderer, without_marks
    from tests.tiny.chats import chat_tokenizer

    def refuse() -> None:
        raise AssertionError("a worker was asked for")

    monkeypatch.setattr(template_worker, "_worker", refuse)
    tokenizer = chat_tokenizer("chatml")
    for template in (CHAT_TEMPLATES["chatml"], without_marks(CHAT_TEMPLATES["chatml"])):
        (found,) = Renderer(tokenizer, template).render([[{"role": "user", "content": "q"}, CHAT[1]]], ["row 1"])
        assert found.text.endswith("assistant\na<|im_end|>\n")
    with pytest.raises(AssertionError, match="asked for"):
        Renderer(tokenizer, CHAT_TEMPLATES["chatml"] + " ").render([[{"role": "user", "content": "q"}, CHAT[1]]], ["1"])


def test_another_process_starts_its_own() -> None:
    render(EACH, [CHAT], {})
    worker = template_worker._worker()
    worker.owner = os.getpid() + 1
    assert not worker.usable
    worker.owner = os.getpid()

"""What would have no effect, or another than it says, is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxcl.config import parse_config
from jaxcl.config.experiment import merged
from jaxcl.errors import UserError
from jaxcl.flower.join import join
from jaxcl.flower.serve import serve
from jaxcl.run import sequence
from jaxcl.weights import save_hf
from tests.tiny.networks import random_params, tiny_llama
from tests.tiny.runs import PAIRS, TEXT

FIRST, *OTHERS = PAIRS["tasks"]
END = TEXT["tasks"][0]["end_task"]


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (
            PAIRS, {"model": {"soft_tokens": 4}, "method": "sequential"},
            r"^model.soft_tokens: 4 vectors, which sequential does not read; allowed is 0$",
        ),
        (
            PAIRS, {"tasks": [{**FIRST, "end_task": END}, *OTHERS], "method": "sequential"},
            r"^task direction: an end_task measures a text domain; the task's rows are pairs$",
        ),
        (
            TEXT, {"evaluation": {"end_task": {"length": 4096}}, "method": "sequential"},
            r"^evaluation.end_task.length: 4096 tokens exceed the model's window, model.max_length=\d+$",
        ),
        (
            PAIRS, {"method": {"name": "replay", "replay": {"budget": 1}}},
            r"^method.replay.budget: 1 rows are too few for one of each of 2 tasks$",
        ),
        (
            TEXT, {"optimizer": {"average": "sfa"}, "method": "sequential"},
            r"^task topics: optimizer.average_every: 25 steps are more than the task's 3$",
        ),
        (
            TEXT, {"optimizer": {"warmup": 4}, "method": "sequential"},
            r"^task topics: optimizer: warmup 4 steps do not fit into 3 steps$",
        ),
    ],
)  # fmt: skip
def test_settings_without_their_effect_are_refused_before_training(
    content: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence, "train_task", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match=message) as caught:
        sequence.run(parse_config({**merged(content, changes), "output": str(tmp_path / "run")}))
    assert caught.value.exit_code == 2


def test_what_a_model_section_does_not_say_is_what_the_weights_say(tmp_path: Path) -> None:
    """Also if it names the architecture: the base of rotary positions shows in no shape."""
    network = tiny_llama(rope_theta=5e5, norm_eps=1e-3)
    save_hf(tmp_path, network, random_params(network))
    sizes = ("architecture", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
    section = {name: getattr(network.config, name) for name in sizes}
    common = {"weights": str(tmp_path), "tasks": PAIRS["tasks"], "method": "sequential", "output": "x"}
    for model in (section, {}, {"norm_eps": 1e-4}, {**section, "norm_eps": 1e-4}):
        found = parse_config({**common, "model": model}).model
        assert found == network.config.model_copy(update={"norm_eps": 1e-4} if "norm_eps" in model else {})
    other = {**section, "architecture": "roberta"}
    assert parse_config({**common, "model": other}).model.architecture == "roberta"  # refused when weights are loaded
    gone = parse_config({**common, "weights": str(tmp_path / "gone"), "model": section}).model
    assert (gone.rope_theta, gone.norm_eps) == (1e4, 1e-5)  # the schema's; the weights are missed when they are loaded


def test_a_certificate_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    config = parse_config({**PAIRS, "method": "sequential", "output": str(tmp_path)})
    some = tmp_path / "some.pem"
    more: dict[str, Any] = {"address": "127.0.0.1:0", "timeout": 1.0, "patience": 1.0}
    for certificate, key in ((some, None), (None, some), (some, some)):
        with pytest.raises(
            UserError, match="serve: --insecure is without TLS; allowed without --certificate and --key"
        ):
            serve(config, certificate=certificate, key=key, insecure=True, **more)
    with pytest.raises(UserError, match="join: --insecure is without TLS; allowed without --certificate"):
        join(config, 0, "127.0.0.1:0", certificate=some, insecure=True, port=0)

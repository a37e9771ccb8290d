"""Fine-tuning on an end task follows the same steps in torch; published files are scored as their authors would."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jaxcl.evaluation import end_tasks
from jaxcl.evaluation.config import EndTaskConfig
from jaxcl.evaluation.metrics import METRICS
from jaxcl.evaluation.scoring import score_pairs
from jaxcl.models.batch import Batch
from jaxcl.models.network import Network
from jaxcl.models.roberta import RobertaConfig
from jaxcl.weights import save_hf

pytestmark = pytest.mark.optimised  # as jaxcl computes for its users

SHARED = Path(os.environ.get("JAXCL_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
LABELS, ROWS, LENGTH, STEPS = 3, 5, 9, 6
CONFIG = EndTaskConfig(epochs=1, batch_size=ROWS, learning_rate=1e-2, warmup=0.4, weight_decay=0.3, clip=0.2)
NETWORK = Network.create(
    RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        max_length=LENGTH,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_std=0.2,
    )
)


def rows(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    lengths = rng.integers(3, LENGTH + 1, ROWS)
    segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    return {
        "tokens": np.where(segments, rng.integers(4, 40, (ROWS, LENGTH)), 1).astype(np.int32),
        "segments": segments,
        "positions": (np.arange(LENGTH) * segments).astype(np.int32),
        "predict": np.zeros((ROWS, 1), np.int32),
        "targets": np.zeros((ROWS, 1), np.int32),
        "weights": np.ones((ROWS, 1), np.float32),
        "task": np.zeros(ROWS, np.int32),
        "example": np.arange(ROWS, dtype=np.int32),
        "labels": rng.integers(0, LABELS, ROWS).astype(np.int32),
    }


def torch_logits(model: Any, fields: dict[str, np.ndarray]) -> torch.Tensor:
    mask = torch.tensor(fields["segments"], dtype=torch.long)
    return model(input_ids=torch.tensor(fields["tokens"], dtype=torch.long), attention_mask=mask).logits


def test_fine_tuning_takes_the_steps_of_torch(tmp_path: Path) -> None:
    """Clipping, AdamW without decay of biases and norms, warm-up and decay: the same logits after every step."""
    classifier = end_tasks.with_labels(NETWORK, LABELS)
    programs = end_tasks._programs(classifier, CONFIG, jax.jit)
    pretrained = jax.jit(NETWORK.init)(jax.random.key(0))
    state = programs.start(pretrained, jax.random.key(1), jnp.int32(STEPS))

    # transformers has no model with both heads: the masked-LM head stays at home, its gradient is zero anyway.
    save_hf(tmp_path / "model", classifier, state.params)
    model = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight") and "LayerNorm" not in n]
    free = [p for n, p in model.named_parameters() if not (n.endswith("weight") and "LayerNorm" not in n)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": free, "weight_decay": 0.0}])

    for step in range(STEPS):
        fields = rows(step)
        state = programs.train(state, Batch(**fields), jax.random.key(2))
        # Peak 1e-2 after round(0.4 * 6) = 2 steps, by thirds; then to 0 in four steps.
        rate = [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4][step] * 1e-2
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = torch.nn.functional.cross_entropy(torch_logits(model, fields), torch.tensor(fields["labels"]).long())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        assert norm > 0.2  # the clipping is at work
        optimizer.step()

        batch = Batch(**rows(100 + step))
        states = classifier.hidden(state.params, batch).states
        ours = np.asarray(classifier.classify(state.params, states, batch))
        with torch.no_grad():
            theirs = torch_logits(model, rows(100 + step)).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no benchmark files: {SHARED} is absent (set JAXCL_DATA)")
@pytest.mark.parametrize("task", ["task363", "task1510", "task181", "task073", "task748", "task002"])
def test_answers_of_a_benchmark_score_full_and_others_do_not(task: str) -> None:
    pairs = json.loads((SHARED / "superni" / task / "test.json").read_text(encoding="utf-8"))
    answers = itertools.cycle([row["answer"] for row in pairs])
    known = {row["prompt"]: row["answer"] for row in pairs}
    for metric in ("accuracy", "exact_match", "rouge_l", "fuzzy", "macro_f1"):
        right = score_pairs(pairs, lambda prompts: [f" {known[prompt]}\n" for prompt in prompts], metric, batch_size=32)
        # Two rows may share a prompt and differ in the answer.
        assert right.score >= 100 * len(known) / len(pairs) - 1e-9
        next(answers)
        wrong = score_pairs(pairs, lambda prompts: [next(answers) for _ in prompts], metric, batch_size=32)
        assert wrong.score < 80
        assert 0 <= METRICS[metric]([""] * len(pairs), [row["answer"] for row in pairs]) < 1

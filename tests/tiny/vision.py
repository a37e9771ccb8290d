"""Tiny models that see, as the `config.json` of transformers, and images for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxcl.data.images.decode import encode_png
from tests.tiny.families import SIZES

IMAGE_TOKEN = 5
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
_WHOLE = {"scale_factor": 2, "image_token_id": IMAGE_TOKEN}
_TEXT = SIZES | {"model_type": "llama"}

SEEING: dict[str, dict[str, Any]] = {
    "smolvlm": {
        "model_type": "smolvlm",
        "text_config": _TEXT,
        "vision_config": _TOWER | {"model_type": "smolvlm_vision"},
        **_WHOLE,
    },
    # Sides that are not a power of 2, whose reciprocals are rounded, and pixels beyond the last whole patch.
    "idefics3": {
        "model_type": "idefics3",
        "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "head_dim": 16},
        "vision_config": _TOWER | {"model_type": "idefics3_vision", "image_size": 45, "layer_norm_eps": 1e-3},
        **_WHOLE,
        "scale_factor": 3,
        "tie_word_embeddings": True,
    },
    "smolvlm-old-style": {
        "model_type": "smolvlm",
        "text_config": _TEXT
        | {"rope_theta": 3e4, "rms_norm_eps": 1e-3, "tie_word_embeddings": False, "hidden_act": "gelu"},
        "vision_config": _TOWER | {"hidden_act": "relu", "max_image_size": {"longest_edge": 28}},
        **_WHOLE,
        "tie_word_embeddings": False,
    },
}
"""Keys of `config.json` by name."""


def content(name: str) -> dict[str, Any]:
    """The `config.json` of a tiny model."""
    return SEEING[name]


VISION: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_layers": 1,
    "num_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "image_token_id": 6,  # the first one after those of a trained tokenizer
}
"""A tower with 4 image tokens for an image."""

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def png(colour: tuple[int, int, int], height: int = 8, width: int = 8) -> bytes:
    """A file of one colour."""
    return encode_png(np.full((height, width, 3), colour, np.uint8), "a test")


def write_colours(folder: Path, name: str, count: int, question: str = "Which colour?") -> str:
    """Rows about images of one colour, in files of their own; returns the source."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        (folder / f"{name}{number}.png").write_bytes(png(COLOURS[colour]))
        rows.append({"prompt": f"{question} {number}", "answer": colour, "image": f"{name}{number}.png"})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{folder / name}.jsonl"

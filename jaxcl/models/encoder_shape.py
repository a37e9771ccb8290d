"""What the configurations of all encoders say of themselves in the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING


class EncoderShape:
    """Properties that follow from an encoder's fields; a mixin of configurations."""

    if TYPE_CHECKING:  # fields of the configuration
        hidden_size: int
        num_heads: int
        num_layers: int
        hidden_dropout: float
        attention_dropout: float

    @property
    def dropout_rates(self) -> tuple[float, float]:
        """Dropout rates on hidden states and on attention probabilities."""
        return self.hidden_dropout, self.attention_dropout

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def causal(self) -> bool:
        """Whether a position sees only earlier ones."""
        return False

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads per layer: one for each head."""
        return self.num_heads


class UnwindowedShape(EncoderShape):
    """Those of an encoder whose layers all attend to the whole row."""

    @property
    def window(self) -> int:
        """No layer has a window."""
        return 0

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Which layers attend to a window only."""
        return (False,) * self.num_layers

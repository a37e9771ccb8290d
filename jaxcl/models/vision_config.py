"""The configuration of a vision tower and of the connector between it and a decoder."""

from __future__ import annotations

from pydantic import BaseModel, Field, model_validator

from jaxcl.models.activation import Activation
from jaxcl.schema import Schema

Channels = tuple[float, float, float]


class VisionConfig(Schema):
    """Shape of a SigLIP tower and of a connector with pixel shuffle, as SmolVLM and Idefics3 have them."""

    hidden_size: int = Field(gt=0, description="width of the tower's residual stream")
    intermediate_size: int = Field(gt=0, description="feed-forward intermediate units per layer of the tower")
    num_layers: int = Field(gt=0, description="number of layers of the tower")
    num_heads: int = Field(gt=0, description="attention heads per layer of the tower")
    image_size: int = Field(
        gt=0,
        description="height and width of an image or tile, in pixels; what is left beyond whole patches is not seen",
    )
    patch_size: int = Field(gt=0, description="height and width of a patch, in pixels")
    shuffle: int = Field(1, gt=0, description="patches along each side that become one image token (scale_factor)")
    image_token_id: int = Field(ge=0, description="id of the image token")
    layer_norm_eps: float = Field(1e-6, gt=0, description="epsilon of the tower's LayerNorm")
    activation: Activation = Field("gelu_tanh", description="activation of the tower's feed-forward units")
    init_std: float = Field(0.02, gt=0, description="standard deviation of the tower's initial weights")
    image_mean: Channels = Field((0.5, 0.5, 0.5), description="what is subtracted from pixels in [0, 1], by channel")
    image_std: Channels = Field((0.5, 0.5, 0.5), description="what they are then divided by, by channel")

    @model_validator(mode="after")
    def _check(self) -> VisionConfig:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of num_heads ({self.num_heads})")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size ({self.patch_size}) must be at most image_size ({self.image_size})")
        if self.side % self.shuffle:
            raise ValueError(
                f"shuffle ({self.shuffle}) must divide the patches along a side, image_size / patch_size ({self.side})"
            )
        return self

    @property
    def side(self) -> int:
        """Whole patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Image tokens of an image."""
        return (self.side // self.shuffle) ** 2

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads


def vision_of(config: BaseModel) -> VisionConfig | None:
    """The tower of a model's configuration; `None` if the model does not see, as no encoder does."""
    return getattr(config, "vision", None)

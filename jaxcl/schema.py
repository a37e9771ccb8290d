"""Base class of every configuration section."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """A frozen, typed configuration section that refuses unknown keys.

    Every field carries a `Field(description=...)`: the configuration reference in `docs/` is generated from it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True)

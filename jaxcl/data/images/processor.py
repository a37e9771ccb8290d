"""Images to tiles of one size, and the text that they become, as SmolVLM and Idefics3 have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxcl.errors import UserError

IMAGE, AROUND, GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
#: Resampling filter of Pillow: Lanczos.
LANCZOS = 1
#: Longest side that an image is enlarged to, and what a file may ask for.
_LARGEST, _MOST = 4096, 2**20


class Tiles(NamedTuple):
    """An image as the model sees it.

    Attributes:
      pixels: the tiles row by row, and then the whole image; or the whole image alone.
      rows: rows of tiles; 0 for an image that is not split.
      columns: columns of tiles, likewise.
    """

    pixels: UInt8[np.ndarray, "tiles tile tile 3"]
    rows: int
    columns: int


class ImageProcessor(NamedTuple):
    """How images become tiles.

    Attributes:
      tile: height and width of a tile, in pixels.
      longest_edge: what the longer side of an image is resized to before it is split.
      split: whether images larger than a tile are split.
      image_tokens: tokens of a tile.
      resample: Pillow's number of the resampling filter.
    """

    tile: int
    longest_edge: int
    split: bool
    image_tokens: int
    resample: int = LANCZOS

    @classmethod
    def read(cls, content: Any, tile: int, image_tokens: int, where: str) -> ImageProcessor:
        """The processor of a `preprocessor_config.json`.

        Args:
          content: the parsed file; what it leaves out has the defaults of transformers.
          tile: the size of images that the model is made for.
          image_tokens: tokens of an image.
          where: the file, for messages.

        Raises:
          UserError: a value is not supported, or the file is for a model of another image size.
        """
        if not isinstance(content, Mapping):
            raise UserError(f"{where}: expected an object, got {type(content).__name__}")
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if content.get(key, True) is not True:
                raise UserError(f"{where}: {key}={content[key]} is not supported; allowed is true")
        sizes = {"size": 4 * 364, "max_image_size": 364}
        for key, default in sizes.items():
            given = content.get(key, {"longest_edge": default})
            edge = given.get("longest_edge") if isinstance(given, Mapping) else None
            if type(edge) is not int or not 1 <= edge < _MOST:
                raise UserError(f"{where}: {key}={given} is not supported; expected a number of pixels as longest_edge")
            sizes[key] = edge
        if sizes["max_image_size"] != tile:
            raise UserError(
                f"{where}: max_image_size is {sizes['max_image_size']}, but the model's image_size {tile}; allowed is "
                "the same"
            )
        resample, split = content.get("resample", LANCZOS), content.get("do_image_splitting", True)
        if type(resample) is not int or not 0 <= resample <= 5:
            raise UserError(f"{where}: resample={resample} is not supported; allowed are 0 to 5")
        return cls(tile, sizes["size"], bool(split), image_tokens, resample)

    def content(self) -> dict[str, Any]:
        """The keys of a `preprocessor_config.json`, as `read` and transformers read it."""
        return {
            "image_processor_type": "SmolVLMImageProcessor",
            "processor_class": "SmolVLMProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_image_splitting": self.split,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_pad": True,
            "size": {"longest_edge": self.longest_edge},
            "max_image_size": {"longest_edge": self.tile},
            "resample": self.resample,
        }

    def tiles(self, image: UInt8[np.ndarray, "height width 3"]) -> Tiles:
        """The tiles of an image. Each step rounds to whole numbers, as in transformers."""
        tile = self.tile
        image = self._resized(image, _longest_edge(image.shape[0], image.shape[1], self.longest_edge))
        if not self.split:  # to the square of the tower, whatever its shape
            return Tiles(self._resized(image, (tile, tile))[None], 0, 0)
        image = self._resized(image, _multiples(image.shape[0], image.shape[1], tile))
        rows, columns = image.shape[0] // tile, image.shape[1] // tile
        if rows == columns == 1:
            return Tiles(image[None], 0, 0)
        parts = image.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2).reshape(-1, tile, tile, 3)
        return Tiles(np.concatenate([parts, self._resized(image, (tile, tile))[None]]), rows, columns)

    def text(self, rows: int, columns: int) -> str:
        r"""The text that an image becomes.

        >>> processor = ImageProcessor(tile=4, longest_edge=8, split=True, image_tokens=2)
        >>> processor.text(0, 0)
        '<fake_token_around_image><global-img><image><image><fake_token_around_image>'
        >>> processor.text(1, 1)[:54]
        '<fake_token_around_image><row_1_col_1><image><image>\n\n'
        """
        whole = f"{AROUND}{GLOBAL}{IMAGE * self.image_tokens}{AROUND}"
        if not rows:
            return whole
        lines = (
            "".join(f"{AROUND}{place(row, column)}{IMAGE * self.image_tokens}" for column in range(columns))
            for row in range(rows)
        )
        return "".join(f"{line}\n" for line in lines) + f"\n{whole}"

    def specials(self) -> tuple[str, ...]:
        """The tokens that a tokenizer needs for images that are processed so."""
        side = -(-min(self.longest_edge, _LARGEST) // self.tile) if self.split else 0
        return (IMAGE, AROUND, GLOBAL, *(place(row, column) for row in range(side) for column in range(side)))

    def _resized(
        self, image: UInt8[np.ndarray, "height width 3"], size: tuple[int, int]
    ) -> UInt8[np.ndarray, "height width 3"]:
        from PIL import Image

        height, width = size
        return np.asarray(Image.fromarray(image).resize((width, height), resample=self.resample))


def place(row: int, column: int) -> str:
    """The token before a tile; rows and columns are counted from 0 here, from 1 in the token.

    >>> place(0, 1)
    '<row_1_col_2>'
    """
    return f"<row_{row + 1}_col_{column + 1}>"


def _longest_edge(height: int, width: int, longest: int) -> tuple[int, int]:
    """Height and width of an image whose longer side is resized; the other one becomes even."""
    share = width / height
    if width >= height:
        width = longest
        height = int(width / share)
        height += height % 2
    else:
        height = longest
        width = int(height * share)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    share = width / height
    if width >= height and width > _LARGEST:
        height, width = int(_LARGEST / share), _LARGEST
    elif height > width and height > _LARGEST:
        height, width = _LARGEST, int(_LARGEST * share)
    return max(height, 1), max(width, 1)


def _multiples(height: int, width: int, tile: int) -> tuple[int, int]:
    """Height and width of an image that is resized to whole tiles."""
    share = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / share) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * share) / tile) * tile
    return height, width

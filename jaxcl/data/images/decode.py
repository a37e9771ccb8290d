"""From the bytes of an image file to pixels. What is large or broken is refused; decoding is Pillow's."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from jaxcl.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

#: Formats that are decoded, by Pillow's names.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
#: Pixels that an image may have: a few kilobytes may decode to gigabytes.
MAX_PIXELS = 2**26


def decode(content: bytes, where: str) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image, as they are meant to be seen: turned as its EXIF data say, on white where transparent.

    Of an animation, the first picture.

    Args:
      content: the bytes of a file.
      where: what it is called in messages.

    Raises:
      UserError: it is not an image of a known format, is larger than `MAX_PIXELS` or broken, or Pillow is missing.
    """
    from PIL import ImageOps

    opened = _open(content, where)
    try:
        return _rgb(ImageOps.exif_transpose(opened))
    except Exception as error:  # decoders raise many kinds of errors
        raise UserError(f"{where}: the image is broken: {_line(error)}") from error


def check(content: bytes, where: str) -> None:
    """Checks an image by its header, without decoding it.

    Args:
      content: the bytes of a file.
      where: what it is called in messages.

    Raises:
      UserError: see `decode`; broken pixels are not found.
    """
    _open(content, where)


def encode_png(pixels: Any, where: str) -> bytes:
    """The file of an image that is given as an array.

    Args:
      pixels: `[height, width, 3]` or `[height, width, 1]`, uint8.
      where: what it is called in messages.

    Raises:
      UserError: the array is not an image, or Pillow is missing.
    """
    image = _pillow(where)
    array = np.asarray(pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        raise UserError(
            f"{where}: an array of {array.dtype} with shape {list(array.shape)} is not an image; expected uint8, "
            "[height, width, 3] or [height, width, 1]"
        )
    file = io.BytesIO()
    image.fromarray(array if array.shape[-1] == 3 else array[..., 0]).save(file, "PNG")
    return file.getvalue()


def _pillow(where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"{where}: images need the package pillow: pip install 'jaxcl[vision]'") from error
    return Image


def _open(content: bytes, where: str) -> Image.Image:
    image = _pillow(where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", image.DecompressionBombWarning)  # the limit here is lower
            found: Image.Image = image.open(io.BytesIO(content), formats=FORMATS)
    except image.DecompressionBombError as error:
        raise UserError(f"{where}: {_line(error)}; allowed are {MAX_PIXELS:,} pixels") from None
    except image.UnidentifiedImageError:
        raise UserError(f"{where}: not an image, or broken; allowed are {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders raise many kinds of errors
        raise UserError(f"{where}: the image is broken: {_line(error)}") from error
    width, height = found.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{where}: the image has {width} x {height} pixels; allowed are {MAX_PIXELS:,}")
    return found


def _rgb(image: Any) -> UInt8[np.ndarray, "height width 3"]:
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.asarray(image.convert("RGB"))


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__

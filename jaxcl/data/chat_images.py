"""Images in rendered conversations: from their marks to the texts that they become."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxcl.data.chat_rendering import Piece, Rendering
from jaxcl.data.images.reference import MARK
from jaxcl.errors import UserError


def with_images(rendering: Rendering, replacements: Sequence[str], where: str) -> Rendering:
    """A rendering with the texts of images in the places of their marks.

    Args:
      rendering: the rendering, with one `MARK` for each image.
      replacements: the text that each image becomes, in order.
      where: what the conversation is called in messages.

    Raises:
      UserError: the template leaves out images or repeats them.
    """
    places = [found.start() for found in re.finditer(MARK, rendering.text)]
    if len(places) != len(replacements):
        raise UserError(
            f"{where}: the chat template writes {len(places)} of the conversation's {len(replacements)} images"
        )
    parts = rendering.text.split(MARK)
    text = parts[0] + "".join(one + part for one, part in zip(replacements, parts[1:], strict=True))

    def moved(char: int) -> int:
        return char + sum(len(one) - 1 for place, one in zip(places, replacements, strict=True) if place < char)

    pieces = [Piece(piece.message, moved(piece.start), moved(piece.stop)) for piece in rendering.pieces]
    learned = [(moved(start), moved(stop)) for start, stop in rendering.learned]
    return Rendering(text, pieces, learned, moved(rendering.last), rendering.hidden)

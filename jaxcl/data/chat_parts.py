"""Messages as lists of parts, for chat templates of models that see; these write `<image>` for an image.

Such a template may write something else around a message that begins with an image. So that image is kept apart from
the message's text: it belongs to what the template writes around it.
"""

from __future__ import annotations

import itertools
from typing import Any

from jaxcl.data.images.processor import IMAGE
from jaxcl.data.images.reference import MARK
from jaxcl.data.messages import Message


def without_lead(message: Message) -> Message:
    """A message whose first image, if it begins with one, is apart from its text.

    >>> without_lead({"role": "user", "content": MARK + "a"}) == {"role": "user", "content": "a", "lead": MARK}
    True
    """
    if not message["content"].startswith(MARK):
        return message
    return {"role": message["role"], "content": message["content"][len(MARK) :], "lead": MARK}


def as_parts(message: Message) -> dict[str, Any]:
    """A message as templates of models that see want it.

    >>> as_parts({"role": "user", "content": "a" + MARK})["content"]
    [{'type': 'text', 'text': 'a'}, {'type': 'image'}]
    """
    texts = (message.get("lead", "") + message["content"]).split(MARK)
    parts: list[dict[str, str]] = [{"type": "text", "text": texts[0]}] if texts[0] or len(texts) == 1 else []
    for text in texts[1:]:
        parts.append({"type": "image"})
        parts += [{"type": "text", "text": text}] if text else []
    return {"role": message["role"], "content": parts}


def marked_images(text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
    """A rendering with a mark for each `<image>`, and the places in it; messages do not hold that text any more.

    >>> marked_images("User:<image>Hi", [(12, 14)]) == (f"User:{MARK}Hi", [(6, 8)])
    True
    """
    parts = text.split(IMAGE)
    ends = list(itertools.accumulate(len(part) + len(IMAGE) for part in parts[:-1]))
    shrunk = len(IMAGE) - len(MARK)

    def moved(char: int) -> int:
        return char - shrunk * sum(end <= char for end in ends)

    return MARK.join(parts), [(moved(start), moved(stop)) for start, stop in spans]


__all__ = ["as_parts", "marked_images", "without_lead"]

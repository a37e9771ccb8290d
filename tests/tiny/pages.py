"""What makes a page sound, checked by parsing it."""

import re
from html.parser import HTMLParser

_VOID = {"meta", "br", "img", "input", "link", "hr"}
_ALLOWED = (
    " html head meta title style body main header footer section h1 h2 h3 p div span b i small a bdi table thead tbody "
    "tfoot tr th td figure figcaption details summary pre ul li img svg g path text tspan defs use clippath rect image "
)


class Page(HTMLParser):
    """Elements, text and addresses of a page; refuses what a report must not hold."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.counts: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert f" {tag} " in _ALLOWED, f"unexpected element {tag}"
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in ("href", "xlink:href", "src"):
                self.links.append(value or "")
            if name == "style":
                assert "url(" not in (value or "").replace("url(#", ""), value
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def check_page(source: str) -> Page:
    """Parses a page: all elements known and closed, nothing loaded from anywhere, no control characters."""
    page = Page(source)
    assert source.startswith("<!DOCTYPE html>")
    for link in page.links:
        assert link.startswith(("#", "data:image/png;base64,")) or re.fullmatch(r"[\w./%-]+\.html", link), link
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", source)
    assert "@import" not in source
    return page

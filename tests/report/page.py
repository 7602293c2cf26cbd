"""A page as a browser would see it."""

import html.parser

LOADING = ("src", "srcset", "href", "poster", "data", "action", "formaction", "background", "xlink:href")


class Page(html.parser.HTMLParser):
    """What a browser would load, the tags by name, and the text without scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.words, self.styles, self._inside = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._inside = tag if tag in ("script", "style") else ""
        self.tags.append((tag, dict(attrs)))
        self.loads += [(tag, value or "") for name, value in attrs if name in LOADING]
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "style":
            self.styles += data
        elif not self._inside:
            self.words += data

"""Pages are single files, and what a user has named cannot be a part of their HTML."""

import re
from html.parser import HTMLParser

from hf_curriculum_distill.report.page import figure, legend, make_page, paragraph, table


class Reader(HTMLParser):
    """A page's text, and whatever a browser would fetch or run."""

    def __init__(self, page):
        super().__init__()
        self.text, self.foreign, self.open = [], [], []
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "line", "path", "use"):
            self.open.append(tag)
        fetched = [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.foreign += [value for value in fetched if not value.startswith("#")] + [tag] * (tag in ("script", "link"))

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def test_whatever_is_named_is_text():
    evil = '<script>alert("x")</script>&'
    parts = [table([[evil, evil], [evil, evil]]), paragraph(evil), figure("<svg ></svg>", evil, evil)]
    page = make_page(evil, evil, [*parts, legend([(evil, "-", "#000000")])])
    read = Reader(page)
    assert not read.open and not read.foreign
    assert b"<script" not in page and read.text.count(evil) == 10


def test_a_page_has_its_colours_for_light_and_dark_and_room_for_narrow_screens():
    page = make_page("title", "note", []).decode()
    assert "prefers-color-scheme: dark" in page and 'content="width=device-width' in page
    assert not re.search(r"https?://", page)

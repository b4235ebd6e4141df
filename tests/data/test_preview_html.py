"""The page by itself: nothing that the data say is markup, and long lists of notes are cut."""

import re

import numpy as np
import pytest

from data.batch import Row
from data.preview_html import page

MARKUP = "<script>x</script>&\"'\x1b"
SHOWN = "&lt;script&gt;x&lt;/script&gt;&amp;&quot;&#x27;␛"


class Markup:
    """Decodes any tokens to markup."""

    def decode(self, tokens: list[int]) -> str:
        return MARKUP


def shown(num_notes: int = 1) -> str:
    tokens, labels = np.arange(4, dtype=np.int32), np.array([-100, 2, -100, -100], np.int32)
    row = Row(tokens, labels, [3, 1], 1, (), [], (), None)
    notes = [(MARKUP, f"note {number}{MARKUP}") for number in range(num_notes)]
    return page(MARKUP, [row], Markup(), None, [MARKUP], [(1, 9, 4), (10, 99, 1)], notes)


def test_nothing_that_the_data_say_is_markup() -> None:
    text = shown()
    assert MARKUP not in text
    assert "<script" not in text
    assert "\x1b" not in text
    assert text.count(SHOWN) == 2 + 1 + 2 + 2  # title and heading, a fact, two spans, a note's reason and message
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text


def test_spans_fillers_and_bars() -> None:
    text = shown()
    assert f'<span title="tokens 0 to 1, not trained on">{SHOWN}</span>' in text
    assert f'<span class="trained" title="token 2, trained on">{SHOWN}</span>' in text
    assert "Document 0: tokens 0 to 2, 1 trained on" in text
    assert "<small>1 filler</small>" in text
    assert re.findall(r'class="fill" style="width: (.*?)"', text) == ["100.0%", "25.0%"]


@pytest.mark.parametrize(
    ("number", "listed", "is_open"), [(0, 0, False), (20, 20, True), (21, 21, False), (501, 500, False)]
)
def test_notes(number: int, listed: int, is_open: bool) -> None:
    text = shown(number)
    assert len(re.findall(r"<td>note \d+", text)) == listed
    assert ("<details open>" in text) == is_open
    assert ("of which the first 500 are listed" in text) == (number > 500)
    assert ("Samples that are skipped" in text) == (number > 0)

"""A row in pieces: documents, which tokens are trained on, and signs for what a terminal would obey."""

import numpy as np

from data.batch import Row
from data.preview_rows import Span, documents_of, show_row, visible
from models.ops.labels import IGNORED

LABELS = [IGNORED, 12, 13, IGNORED, 15, IGNORED, IGNORED]
"""Documents of 3 and of 2 tokens, then two fillers. The third token's label would cross into the second document."""


class Letters:
    """Decodes token 10 to "a", 11 to "b", and so on."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("a") + token - 10) for token in tokens)


def row() -> Row:
    tokens = np.arange(10, 17, dtype=np.int32)
    return Row(tokens, np.array(LABELS, np.int32), [3, 2, 2], 2, (), [], (), None)


def test_documents_and_what_is_trained_on() -> None:
    """A label stands at the token before; a document's first token is never trained on; fillers are no document."""
    assert list(documents_of(row(), None)) == [
        [Span(0, 2, False, None), Span(2, 3, True, None)],
        [Span(3, 5, False, None)],
    ]


def test_a_row_as_text() -> None:
    assert show_row(row(), Letters(), None, colours=False) == "|ab«c»|de|(2 fillers)"
    assert show_row(row(), Letters(), None, colours=True) == (
        "\033[1;31m|\033[0m\033[90mab\033[0m\033[32mc\033[0m\033[1;31m|\033[0m\033[90mde\033[0m"
        "\033[1;31m|\033[0m\033[90m(2 fillers)\033[0m"
    )


def test_signs_for_control_characters() -> None:
    assert visible("a\x1b[2J\tb\n\x7f\x85\u202e\u2066\ud800é") == (
        "a␛[2J\tb\n[U+007F][U+0085][U+202E][U+2066][U+D800]é"
    )

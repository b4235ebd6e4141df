"""Draws the pictures in this folder, asks about them, and writes a tokenizer for them: offline, the same each time.

python scripts/make_tiny_vision.py        (README.md says which versions made the files)

Shapes: H and W are the height and width of a picture in pixels.
"""

import io
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tokenizers import AddedToken, Tokenizer

SEED, NUM_TRAIN, NUM_HELD_OUT = 16, 3600, 300

COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (250, 200, 0),
    "purple": (160, 40, 190),
    "black": (15, 15, 15),
}
BACKGROUNDS = ((255, 255, 255), (228, 228, 228))
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three")
HEIGHTS_AND_WIDTHS = [(64, 64)] * 9 + [(64, 96), (96, 64), (96, 96)]

# A digit is drawn on six points, two columns of three rows, by lines between them: from (row, column) to (row, column).
LINES = {
    "top": (0, 0, 0, 1),
    "middle": (1, 0, 1, 1),
    "bottom": (2, 0, 2, 1),
    "upper left": (0, 0, 1, 0),
    "upper right": (0, 1, 1, 1),
    "lower left": (1, 0, 2, 0),
    "lower right": (1, 1, 2, 1),
}
NOT_IN_DIGIT = {  # fewer to write down than those that are
    0: ("middle",),
    1: ("top", "middle", "bottom", "upper left", "lower left"),
    2: ("upper left", "lower right"),
    3: ("upper left", "lower left"),
    4: ("top", "bottom", "lower left"),
    5: ("upper right", "lower left"),
    6: ("upper right",),
    7: ("middle", "bottom", "upper left", "lower left"),
    8: (),
    9: ("lower left",),
}

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


class Thing(NamedTuple):
    """A shape, or a digit, and where it is drawn."""

    name: str
    colour: str
    y: int
    x: int
    radius: int


Part = dict[str, str | None]
Message = dict[str, str | list[Part]]


class Chat(NamedTuple):
    """A conversation and the PNG files of its image parts, in their order."""

    messages: list[Message]
    pictures: list[bytes]


def mask(thing: Thing, height: int, width: int) -> np.ndarray:
    """Which pixels of [H, W] a thing covers: in whole numbers, the same on every machine and with any library."""
    rows, columns = np.ogrid[:height, :width]
    below, right, radius = rows - thing.y, columns - thing.x, thing.radius
    if thing.name == "circle":
        return below**2 + right**2 <= radius**2
    if thing.name == "square":
        return np.maximum(abs(below), abs(right)) <= radius
    if thing.name == "triangle":
        return (abs(below) <= radius) & (2 * abs(right) <= below + radius)
    if thing.name == "cross":
        return (np.minimum(abs(below), abs(right)) <= radius // 3) & (np.maximum(abs(below), abs(right)) <= radius)
    covered, thick = np.zeros((height, width), bool), radius // 6
    for name, line in LINES.items():
        if name not in NOT_IN_DIGIT[int(thing.name)]:
            top, bottom = ((row - 1) * (radius - thick) for row in line[::2])
            left, far = ((2 * column - 1) * (radius * 2 // 3 - thick) for column in line[1::2])
            in_rows = (below >= top - thick) & (below <= bottom + thick)
            covered |= in_rows & (right >= left - thick) & (right <= far + thick)
    return covered


def png(things: Iterable[Thing], height: int, width: int, background: tuple[int, int, int]) -> bytes:
    """A picture of things, each over those before it, with a palette of their colours."""
    indices, palette = np.zeros((height, width), np.uint8), list(background)
    for number, thing in enumerate(things, start=1):
        indices[mask(thing, height, width)] = number
        palette += COLOURS[thing.colour]
    image = Image.fromarray(indices)
    image.putpalette(palette)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


class Artist:
    """Draws and asks by one stream of random numbers. No picture is drawn twice."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._drawn = set[bytes]()
        self._decks: dict[tuple[str, ...], list[str]] = {}

    def deal(self, *cards: str) -> str:
        """One of the cards, from a deck that is shuffled again when it is empty: all come equally often."""
        deck = self._decks.setdefault(cards, [])
        if not deck:
            deck += self.random.sample(cards, len(cards))
        return deck.pop()

    def one_of(self, name: str | None = None, colour: str | None = None) -> tuple[Thing, bytes]:
        """One large thing near the centre: a shape, unless its name is said."""
        while True:
            height, width = self.random.choice(HEIGHTS_AND_WIDTHS)
            thing = Thing(
                name or self.random.choice(SHAPES),
                colour or self.random.choice([*COLOURS]),
                height // 2 + self.random.randint(-3, 3),
                width // 2 + self.random.randint(-3, 3),
                self.random.randint(20, 27),
            )
            if (picture := self._new([thing], height, width)) is not None:
                return thing, picture

    def several(self, number: int) -> tuple[list[Thing], bytes]:
        """Small shapes in quarters of a picture, no two alike in shape or colour."""
        while True:
            height, width = self.random.choice(HEIGHTS_AND_WIDTHS)
            corners = self.random.sample([(y, x) for y in (1, 3) for x in (1, 3)], number)
            names, colours = self.random.sample(SHAPES, number), self.random.sample([*COLOURS], number)
            things = [
                Thing(
                    name,
                    colour,
                    y * height // 4 + self.random.randint(-2, 2),
                    x * width // 4 + self.random.randint(-2, 2),
                    self.random.randint(9, 13),
                )
                for name, colour, (y, x) in zip(names, colours, corners)
            ]
            if (picture := self._new(things, height, width)) is not None:
                return things, picture

    def _new(self, things: list[Thing], height: int, width: int) -> bytes | None:
        """The picture, if it was not drawn before."""
        picture = png(things, height, width, self.random.choice(BACKGROUNDS))
        pixels = Image.open(io.BytesIO(picture)).convert("RGB")
        key = bytes((height, width)) + pixels.tobytes()
        if key in self._drawn:
            return None
        self._drawn.add(key)
        return picture

    def ask(self, question: str) -> list[Part]:
        """A question with its picture before it, which is usual, after it or in the middle."""
        image: Part = {"type": "image", "text": None}
        place = self.random.choice(["before"] * 6 + ["after", "middle"])
        if place == "before":
            return [image, _text(question)]
        if place == "after":
            return [_text(question + " "), image]
        return [_text(self.random.choice(["Look at this: ", "Here is a picture: "])), image, _text(" " + question)]

    def colour(self) -> Chat:
        thing, picture = self.one_of(colour=self.deal(*COLOURS))
        question = self.random.choice(["What colour is it?", f"What colour is the {thing.name}?"])
        return Chat(_turn(self.ask(question), thing.colour), [picture])

    def shape(self) -> Chat:
        thing, picture = self.one_of(self.deal(*SHAPES))
        return Chat(_turn(self.ask("What shape is it?"), thing.name), [picture])

    def digit(self) -> Chat:
        thing, picture = self.one_of(self.deal(*map(str, NOT_IN_DIGIT)))
        return Chat(_turn(self.ask("Which digit is it?"), thing.name), [picture])

    def count(self) -> Chat:
        number = self.deal(*NUMBERS)
        _, picture = self.several(NUMBERS.index(number) + 1)
        return Chat(_turn(self.ask("How many shapes are there?"), number), [picture])

    def colour_of_two(self) -> Chat:
        things, picture = self.several(2)
        return Chat(_turn(self.ask(f"What colour is the {things[0].name}?"), things[0].colour), [picture])

    def which(self) -> Chat:
        """Two pictures, of which one has the colour that is asked for."""
        colours = self.random.sample([*COLOURS], 2)
        pictures = [self.one_of(colour=colour)[1] for colour in colours]
        which = self.deal("first", "second")
        question = _text(f"Which one is {colours[which == 'second']}, the first or the second?")
        image: Part = {"type": "image", "text": None}
        if self.random.randrange(4):
            parts = [image, image, question]
        else:
            parts = [_text("First: "), image, _text(" Second: "), image, _text(" "), question]
        return Chat(_turn(parts, which), pictures)

    def two_turns(self) -> Chat:
        """Two questions about one picture, or the same question about two."""
        (thing, picture), (other, another) = self.one_of(), self.one_of()
        asked = self.random.choice(["colour", "shape"])
        answers = {"colour": thing.colour, "shape": thing.name}
        messages = _turn(self.ask(f"What {asked} is it?"), answers[asked])
        if self.random.randrange(2):
            rest = "shape" if asked == "colour" else "colour"
            return Chat([*messages, *_turn([_text(f"And what {rest} is it?")], answers[rest])], [picture])
        answer = other.colour if asked == "colour" else other.name
        parts: list[Part] = [_text("And this one? "), {"type": "image", "text": None}]
        return Chat([*messages, *_turn(parts, answer)], [picture, another])


def _text(text: str) -> Part:
    return {"type": "text", "text": text}


def _turn(parts: list[Part], answer: str) -> list[Message]:
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": [_text(answer)]}]


KINDS: dict[Callable[[Artist], Chat], int] = {  # and how many of each hundred chats are of each
    Artist.shape: 32,
    Artist.colour: 20,
    Artist.digit: 18,
    Artist.two_turns: 12,
    Artist.which: 8,
    Artist.count: 7,
    Artist.colour_of_two: 3,
}

_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.list_(_PART))])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = pa.schema([("messages", pa.list_(_MESSAGE)), ("images", pa.list_(_IMAGE))])


def draw_chats(seed: int = SEED) -> tuple[list[Chat], list[Chat]]:
    """The chats to train on and those held out, none of whose pictures is among the first."""
    artist = Artist(seed)
    hundred = [kind for kind, number in KINDS.items() for _ in range(number)]
    chats: list[Chat] = []
    while len(chats) < NUM_TRAIN + NUM_HELD_OUT:
        chats += [kind(artist) for kind in artist.random.sample(hundred, len(hundred))]
    return chats[:NUM_TRAIN], chats[NUM_TRAIN:]


def write_chats(chats: list[Chat], path: Path) -> None:
    """Writes chats as Parquet: `messages`, whose image parts have no source, and `images`, in their order."""
    rows = [
        {"messages": chat.messages, "images": [{"bytes": picture, "path": None} for picture in chat.pictures]}
        for chat in chats
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=600)


def write_examples(chats: list[Chat], folder: Path) -> None:
    """Writes three pictures, three times as large: the first that one question is asked about, and two, and three."""
    wanted = ("What colour is it?", "Which digit is it?", "How many shapes are there?")
    for number, question in enumerate(wanted, start=1):
        picture = next(chat.pictures[0] for chat in chats if _text(question) in chat.messages[0]["content"])
        image = Image.open(io.BytesIO(picture))
        enlarged = image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST)
        enlarged.save(folder / f"vision_example_{number}.png", optimize=True)


def write_tokenizer(tiny_tokenizer: Path, folder: Path) -> None:
    """Writes tokenizer.json: the tiny tokenizer with four more tokens."""
    tokenizer = Tokenizer.from_file(str(tiny_tokenizer / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in VISION_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def main() -> None:
    """Writes both Parquet files and model/tokenizer.json of data/tiny_vision, and the examples of docs/."""
    folder = Path(__file__).resolve().parents[1] / "data/tiny_vision"
    train, held_out = draw_chats()
    write_chats(train, folder / "train.parquet")
    write_chats(held_out, folder / "held_out.parquet")
    write_examples(held_out, folder.parents[1] / "docs")
    write_tokenizer(folder.parent / "tiny" / "tokenizer", folder / "model")


if __name__ == "__main__":
    main()

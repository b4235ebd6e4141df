"""The head of a source that is opened at no cost."""

from data.records import Whole


class Letters(Whole):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": "abc"[index]}

    def where(self, index: int) -> str:
        return f"letters:{index + 1}"


def test_the_head_names_each_record_and_reads_it_in_any_order():
    head = list(Letters().head())
    assert [where for where, _ in head] == ["letters:1", "letters:2", "letters:3"]
    assert [read() for _, read in reversed(head)] == [{"text": "c"}, {"text": "b"}, {"text": "a"}]

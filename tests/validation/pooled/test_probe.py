"""How held-out text becomes passages, and queries with passages."""

import itertools
from typing import Any

from quantool.texts.corpus import Document
from quantool.validation._pooled.probe import DOCUMENTS, LENGTHS, MOST, fitting, pairs, passages

WORDS = [Document(text=" ".join(f"word{number}" for number in range(2000)))]


def test_passages_are_whole_words_of_every_length_and_different() -> None:
    found = passages(WORDS, 10**6)
    assert len(found) == len(set(found)) > 30
    assert " ".join(found) == WORDS[0].text
    for passage, length in zip(found[:-1], itertools.cycle(LENGTHS)):
        assert length <= len(passage) + 1 <= length + len("word9999 ")
    assert passages([Document(text="twice the same")] * 3, 10**6) == ["twice the same"]


def test_a_budget_ends_them() -> None:
    found = passages(WORDS, 1000)
    assert sum(map(len, found[:-1])) < 1000 <= sum(map(len, found)) + 1
    long = [Document(text=" ".join(f"{number}" for number in range(100_000)))]
    assert len(passages(long, 10**9)) == MOST


def test_text_without_spaces_is_cut_too() -> None:
    found = passages([Document(text="".join(chr(0x4E00 + number) for number in range(1000)))], 10**6)
    assert [len(passage) for passage in found[:3]] == [100, 200, 400]


def test_conversations_give_what_was_said() -> None:
    chat = Document(messages=({"role": "user", "content": "Bon dia"}, {"role": "assistant", "content": None}))
    assert passages([chat], 1000) == ["Bon dia"]


def test_a_query_stands_with_the_passage_that_it_begins_and_others() -> None:
    found = passages(WORDS, 10**6)
    rows = pairs(found)
    assert len(rows) == DOCUMENTS * min(len(found), MOST // DOCUMENTS)
    for number in range(len(rows) // DOCUMENTS):
        queries, documents = zip(*rows[number * DOCUMENTS : (number + 1) * DOCUMENTS], strict=True)
        assert len(set(queries)) == 1
        assert documents[0] == found[number]
        assert found[number].startswith(queries[0])
        assert len(set(documents)) == DOCUMENTS
    assert pairs(found) == rows


def test_what_is_too_long_is_halved() -> None:
    def tokenizer(text: str, document: str | None, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*range(len(text) + len(document or "") + 1)]}

    probe = fitting("a" * 100, None, tokenizer, 30)
    assert (probe.text, len(probe.ids)) == ("a" * 25, 26)
    probe = fitting("a" * 20, "b" * 100, tokenizer, 50)
    assert (len(probe.text), len(probe.document or "")) == (20, 25)

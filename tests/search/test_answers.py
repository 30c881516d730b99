"""What was found, as lines and as plain values."""

from __future__ import annotations

import json

import pytest

from puma_hf.search.answers import Answer, Answers, one_line, shorten


def test_lines() -> None:
    found = (
        Answer(1, 0.91234, "b", "image", None, "/p/b.png"),
        Answer(2, -0.5, "a", "text", "red\nand blue", None),
        Answer(10, 0.25, "c", "image,text", "both", "/p/c.png"),
    )
    assert str(Answers("red", None, None, "any", 3, found)).splitlines() == [
        "  1  0.9123  image       b  /p/b.png",
        "  2  -0.5000  text        a  red and blue",
        " 10  0.2500  image,text  c  both  /p/c.png",
    ]


def test_json_has_everything_in_full() -> None:
    text = "x" * 10_000
    answers = Answers("red", "q.png", "Find it.", "text", 7, (Answer(1, 0.5, "a", "text", text, None),))
    found = json.loads(json.dumps(answers.to_dict()))
    assert found == {
        "query": "red",
        "image": "q.png",
        "instruction": "Find it.",
        "target": "text",
        "num_candidates": 7,
        "answers": [{"rank": 1, "score": 0.5, "id": "a", "modality": "text", "text": text, "image": None}],
    }


def test_a_terminal_is_not_steered() -> None:
    assert one_line("a\x1b[31mb\tc\r\n\u202ed") == "a [31mb c d"


@pytest.mark.parametrize(
    ("text", "expected"), [("abcde", "abcde"), ("abcdef", "abcd…"), ("a" * 10**6, "aaaa…"), ("abc   f", "abc f")]
)
def test_shortened(text: str, expected: str) -> None:
    assert shorten(text, 5) == expected


def test_an_answer_that_is_long_is_a_line() -> None:
    assert len(str(Answer(1, 0.5, "a", "text", "word\n" * 200_000, None))) < 150

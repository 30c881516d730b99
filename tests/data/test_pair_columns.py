from __future__ import annotations

from typing import Any

import pytest

from puma_hf.data.pair_columns import Part, find_columns


def row(*names: str, **values: Any) -> list[dict[str, Any]]:
    return [{**dict.fromkeys(names, "x"), **values}]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["image", "caption"], "anchor: caption (text); positive: image (image)"),
        (["file_name", "text"], "anchor: text (text); positive: file_name (image)"),
        (["image_path", "title", "id"], "anchor: title (text); positive: image_path (image); ignored: id"),
        (["photo_image", "caption"], "anchor: caption (text); positive: photo_image (image)"),
        (["anchor", "positive"], "anchor: anchor (text); positive: positive (text)"),
        (["question", "answer", "text"], "anchor: question (text); positive: answer (text); ignored: text"),
        (["query", "image", "caption"], "anchor: query (text); positive: image (image); ignored: caption"),
        (["positive", "caption"], "anchor: caption (text); positive: positive (text)"),
        (
            ["sent0", "sent1", "hard_neg"],
            "anchor: sent0 (text); positive: sent1 (text); negative 1: hard_neg (text)",
        ),
        (
            ["query", "query_image", "positive_image", "negative_2", "negative_10", "negative_1_image", "instruction"],
            "anchor: query (text), query_image (image); positive: positive_image (image); negative 1: "
            "negative_1_image (image); negative 2: negative_2 (text); negative 3: negative_10 (text); "
            "instruction: instruction",
        ),
    ],
)
def test_names_that_are_guessed(names: list[str], expected: str) -> None:
    assert str(find_columns(row(*names))) == expected


def test_values_tell_images_from_texts() -> None:
    rows = row(anchor="a shoe", positive="shoes/1.JPG")
    assert find_columns(rows).positive == Part(image="positive")
    rows += row(anchor="a hat", positive="the file 1.jpg shows a hat, no path")
    assert find_columns(rows).positive == Part(text="positive")
    arrow = {"bytes": None, "path": "1.jpg"}
    assert find_columns(row("caption", picture=arrow)).positive == Part(image="picture")
    assert find_columns(row("anchor", positive={"text": "a", "image": None})).positive == Part(both="positive")


def test_empty_values_do_not_tell() -> None:
    rows = [{"anchor": "", "positive": None}, {"anchor": "1.png", "positive": "a"}]
    assert find_columns(rows).anchor == Part(image="anchor")


def test_columns_that_come_later_count() -> None:
    rows = [{"anchor": "a"}, {"anchor": "b", "positive": "c"}]
    assert find_columns(rows).positive == Part(text="positive")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"anchor": "bild"}, "anchor: bild (image); positive: caption (text); ignored: titel"),
        ({"anchor": "titel", "positive": "bild"}, "anchor: titel (text); positive: bild (image); ignored: caption"),
        (
            {"anchor": {"text": "caption", "image": "bild"}, "positive": "titel"},
            "anchor: caption (text), bild (image); positive: titel (text)",
        ),
        (
            {"anchor": "text=caption, image=bild", "positive": "titel"},
            "anchor: caption (text), bild (image); positive: titel (text)",
        ),
        (
            {"positive": {"image": "titel"}, "negatives": "bild"},
            "anchor: caption (text); positive: titel (image); negative 1: bild (image)",
        ),
        (
            {"positive": "bild", "negatives": [{"text": "titel"}, "image=bild"]},
            "anchor: caption (text); positive: bild (image); negative 1: titel (text); negative 2: bild (image)",
        ),
    ],
)
def test_what_is_given_wins(given: dict[str, Any], expected: str) -> None:
    assert str(find_columns(row("caption", "titel", bild="1.png"), **given)) == expected


def test_no_negatives_on_purpose() -> None:
    found = find_columns(row("sent0", "sent1", "hard_neg"), negatives=())
    assert found.negatives == ()
    assert found.ignored == ("hard_neg",)


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        (["caption", "id"], {}, r"No column for the positive: the columns are caption, id\. Name it \(positive=\.\.\."),
        (
            ["positive"],
            {},
            r"No column for the anchor: the columns are positive\. .*--anchor\), or call it one of anch",
        ),
        ([], {}, r"No column for the anchor: the columns are none"),
        (["a", "b"], {"anchor": "c", "positive": "b"}, r"anchor: there is no column 'c'; the columns are a, b\."),
        (["text1", "b"], {"anchor": "b", "positive": "txt1"}, r"positive: .* Did you mean 'text1'\?"),
        (["a", "b"], {"anchor": {"text": "a", "image": "c"}, "positive": "b"}, r"anchor: there is no column 'c'"),
        (["a", "b"], {"anchor": {"sound": "a"}}, r"anchor=\{'sound': 'a'\} must be a column, or name columns of text"),
        (["a", "b"], {"anchor": {}}, r"anchor=\{\} must be a column"),
        (["a", "b"], {"anchor": 3}, r"anchor=3 must be a column"),
        (["a", "b"], {"anchor": "a", "positive": "b", "negatives": ["c"]}, r"negatives: there is no column 'c'"),
        (["sentence1", "sentence2", "label"], {}, r"There is a column 'label', .* some rows are no right pairs"),
        (["query", "document", "relevance"], {}, r"There is a column 'relevance'"),
        (["a", "b"], {"anchor": "a", "positive": "a"}, r"anchor and positive are both a \(text\)\. Name two"),
    ],
)
def test_what_does_not_fit(columns: list[str], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_columns(row(*columns), **given)


def test_scores_beside_columns_that_leave_no_doubt() -> None:
    assert "ignored: label" in str(find_columns(row("sentence1", "sentence2", "label"), anchor="sentence1"))
    assert "ignored: score" in str(find_columns(row("anchor", "positive", "score")))
    assert "ignored: label" in str(find_columns(row("image", "caption", "label")))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"image": "a.png", "question": "what?", "answer": "a shoe"}, "image"),
        ({"image": {"bytes": b"", "path": None}, "question": "what?", "answer": "a shoe"}, "image"),
        ({"image": "a.png", "caption": "in red", "target_image": "b.png"}, "target_image"),
        ({"image": "a.png", "caption": "in red", "image_2": "b.png"}, "image_2"),
    ],
)
def test_images_of_either_side_are_not_ignored(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"The column '{name}' holds images, but its name does not tell whose"):
        find_columns([values])
    given = {"text": next(one for one in ("question", "caption") if one in values), "image": "image"}
    assert find_columns([values], anchor=given, positive="answer" if "answer" in values else name)


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"bytes": b"", "path": None}, "caption": "red", "filename": "a.png", "img_id": "1"},
        {"query": "red", "document": "a shoe", "path": "notes/a.txt"},
        {"query": "red", "document": "a shoe", "url": "https://shop/a.png"},
        {"query": "red", "positive": "a shoe", "negative_image": "b.png"},
    ],
)
def test_other_names_of_files_do_not_matter(values: dict[str, Any]) -> None:
    assert find_columns([values])

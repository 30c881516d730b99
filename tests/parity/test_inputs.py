from __future__ import annotations

from typing import Any

from puma_hf import PumaProcessor
from puma_hf.parity.inputs import check_inputs, kind_of, pictures_of, to_chat


def as_data(inputs: list[dict[str, Any]]) -> list[Any]:
    return [(one.get("text"), one.get("instruction"), [p.tobytes() for p in pictures_of(one)]) for one in inputs]


def test_the_seed_decides() -> None:
    assert as_data(check_inputs(1)) == as_data(check_inputs(1))
    assert as_data(check_inputs(1)) != as_data(check_inputs(2))
    assert len(check_inputs()[2]["text"].split()) == 40


def test_kinds() -> None:
    kinds = {kind_of(one) for one in check_inputs()}
    names = ("text", "image", "image,text")
    assert kinds == {*names, *(f"{name}, instructed" for name in names)}


def test_pictures_are_not_of_one_colour() -> None:
    pictures = [picture for one in check_inputs() for picture in pictures_of(one)]
    assert len(pictures) == 6
    assert all(len(picture.getcolors(1 << 20) or []) > 1 for picture in pictures)


def test_a_chat_is_what_the_processor_makes_of_an_input(processor: PumaProcessor) -> None:
    for one in check_inputs():
        chat = to_chat(one)
        pictures = iter(pictures_of(one))
        for message in chat:
            for item in message["content"]:
                if item["type"] == "image":
                    item["image"] = next(pictures)
        found, expected = processor.process_inputs([chat]), processor.process_inputs([one])
        assert found["input_ids"].tolist() == expected["input_ids"].tolist()

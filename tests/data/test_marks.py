"""Tests image placeholders of other programs: ``<image 2>`` stands for image 2; unknown placeholders are rejected."""

from pathlib import Path
from typing import Any

import pytest
from rows import assistant, read_row, user

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.convert import convert

NUMBERED = ["<image {}>", "<image_{}>", "<image{}>", "<|image_{}|>", "<image-{}>", "<Image {}>"]


def row(question: Any, *images: str) -> dict[str, Any]:
    return {"prompt": question, "chosen": "c", "rejected": "r", "images": list(images)}


@pytest.mark.parametrize("mark", NUMBERED)
def test_numbered_marks_are_places_of_the_images_with_these_numbers(mark: str, tmp_path: Path) -> None:
    question = f"Is {mark.format(2)} above {mark.format(1)}?"
    expected = ("Is <image> above <image>?", ("b.png", "a.png"))
    pair = read_row(tmp_path, row(question, "a.png", "b.png"))
    assert isinstance(pair, Pair), pair
    assert (pair.question, pair.images) == expected
    values = {"question": question, "chosen": "c", "rejected": "r", "images": ["a.png", "b.png"]}
    pair = read_row(tmp_path, values, format="pairs")
    assert isinstance(pair, Pair)
    assert (pair.question, pair.images) == expected


def test_numbered_marks_of_several_turns_are_places(tmp_path: Path) -> None:
    turns = [user("See <image 2>"), assistant("Yes."), user("And <image 1>?")]
    pair = read_row(tmp_path, row(turns, "a.png", "b.png"))
    assert isinstance(pair, Pair), pair
    assert pair.images == ("b.png", "a.png")
    assert [turn["content"] for turn in pair.source["messages"]] == ["See <image>", "Yes.", "And <image>?"]
    assert pair.question == "And <image>?"


def test_numbered_marks_of_mmpr_are_written_as_places(tmp_path: Path, images: Path) -> None:
    line = '{"image": ["a.png", "sub/b.jpg"], "question": "<image_2> or <image_1>?", "chosen": "c", "rejected": "r"}'
    (images / "x.jsonl").write_text(line)
    convert(open_pairs(images / "x.jsonl"), tmp_path / "out", "mmpr")
    (pair,) = (pair for _, pair in open_pairs(tmp_path / "out" / "meta.json").scan())
    assert isinstance(pair, Pair)
    assert (pair.question, [Path(image).name for image in pair.images]) == ("<image> or <image>?", ["b.jpg", "a.png"])


REJECTED: dict[str, dict[str, Any]] = {
    "rlaif-v": {"question": "<image 2> or <image 1>?", "chosen": "c", "rejected": "r", "id": 1},
    "pairs": {"question": "<image 2> or <image 1>?", "chosen": "c", "rejected": "r"},
    "trl": {"prompt": "<image 2> or <image 1>?", "chosen": "c", "rejected": "r"},
    "swift": {"messages": [user("<image 2> or <image 1>?"), assistant("c")], "rejected_response": "r"},
    "mmpr": {"question": "<image 2> or <image 1>?", "chosen": "c", "rejected": "r"},
}


@pytest.mark.parametrize("format", REJECTED)
def test_rejected_images_have_the_order_of_the_numbers_too(format: str, tmp_path: Path) -> None:
    names = ("image", "rejected_image") if format == "mmpr" else ("images", "rejected_images")
    paths = dict(zip(names, (["a.png", "b.png"], ["c.png", "d.png"]), strict=True))
    pair = read_row(tmp_path, {**REJECTED[format], **paths}, format=format)
    assert isinstance(pair, Pair), pair
    assert pair.question == "<image> or <image>?"
    found = [[Path(path).name for path in images] for images in (pair.images, pair.rejected_images)]
    assert found == [["b.png", "a.png"], ["d.png", "c.png"]]


@pytest.mark.parametrize(
    ("question", "count"),
    [
        ("<image 1> and <image 1>", 1),
        ("<image 1> and <image_1>", 2),
        ("<image 2>", 2),
        ("<image 1>", 2),
        ("<image 0>", 1),
        ("<image 1> <image 3>", 2),
        ("<image>\nWhat is in <image 1>?", 1),
        ([user([{"type": "image"}, {"type": "text", "text": "In <image 1>?"}])], 1),
        ([user("<image 1>"), assistant("a"), user("<image 1>")], 1),
    ],
)
def test_numbers_that_do_not_fit_the_images_refuse_the_line(question: Any, count: int, tmp_path: Path) -> None:
    bad = read_row(tmp_path, row(question, *["a.png", "b.png"][:count]))
    assert isinstance(bad, BadLine), bad
    assert bad.kind in ("image mark", "no image")
    assert "numbered marks" in bad.reason


OTHERS = [
    *("<img>a.png</img>", "<img>https://host/1234</img>", "<start_of_image>", "[IMG]", "<Image>", "<IMAGE>"),
    *("<|image|>", "<|image_pad|>", "<|vision_start|>", "<image_soft_token>", "<image_placeholder>", "<ImageHere>"),
    *("<IMG_CONTEXT>", "<|media_begin|>", "<|media_pad|>"),
]


@pytest.mark.parametrize("mark", [*OTHERS, *(mark.format(1) for mark in NUMBERED)])
def test_a_mark_of_another_program_without_an_image_refuses_the_line(mark: str, tmp_path: Path) -> None:
    for prompt in (f"{mark}\nq", [user(f"see {mark}"), assistant("a"), user("q")]):
        bad = read_row(tmp_path, row(prompt))
        assert isinstance(bad, BadLine), bad
        assert bad.kind == "no image"
        assert f"{mark!r} names an image, but the pair has none" in bad.reason


@pytest.mark.parametrize("mark", [*OTHERS, "(<image>./</image>)", "<image></image>"])
def test_a_mark_of_another_program_beside_an_image_refuses_the_line(mark: str, tmp_path: Path) -> None:
    bad = read_row(tmp_path, row(f"{mark}\nq", "a.png"))
    assert isinstance(bad, BadLine), bad
    assert (bad.kind, "replace it by <image>" in bad.reason) == ("image mark", True)


@pytest.mark.parametrize(
    "text",
    [
        *('Fix <img src="a.png">', "<img>", "<img></img>", "Is <img>text</img> valid?", "<picture>a.png</picture>"),
        *("[img]", "<images>", "<image src='a.png'/>", "image 1", "<image one>", "a.png"),
    ],
)
def test_html_and_text_that_is_no_mark_stays(text: str, tmp_path: Path) -> None:
    for images in ((), ("a.png",)):
        pair = read_row(tmp_path, row(text, *images))
        assert isinstance(pair, Pair), pair
        assert (pair.question, pair.images) == (text, images)


def test_a_response_may_name_a_numbered_image(tmp_path: Path) -> None:
    pair = read_row(tmp_path, {**row("<image 1>", "a.png"), "chosen": "In <image 1>"})
    assert isinstance(pair, Pair)
    assert pair.chosen == "In <image 1>"

"""Tests rows of TRL's preference format."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import PAIR
from rows import assistant, gpt, human, open_rows, read_row, system, text, user

from mpo_ext.data import (
    BadLine,
    Pair,
    open_pairs,
)
from mpo_ext.data.convert import convert
from mpo_ext.data.media import place_problem
from mpo_ext.data.reader import FieldError
from mpo_ext.data.trl import from_trl, read_trl, to_trl

KINDS = ("standard", "conversational")


@pytest.mark.parametrize("kind", KINDS)
def test_trl_can_read_the_rows(kind: Any, mmpr: Path) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    for pair in open_pairs(mmpr).pairs:
        row = to_trl(pair, kind)
        assert data_utils.is_conversational(row) == (kind == "conversational")
        if kind == "conversational":
            messages = data_utils.prepare_multimodal_messages(row["prompt"], images=row["images"])
            placed = [block["image"] for block in messages[0]["content"] if block["type"] == "image"]
            assert placed == list(pair.images)
            assert data_utils.prepare_multimodal_messages(row["chosen"])[0]["content"][0]["text"] == pair.chosen
        assert from_trl(row) == pair


def test_image_blocks_are_at_the_places_of_the_placeholders() -> None:
    def blocks(question: str, images: int) -> list[str]:
        row = to_trl(Pair(question, "c", "r", ("x",) * images), "conversational")
        assert from_trl(row).question == question
        return [block["text"] or "IMAGE" for block in row["prompt"][0]["content"]]

    assert blocks("<image>\nq", 1) == ["IMAGE", "q"]
    assert blocks("q", 1) == ["IMAGE", "q"]
    assert blocks("a <image> b <image>\n", 2) == ["a ", "IMAGE", " b ", "IMAGE"]
    assert blocks("<image><image>", 1) == ["IMAGE", "<image><image>"]
    assert blocks("<image>", 0) == ["<image>"]


def test_an_edited_prompt_takes_precedence() -> None:
    row = to_trl(Pair("a <image>", "c", "r", ("x",)), "conversational")
    assert row["question"] == "a <image>"
    row["prompt"][0]["content"][0]["text"] = "b "
    assert from_trl(row).question == "b <image>\n"


def test_rows_of_other_writers_are_read_or_rejected() -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "score": 0.5}
    assert from_trl(row) == Pair("q", "c", "r", extra={"score": 0.5})
    user = {"role": "user", "content": "q"}
    for prompt in ([user, user], [user, {"role": "system", "content": "s"}], [], [1], 3, None, [{"role": "user"}]):
        with pytest.raises(FieldError, match="prompt must"):
            from_trl({**row, "prompt": prompt})
    with pytest.raises(FieldError, match="chosen must be text or one message"):
        from_trl({**row, "chosen": [user]})
    with pytest.raises(FieldError, match="images must be paths unless image_dir is given"):
        from_trl({**row, "images": [{"bytes": b"x", "path": None}]})


@pytest.mark.parametrize("role", ["gpt", "bot", "chatgpt"])
def test_the_roles_of_sharegpt_are_read(role: str) -> None:
    responses = {name: [{"from": role, "value": name[0]}] for name in ("chosen", "rejected")}
    for prompt in ("q", [{"from": "human", "value": "q"}]):
        assert from_trl({"prompt": prompt, **responses}) == Pair("q", "c", "r")
    turns = [{"from": "human", "value": "q"}]
    assert from_trl({"prompt": turns, **responses, "question": "q"}) == Pair("q", "c", "r")
    # Turns in ``extra`` that are not those of the prompt were written before the prompt was edited.
    source = {"$source": {"messages": [{"role": "user", "content": name} for name in "ab"]}}
    several = [{"from": "human", "value": "q"}, {"from": role, "value": "a"}, {"from": "human", "value": "p"}]
    assert from_trl({"prompt": several, **responses, "extra": json.dumps(source)}).question == "p"


def test_a_trl_line_without_a_pair_is_a_bad_line(tmp_path: Path) -> None:
    rows = [to_trl(PAIR), {**to_trl(PAIR), "extra": "{"}, {**to_trl(PAIR), "provenance": "[]"}, {"prompt": "q"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = [result for _, result in read_trl(tmp_path / "t.jsonl").scan()]
    assert results[0] == PAIR
    assert all(isinstance(result, BadLine) for result in results[1:])


PNG = {"type": "image", "image": "a.png"}
ANSWERS: dict[str, Any] = {"chosen": [assistant("c")], "rejected": [assistant("r")]}
EARLIER = [user("a"), assistant("b"), user("q")]


def turns(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"$source": {"messages": messages}}


@pytest.mark.parametrize(
    "image",
    [
        {"image": "a.png"},
        {"image": ["a.png"]},
        {"image": {"bytes": None, "path": "a.png"}},
        {"images": ["a.png"]},
        {"images": "a.png"},
        {"images": [{"url": "a.png"}]},
        {"image": "a.png", "images": ["a.png"]},
    ],
)
def test_images_of_either_column_are_taken(image: dict[str, Any], tmp_path: Path) -> None:
    assert read_row(tmp_path, {"prompt": "q", "chosen": "c", "rejected": "r", **image}) == Pair(
        "q", "c", "r", ("a.png",)
    )


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"images": ["a.png"], "image_paths": []}, ("a.png",)),
        ({"images": ["a.png"], "image_paths": None}, ("a.png",)),
        ({"image": "a.png", "image_paths": [None]}, ("a.png",)),
        ({"images": ["a.png"], "image_paths": ["a.png"]}, ("a.png",)),
        ({"images": [], "image_paths": ["a.png"]}, ("a.png",)),
        ({"images": [{"bytes": None, "path": "a.png"}], "image_paths": ["a.png"]}, ("a.png",)),
        ({"images": ["a.png"], "image_paths": ["b.png"]}, r"image_paths must agree with images, got \['b.png'\]"),
        ({"image": "a.png", "image_paths": ["b.png"]}, "image_paths must agree with image, got"),
        ({"images": ["a.png", "b.png"], "image_paths": ["a.png"]}, "image_paths must name each of 2 images"),
        ({"images": ["a.png"], "image_paths": ["a.png", "b.png"]}, "image_paths must name each of 1 image"),
        ({"images": ["a.png"], "image_paths": "b.png"}, "image_paths must be a list"),
    ],
)
def test_image_paths_never_replace_other_images(row: dict[str, Any], images: Any, tmp_path: Path) -> None:
    pair = read_row(tmp_path, {"prompt": "q", "chosen": "c", "rejected": "r", **row})
    if isinstance(pair, Pair):
        assert pair.images == images
    else:
        assert re.search(images, pair.reason), pair.reason


def test_image_paths_are_those_of_bytes() -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r", "images": [{"bytes": b"x", "path": "x"}, {"path": "b.png"}]}
    row["prompt"] = "<image> <image>"
    assert from_trl({**row, "image_paths": ["/a.png", "b.png"]}).images == ("/a.png", "b.png")
    with pytest.raises(FieldError, match="image_paths must agree with images"):
        from_trl({**row, "image_paths": ["/a.png", "c.png"]})


@pytest.mark.parametrize("name", ["extra", "provenance"])
def test_a_column_of_another_program_is_named(name: str) -> None:
    row = {"prompt": "q", "chosen": "c", "rejected": "r"}
    for empty in ("", " ", None, {}):
        assert from_trl({**row, name: empty}) == Pair("q", "c", "r")
    for other in ("a note", "{", "[]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', 3):
        with pytest.raises(FieldError, match=f"^{name} must be an object in JSON, got"):
            from_trl({**row, name: other})


@pytest.mark.parametrize(
    "part",
    [
        PNG,
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png", "text": None},
        {"image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "input_image", "image_url": "a.png", "detail": "auto"},
        {"type": "image", "source": {"type": "url", "url": "a.png"}},
    ],
)
def test_the_image_of_a_part_is_taken(part: dict[str, Any], tmp_path: Path) -> None:
    row = {"prompt": [user([text("see "), part, text("q")])], **ANSWERS}
    assert read_row(tmp_path, row) == Pair("see <image>\nq", "c", "r", ("a.png",))


def test_the_bytes_of_a_part_are_stored(tmp_path: Path, images: Path, cache: Path) -> None:
    content = (images / "a.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    for part in (
        {"type": "image", "base64": encoded},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}},
    ):
        pair = read_row(tmp_path, {"prompt": [user([part, text("q")])], **ANSWERS})
        assert isinstance(pair, Pair)
        assert Path(pair.images[0]).parent == cache / "images"
        assert Path(pair.images[0]).read_bytes() == content


def test_images_of_parts_and_columns_keep_their_order(tmp_path: Path) -> None:
    prompt = [
        system("s"),
        user("1 <image>"),
        assistant("b"),
        user([{"type": "image"}, PNG, text("q"), {"type": "image"}]),
    ]
    pair = read_row(tmp_path, {"prompt": prompt, **ANSWERS, "images": ["1.png", "2.png", "3.png"]})
    assert isinstance(pair, Pair)
    assert pair.images == ("1.png", "2.png", "a.png", "3.png")
    contents = [turn["content"] for turn in pair.source["messages"]]
    assert contents == ["s", "1 <image>", "b", "<image>\n<image>\nq<image>\n"]
    assert pair.question == contents[-1]


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": [system("s"), user("q")], **ANSWERS}, Pair("q", "c", "r", extra=turns([system("s"), user("q")]))),
        ({"prompt": EARLIER, **ANSWERS}, Pair("q", "c", "r", extra=turns(EARLIER))),
        (
            {"prompt": [assistant("hi"), user("q")], **ANSWERS},
            Pair("q", "c", "r", extra=turns([assistant("hi"), user("q")])),
        ),
        (
            {"prompt": [{"role": "developer", "content": "s"}, user("q")], **ANSWERS},
            Pair("q", "c", "r", extra=turns([{"role": "developer", "content": "s"}, user("q")])),
        ),
        ({"chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]}, Pair("q", "c", "r")),
        (
            {"chosen": [*EARLIER, assistant("c")], "rejected": [*EARLIER, assistant("r")], "score": 1},
            Pair("q", "c", "r", extra={"score": 1, **turns(EARLIER)}),
        ),
        (
            {
                "chosen": [user("q"), assistant("c"), user("d"), assistant("e")],
                "rejected": [user("q"), assistant("r")],
            },
            Pair(
                "q",
                "c\n\nd\n\ne",
                "r",
                extra={"$source": {"chosen_messages": [assistant("c"), user("d"), assistant("e")]}},
            ),
        ),
        (
            {"prompt": "q", "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]},
            Pair("q", "c", "r"),
        ),
        (
            {"prompt": [user("q")], "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]},
            Pair("q", "c", "r"),
        ),
        ({"chosen": [human("q"), gpt("c")], "rejected": [human("q"), gpt("r")]}, Pair("q", "c", "r")),
        (
            {
                "chosen": {"role": ["user", "assistant"], "content": ["q", "c"]},
                "rejected": {"role": ["user", "assistant"], "content": ["q", "r"]},
            },
            Pair("q", "c", "r"),
        ),
        (
            {"chosen": [user([PNG, text("q")]), assistant("c")], "rejected": [user([PNG, text("q")]), assistant("r")]},
            Pair("<image>\nq", "c", "r", ("a.png",)),
        ),
        ({"prompt": [user("q")], "chosen": assistant("c"), "rejected": "r"}, Pair("q", "c", "r")),
        (
            {"prompt": "q", "chosen": "c", "rejected": "r", "question": "raw"},
            Pair("q", "c", "r", extra={"question": "raw"}),
        ),
    ],
)
def test_prompts_and_responses_of_several_turns(row: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    source = open_rows(tmp_path, [row])
    assert source.format == "trl"
    assert source.pairs[0] == pair


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"prompt": EARLIER[:2], **ANSWERS}, "bad field", "end with one message of the user"),
        ({"prompt": [user("q"), {"role": "tool", "content": "x"}], **ANSWERS}, "tools", "'user', 'tool'"),
        ({"prompt": [user("q")], **ANSWERS, "tools": [{"type": "function"}]}, "tools", "functions with a name"),
        (
            {"prompt": [user("q")], "chosen": [{"role": "assistant", "tool_calls": [1]}], "rejected": "r"},
            "tools",
            "tool_calls",
        ),
        ({"prompt": [user("q")], **ANSWERS, "system": "s"}, "bad field", "system must be empty"),
        (
            {"prompt": [user("q")], **ANSWERS, "chat_template_kwargs": {"enable_thinking": False}},
            "bad field",
            "chat_template_kwargs must be",
        ),
        ({"prompt": [user([{"type": "image"}, text("q")])], **ANSWERS}, "no image", "an image for each image part"),
        (
            {"prompt": [user([{"type": "image"}, text("q")])], **ANSWERS, "images": ["a", "b"]},
            "bad field",
            "no or 2 places",
        ),
        ({"prompt": [user([{"type": "image", "image": "a", "path": "b"}])], **ANSWERS}, "bad field", "name one image"),
        (
            {"prompt": [user([{"type": "video"}])], **ANSWERS},
            "video or audio",
            "must have a video for each place of a video",
        ),
        ({"prompt": [user([{"type": "input_audio", "input_audio": {}}])], **ANSWERS}, "video or audio", "blocks"),
        (
            {"prompt": [user([{**PNG, "max_pixels": 9}, text("q")])], **ANSWERS},
            "bad field",
            "the field 'max_pixels' 9",
        ),
        (
            {"prompt": [user("q")], "chosen": [assistant([PNG])], "rejected": "r"},
            "bad field",
            "must be without images",
        ),
        ({"prompt": [{**user("q"), "name": "Ada"}], **ANSWERS}, "bad field", "the field 'name' 'Ada'"),
        (
            {"prompt": "p", "chosen": [user("q"), assistant("c")], "rejected": [user("q"), assistant("r")]},
            "bad field",
            "prompt must agree",
        ),
        (
            {"chosen": [user("q"), assistant("c"), user("d")], "rejected": [user("q"), assistant("r")]},
            "bad field",
            "chosen must",
        ),
        ({"chosen": [user("q"), assistant("c")], "rejected": [user("p"), assistant("r")]}, "bad field", "chosen must"),
        (
            {"prompt": [user("q")], **ANSWERS, "images": ["a.png", None]},
            "bad field",
            "objects with bytes, path or url",
        ),
        ({"prompt": [user("q")], **ANSWERS, "images": [["1.png", "2.png"]]}, "bad field", "got list"),
        ({"prompt": [system("s"), user([PNG, text("<image>")])], **ANSWERS}, "bad field", "0 or 1 times"),
    ],
)
def test_a_row_that_cannot_mean_what_it_says_is_refused(
    row: dict[str, Any], kind: str, words: str, tmp_path: Path
) -> None:
    bad = read_row(tmp_path, row, format="trl")
    assert isinstance(bad, BadLine), bad
    assert (bad.kind, words in bad.reason) == (kind, True), bad.reason


def test_turns_survive_conversion(tmp_path: Path, images: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    rows = [
        {
            "prompt": [system("s"), user("1: <image> there"), assistant("b"), user("<image>q")],
            "chosen": [assistant("c"), user("d"), assistant("e")],
            "rejected": "r",
            "images": ["a.png", "sub/b.jpg"],
        },
        {"prompt": EARLIER, **ANSWERS},
        {"prompt": "one turn <image>", **ANSWERS, "image": "a.png"},
    ]
    source = open_rows(images, rows)
    pairs = [source.read(index)[1] for index in range(3)]
    place: Any = source
    for name, format in (
        ("1.jsonl", "pairs"),
        ("2.jsonl", "trl"),
        ("3", "hf"),
        ("4.jsonl", "trl"),
        ("5.jsonl", "pairs"),
    ):
        count, skipped = convert(place, tmp_path / name, format, kind="conversational")  # type: ignore[arg-type]
        assert (count, skipped.total) == (3, 0)
        place = open_pairs(tmp_path / name)
        assert [place.read(index)[1] for index in range(3)] == pairs
    row = json.loads((tmp_path / "2.jsonl").read_text().splitlines()[0])
    assert [block["type"] for block in row["prompt"][1]["content"]] == ["text", "image", "text"]
    assert [turn["role"] for turn in row["chosen"]] == ["assistant", "user", "assistant"]


def test_edited_turns_take_precedence(tmp_path: Path) -> None:
    row = to_trl(open_rows(tmp_path, [{"prompt": EARLIER, **ANSWERS}]).pairs[0], "conversational")
    row["prompt"][0]["content"][0]["text"] = "edited"
    assert from_trl(row).source["messages"][0]["content"] == "edited"
    row["prompt"] = row["prompt"][-1:]
    assert from_trl(row) == Pair("q", "c", "r")


def test_text_pairs_have_no_column_of_images(tmp_path: Path, images: Path) -> None:
    source = open_rows(images, [{"prompt": "q", "chosen": "c", "rejected": "r"}])
    for kind in KINDS:
        convert(source, tmp_path / f"{kind}.jsonl", "trl", kind=kind)  # type: ignore[arg-type]
        assert "images" not in json.loads((tmp_path / f"{kind}.jsonl").read_text())
        assert next(iter(open_pairs(tmp_path / f"{kind}.jsonl").pairs)) == Pair("q", "c", "r")
    with pytest.raises(ValueError, match="has_images must be True for a pair with images"):
        to_trl(Pair("q", "c", "r", ("a.png",)), has_images=False)


@pytest.mark.parametrize("prompt", [None, [], ...])
def test_a_row_without_a_prompt_is_refused_as_such(prompt: Any) -> None:
    turns = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    with pytest.raises(FieldError, match=r"^prompt must be text or messages, got none$"):
        from_trl(turns if prompt is ... else {"prompt": prompt, **turns})


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("q", "<image><image>q"),
        ("a <image> b <image>", "a <image> b <image>"),
        ("<image 2> <image 1>", "<image> <image>"),
    ],
)
def test_a_text_with_several_images_and_no_mark_has_them_in_front(prompt: str, question: str, images: Path) -> None:
    pair = read_row(images, {"prompt": prompt, "chosen": "c", "rejected": "r", "images": ["a.png", "sub/b.jpg"]})
    assert pair.question == question
    assert place_problem(pair) is None


def test_messages_without_marks_have_several_images_in_front_of_the_first_user_turn(images: Path) -> None:
    prompt = [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r")]
    row = {
        "prompt": prompt,
        "chosen": [assistant("c")],
        "rejected": [assistant("d")],
        "images": ["a.png", "sub/b.jpg"],
    }
    pair = read_row(images, row)
    assert [turn["content"] for turn in pair.source["messages"]] == ["s", "<image><image>q", "a", "r"]
    assert place_problem(pair) is None

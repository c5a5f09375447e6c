"""Tests rows of LLaMA-Factory, ms-swift, OpenAI and RLAIF-V, and the detection of the format from the fields."""

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from rows import assistant, gpt, human, open_rows, read_row, system, text, user

from mpo_ext.cli import data as cli_data
from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.formats import FORMATS, WRITABLE, row_format
from mpo_ext.train.source_recipe import SourceRecipe

SEVERAL = [user("a"), assistant("b"), user("q")]
FIRST = {"chosen": "c", "rejected": "r"}


def turns(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"$source": {"messages": list(messages), **more}}


ROWS: list[tuple[str, dict[str, Any], Pair]] = [
    (
        "sharegpt",
        {"conversations": [human("<image>q")], "chosen": gpt("c"), "rejected": gpt("r"), "images": ["a.png"]},
        Pair("<image>q", "c", "r", ("a.png",)),
    ),
    (
        "sharegpt",
        {"conversations": [human("a"), gpt("b"), human("q")], "system": "s", **FIRST, "id": 7},
        Pair("q", "c", "r", extra={"id": 7, **turns(system("s"), *SEVERAL)}),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "s"}, human("q")], **FIRST, "images": None, "tools": ""},
        Pair("q", "c", "r", extra=turns(system("s"), user("q"))),
    ),
    (
        "sharegpt",
        {"messages": SEVERAL, "chosen": assistant("c"), "rejected": assistant("r")},
        Pair("q", "c", "r", extra=turns(*SEVERAL)),
    ),
    (
        "sharegpt",
        {"conversation": [{"human": "a", "assistant": "b"}, {"human": "q"}], **FIRST},
        Pair("q", "c", "r", extra=turns(*SEVERAL)),
    ),
    (
        "sharegpt",
        {"conversations": [human("q")], "chosen": [gpt("c"), human("d"), gpt("e")], "rejected": [gpt("r")]},
        Pair(
            "q",
            "c\n\nd\n\ne",
            "r",
            extra={"$source": {"chosen_messages": [assistant("c"), user("d"), assistant("e")]}},
        ),
    ),
    ("alpaca", {"instruction": "i", "input": "j", **FIRST}, Pair("i\nj", "c", "r")),
    ("alpaca", {"instruction": "i", "input": "", "system": "", "history": [], **FIRST}, Pair("i", "c", "r")),
    (
        "alpaca",
        {"instruction": "q", **FIRST, "system": "s", "history": [["a", "b"]], "images": ["a.png"]},
        Pair("q", "c", "r", ("a.png",), extra=turns(system("s"), *SEVERAL)),
    ),
    ("swift", {"messages": [user("q"), assistant("c")], "rejected_response": "r"}, Pair("q", "c", "r")),
    (
        "swift",
        {"messages": [system("s"), *SEVERAL, assistant("c")], "rejected_response": ["r"], "margin": 0.5},
        Pair("q", "c", "r", extra={"margin": 0.5, **turns(system("s"), *SEVERAL)}),
    ),
    (
        "swift",
        {
            "messages": [user("<image>q"), assistant("c")],
            "rejected_response": [assistant("r")],
            "images": [{"bytes": None, "path": "a.png"}],
        },
        Pair("<image>q", "c", "r", ("a.png",)),
    ),
    (
        "swift",
        {"messages": [*SEVERAL, assistant("c")], "rejected_messages": [*SEVERAL, assistant("r")]},
        Pair("q", "c", "r", extra=turns(*SEVERAL)),
    ),
    (
        "swift",
        {
            "messages": [user("q"), assistant("c")],
            "rejected_response": "",
            "rejected_messages": [user("q"), assistant("r")],
        },
        Pair("q", "c", "r"),
    ),
    (
        "swift",
        {"query": "q", "response": "c", "rejected_response": "r", "history": [["a", "b"]], "images": ["a.png"]},
        Pair("q", "c", "r", ("a.png",), extra=turns(*SEVERAL)),
    ),
    (
        "openai",
        {
            "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("c")],
            "non_preferred_output": [assistant("r")],
        },
        Pair("q", "c", "r"),
    ),
    (
        "openai",
        {
            "input": {"messages": [system("s"), *SEVERAL]},
            "preferred_output": [assistant([text("c")])],
            "non_preferred_output": [assistant("r")],
            "metadata": {"id": "x"},
        },
        Pair("q", "c", "r", extra={"metadata": {"id": "x"}, **turns(system("s"), *SEVERAL)}),
    ),
    (
        "openai",
        {
            "input": {
                "messages": [user([text("q"), {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}])]
            },
            "preferred_output": [assistant("c")],
            "non_preferred_output": [assistant("r")],
        },
        Pair("q<image>\n", "c", "r", ("a.png",)),
    ),
    (
        "rlaif-v",
        {
            "ds_name": "d",
            "image": "a.png",
            "question": "q",
            **FIRST,
            "origin_dataset": "o",
            "origin_split": "{}",
            "idx": "0",
            "image_path": "x/a.png",
        },
        Pair(
            "q",
            "c",
            "r",
            ("a.png",),
            provenance={
                "ds_name": "d",
                "origin_dataset": "o",
                "origin_split": "{}",
                "idx": "0",
                "image_path": "x/a.png",
            },
        ),
    ),
    (
        "rlaif-v",
        {"question": "q", **FIRST, "image": {"path": "a.png"}, "answer_gt": "2"},
        Pair("q", "c", "r", ("a.png",), "2"),
    ),
    ("rlaif-v", {"question": "q", **FIRST, "system": "s"}, Pair("q", "c", "r", extra=turns(system("s"), user("q")))),
    (
        "rlaif-v",
        {"question": "q", **FIRST, "images": ["a.png", "b.png"], "id": 3},
        Pair("q", "c", "r", ("a.png", "b.png"), extra={"id": 3}),
    ),
    ("pairs", {"question": "q", **FIRST, "extra": turns(*SEVERAL)}, Pair("q", "c", "r", extra=turns(*SEVERAL))),
    (
        "pairs",
        {"question": "q", **FIRST, **dict.fromkeys(("images", "videos", "rejected_images", "provenance", "extra"))},
        Pair("q", "c", "r"),
    ),
]


@pytest.mark.parametrize(("format", "row", "pair"), ROWS)
def test_a_row_is_detected_and_read(format: str, row: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    source = open_rows(tmp_path, [row])
    assert source.format == format
    assert source.pairs[0] == pair
    assert open_rows(tmp_path, [row], format=format).pairs[0] == pair


BAD_ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("sharegpt", {"conversations": [human("q"), gpt("a")], **FIRST}, "bad field", "end with one message of the user"),
    ("sharegpt", {"conversations": [human("q"), human("q")], **FIRST}, "bad field", "turns .* that alternate"),
    (
        "sharegpt",
        {"conversations": [human("q"), {"from": "function_call", "value": "{}"}], **FIRST},
        "tools",
        "function",
    ),
    (
        "sharegpt",
        {"conversations": [human("q"), {"from": "observation", "value": "{}"}], **FIRST},
        "tools",
        "'user', 'tool'",
    ),
    ("sharegpt", {"conversations": [human("q")], **FIRST, "tools": "[{}, 1]"}, "tools", "functions with a name"),
    (
        "sharegpt",
        {"conversations": [human("q")], **FIRST, "tools": "[{"},
        "tools",
        "tools must be a list of functions",
    ),
    ("sharegpt", {"conversations": [human("q")], "chosen": gpt("c")}, "bad field", "rejected must be given"),
    ("sharegpt", {"conversations": [human("q")], "messages": [user("q")], **FIRST}, "bad field", "given once"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "q"}], **FIRST}, "bad field", "got the role 'alien'"),
    (
        "sharegpt",
        {"conversations": [human("<image><image>q")], **FIRST, "images": ["a.png"]},
        "no image",
        "2 parts or more",
    ),
    ("sharegpt", {"conversations": [human("<image>q")], **FIRST, "images": ["a", "b"]}, "bad field", "no or 2 places"),
    ("sharegpt", {"conversations": [human("q")], **FIRST, "clip": ["a.mp4"]}, "unread field", "'clip'"),
    ("sharegpt", {"conversations": [human("<video>q")], **FIRST}, "video or audio", "must have a video"),
    ("alpaca", {"instruction": "q", "chosen": "c", "output": "d"}, "bad field", "rejected must be given"),
    ("alpaca", {"instruction": ["q"], **FIRST}, "bad field", "instruction must be text"),
    (
        "alpaca",
        {"instruction": "q", "history": [["a"]], **FIRST},
        "bad field",
        "history must hold lists of a question",
    ),
    ("alpaca", {"instruction": "q", "system": ["s"], **FIRST}, "bad field", "system must be text"),
    (
        "swift",
        {"messages": [user("q"), assistant("c")], "rejected_response": ["r", "s"]},
        "bad field",
        "one row for each",
    ),
    (
        "swift",
        {"messages": [user("q"), assistant("c")], "rejected_response": None},
        "bad field",
        "rejected_messages must be",
    ),
    (
        "swift",
        {"messages": [user("q")], "rejected_response": "r"},
        "bad field",
        "messages must be text or one message",
    ),
    (
        "swift",
        {"messages": [user("q"), assistant("c")], "rejected_response": [user("r")]},
        "bad field",
        "rejected_response",
    ),
    (
        "swift",
        {"messages": [user("q"), assistant("c")], "rejected_response": "r", "rejected_images": ["b.png"]},
        "bad field",
        "rejected_images must be one for each of the 0 images",
    ),
    (
        "swift",
        {"messages": [user("q"), assistant("c")], "rejected_response": "r", "objects": {"bbox": [[1, 2]]}},
        "bad field",
        "objects must be empty",
    ),
    (
        "swift",
        {"messages": [user("q"), {"role": "tool_call", "content": "{}"}], "rejected_response": "r"},
        "tools",
        "function call in JSON",
    ),
    (
        "swift",
        {"messages": [user("q"), {**assistant("c"), "loss": False}], "rejected_response": "r"},
        "bad field",
        "'loss'",
    ),
    ("swift", {"query": ["q"], "response": "c", "rejected_response": "r"}, "bad field", "query must be text"),
    (
        "openai",
        {
            "input": {"messages": [user("q")], "tools": [{"type": "function"}]},
            "preferred_output": [assistant("c")],
            "non_preferred_output": [assistant("r")],
        },
        "tools",
        "input.tools must be functions",
    ),
    (
        "openai",
        {
            "input": {"messages": [user("q")]},
            "preferred_output": [{"role": "assistant", "tool_calls": [{"id": 1}]}],
            "non_preferred_output": [assistant("r")],
        },
        "tools",
        "tool_calls must have a function",
    ),
    (
        "openai",
        {"input": "q", "preferred_output": [assistant("c")], "non_preferred_output": [assistant("r")]},
        "bad field",
        "input must be an object with messages",
    ),
    (
        "openai",
        {
            "input": {"messages": [user("q")]},
            "preferred_output": [{**assistant("c"), "weight": 0}],
            "non_preferred_output": [assistant("r")],
        },
        "bad field",
        "got the field 'weight' 0",
    ),
    (
        "rlaif-v",
        {
            "question": "q",
            **FIRST,
            "image": {"path": None},
            "image_path": "a.png",
            "ds_name": "d",
            "origin_dataset": "o",
        },
        "unread field",
        "'image_path'",
    ),
    (
        "rlaif-v",
        {"question": "q", **FIRST, "image": "a.png", "images": ["b.png"]},
        "bad field",
        "must not both be given",
    ),
    ("rlaif-v", {"question": "q", **FIRST, "image": {"bytes": "AAAA"}}, "bad field", "bytes must be binary"),
    ("trl", {"prompt": "q", **FIRST, "system_prompt": "s"}, "bad field", "system_prompt must be empty"),
    ("mmpr", {"question": "q", **FIRST, "system_prompt": "s"}, "bad field", "system_prompt must be empty"),
]


@pytest.mark.parametrize(("format", "row", "kind", "words"), BAD_ROWS)
def test_a_row_that_cannot_mean_what_it_says_is_refused(
    format: str, row: dict[str, Any], kind: str, words: str, tmp_path: Path
) -> None:
    bad = read_row(tmp_path, row, format=format)
    assert isinstance(bad, BadLine), bad
    assert bad.kind == kind
    assert re.search(words, bad.reason), bad.reason
    assert str(bad).startswith(f"{tmp_path / 'rows.jsonl'}:1: ")


def test_a_field_that_does_not_matter_can_be_ignored(tmp_path: Path) -> None:
    row = {"messages": [user("q"), {**assistant("c"), "loss": True}], "rejected_response": "r", "image_id": 5}
    assert read_row(tmp_path, row, ignore=("loss", "image_id")) == Pair("q", "c", "r")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": 1}, r"got 'text' \(str\), 'label' \(int\) in .*rows.jsonl:1: a row has chosen"),
        ({"chosen": "a b", "rejected": "a c"}, r"got 'chosen' \(str\), 'rejected' \(str\) in"),
        ({"output": ["a", "b"], "input": "q"}, r"got 'output' \(list\)"),
        ({"response_a": "a", "response_b": "b", "preference": 1}, "got 'response_a'"),
        ({}, "got no fields in"),
    ],
)
def test_an_undecided_format_lists_what_was_found(row: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"format must be clear from the fields, {words}"):
        open_rows(tmp_path, [row])


def test_every_format_has_a_detected_row() -> None:
    detected = {row_format(row) for _, row, _ in ROWS}
    assert detected | {"mmpr", "pairs", "trl", "hf"} == set(FORMATS)


@pytest.mark.parametrize("first", [ROWS[0], ROWS[6], ROWS[9], ROWS[14], ROWS[17]])
def test_a_file_of_two_formats_gives_bad_lines(first: tuple[str, dict[str, Any], Pair], tmp_path: Path) -> None:
    format, row, pair = first
    for other_format, other, _ in ROWS:
        if other_format != format:
            results = [result for _, result in open_rows(tmp_path, [row, other]).pairs.scan()]
            assert results[0] == pair
            assert isinstance(results[1], BadLine), (format, other)


def test_pairs_that_differ_only_in_turns_have_different_keys(tmp_path: Path) -> None:
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt in ([user("q")], [system("s"), user("q")], [system("t"), user("q")], SEVERAL)
        for chosen in ([assistant("a\n\nb\n\nc")], [assistant("a"), user("b"), assistant("c")])
        for rejected in ([assistant("x\n\ny\n\nz")], [assistant("x"), user("y"), assistant("z")])
    ]
    pairs = list(open_rows(tmp_path, rows).pairs)
    assert len({(pair.question, pair.chosen, pair.rejected) for pair in pairs}) == 1
    assert len({pair.key() for pair in pairs}) == len(rows)
    assert Pair("q", "c", "r").key() == Pair("q", "c", "r", extra={"$source": {"subset": "x"}}).key()


def test_a_data_url_is_cut_in_messages(tmp_path: Path) -> None:
    url = "data:image/png;base64," + "A" * 100_000
    rows = [
        {"prompt": "q", **FIRST, "picture": url},
        {"prompt": [user([{"type": "video", "video": url}])], **FIRST},
        {"prompt": [user([{"type": "image", "image": url, "max_pixels": url}])], **FIRST},
        {"prompt": "q", "chosen": [user(url)], "rejected": "r"},
        {"prompt": "q", **FIRST, "images": [[url]]},
        {"prompt": "<image>", **FIRST, "image": None, "extra": url},
    ]
    for _, bad in open_rows(tmp_path, rows).pairs.scan():
        assert isinstance(bad, BadLine)
        assert len(bad.reason) < 400
        assert not re.search("A{81}", str(bad))
    with pytest.raises(ValueError, match="format must be clear") as error:
        open_rows(tmp_path, [{url: 1}])
    assert len(str(error.value)) < 1000


def test_open_pairs_reads_the_rows_of_a_file_with_relative_images(tmp_path: Path, images: Path) -> None:
    source = open_rows(images, [row for format, row, _ in ROWS if format == "sharegpt"])
    assert source.read(0)[1].images == (str(images / "a.png"),)
    assert open_pairs(source.path).format == "sharegpt"


def test_the_command_and_the_recipe_know_all_formats() -> None:
    recipe = load_recipe_formats()
    assert cli_data._FORMATS == FORMATS == recipe
    assert cli_data._WRITABLE == WRITABLE


def load_recipe_formats() -> tuple[str, ...]:
    (literal, _) = get_args(get_type_hints(SourceRecipe)["format"])
    return get_args(literal)

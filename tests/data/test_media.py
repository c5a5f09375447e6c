"""Tests rows with unsupported images, videos or audio, such as an image in an unknown field.

Every command must reject and count these rows.
"""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import GOOD, run_data
from rows import assistant, open_rows, read_row, user

from mpo_ext.data import BadLine, Pair, open_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.data.convert import convert
from mpo_ext.data.media import is_empty
from mpo_ext.data.stats import collect_stats
from mpo_ext.data.view import write_view

TEXT: dict[str, dict[str, Any]] = {
    "mmpr": {"question": "q", "chosen": "c", "rejected": "r"},
    "trl": {"prompt": "q", "chosen": "c", "rejected": "r"},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}], "chosen": "c", "rejected": "r"},
    "alpaca": {"instruction": "q", "chosen": "c", "rejected": "r"},
    "swift": {"messages": [user("q"), assistant("c")], "rejected_response": "r"},
    "openai": {
        "input": {"messages": [user("q")]},
        "preferred_output": [assistant("c")],
        "non_preferred_output": [assistant("r")],
    },
    "rlaif-v": {"question": "q", "chosen": "c", "rejected": "r"},
}


@pytest.mark.parametrize("format", TEXT)
@pytest.mark.parametrize(
    "field",
    [
        {"image_path": "a.png"},
        {"image_file": "a.png"},
        {"img": "a.png"},
        {"Picture": {"url": "a.png"}},
        {"photo_url": ["a.png"]},
        {"pixel_values": [[0.5]]},
        {"video_path": "a.mp4"},
        {"videos_url": ["a.mp4"]},
        {"audio": {"path": "a.wav"}},
        {"audios": ["a.wav"]},
        {"image_id": 17},
        {"meta": {"image_url": "a.png"}},
    ],
)
def test_a_field_that_may_be_an_image_is_refused_by_name(format: str, field: dict[str, Any], tmp_path: Path) -> None:
    bad = read_row(tmp_path, {**TEXT[format], **field}, format=format)
    assert isinstance(bad, BadLine), bad
    assert bad.kind == "unread field"
    (name,) = field
    assert f"got the field '{name}" in bad.reason
    pair = read_row(tmp_path, {**TEXT[format], **field}, format=format, ignore=[name])
    assert isinstance(pair, Pair)
    assert name not in pair.extra


@pytest.mark.parametrize("format", TEXT)
def test_empty_fields_and_other_names_are_kept(format: str, tmp_path: Path) -> None:
    more = {
        "image_path": None,
        "video_path": [],
        "img": "",
        "has_image": False,
        "n_images": 0,
        "topic": "x",
        "epic_id": 1,
    }
    pair = read_row(tmp_path, {**TEXT[format], **more}, format=format)
    assert isinstance(pair, Pair), pair
    assert pair.extra.items() >= more.items()


def test_numbers_beside_an_image_are_kept(tmp_path: Path) -> None:
    row = {**TEXT["trl"], "image": "a.png", "image_id": 5, "image_width": 640.0, "meta": {"image_url": "a.png"}}
    pair = read_row(tmp_path, row)
    assert isinstance(pair, Pair)
    assert pair.extra == {"image_id": 5, "image_width": 640.0, "meta": {"image_url": "a.png"}}
    bad = read_row(tmp_path, {**row, "second_image": "b.png"})
    assert isinstance(bad, BadLine)


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.mark.parametrize("format", TEXT)
@pytest.mark.parametrize(
    "field",
    [
        {"figure": "a.png"},
        {"file_name": "train/0001.JPG"},
        {"filename": "my chart.webp"},
        {"path": "/data/a.tiff"},
        {"path": "my data/a b.png"},
        {"media": ["notes.txt", "clip.mp4"]},
        {"visual_input": {"file": ["a.png"]}},
        {"attachments": [{"type": "file", "name": "speech.wav"}]},
        {"context": "https://host/a.png?size=large#top"},
        {"context": "https://host/get?file=a.png"},
        {"figures": "['a.png', 'b.png']"},
        {"figures": '["a.png"]'},
        {"context": "data:image/png;base64,AAAA"},
        {"context": "data:audio/wav;base64,AAAA"},
        {"context": PNG},
        {"context": {"bytes": "x", "path": None}},
        {"context": {"bytes": None, "path": "a"}},
    ],
)
def test_a_value_that_is_an_image_is_refused_by_the_name_of_its_field(
    format: str, field: dict[str, Any], tmp_path: Path
) -> None:
    bad = read_row(tmp_path, {**TEXT[format], **field}, format=format)
    assert isinstance(bad, BadLine), bad
    (name,) = field
    assert (bad.kind, f"got the field '{name}" in bad.reason) == ("unread field", True)
    assert "ignore" in bad.reason
    assert len(bad.reason) < 350
    assert isinstance(read_row(tmp_path, {**TEXT[format], **field}, format=format, ignore=[name]), Pair)


def test_a_value_inside_extra_is_checked(tmp_path: Path) -> None:
    bad = read_row(tmp_path, {**TEXT["mmpr"], "images": [], "extra": {"figure": "a.png"}}, format="pairs")
    assert isinstance(bad, BadLine), bad
    assert "got the field 'figure' 'a.png'" in bad.reason
    bad = read_row(tmp_path, {**TEXT["trl"], "extra": '{"figure": "a.png"}'})
    assert isinstance(bad, BadLine), bad


@pytest.mark.parametrize("format", TEXT)
@pytest.mark.parametrize(
    "field",
    [
        {"context": "What does the program write to a.png"},
        {"context": "Open a.png, then b.png."},
        {"context": "[1] Smith (2020) writes a.png"},
        {"extension": ".png"},
        {"type": "image/png"},
        {"source_file": "x.json"},
        {"file_name": "train.parquet"},
        {"stats": {"bytes": 1024, "path": "x.json"}},
        {"hash": "9" * 64},
        {"url": "https://host/page.html"},
        {"provenance": {"file": "a.png"}},
        {"key": "Qk" + "b" * 80},
    ],
)
def test_values_that_are_no_image_are_kept(format: str, field: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(pair := read_row(tmp_path, {**TEXT[format], **field}, format=format), Pair), pair


def test_values_beside_an_image_are_kept(tmp_path: Path) -> None:
    more = {"source_file": "x.json", "file_name": "a.png", "meta": {"path": "old/a.png"}}
    pair = read_row(tmp_path, {**TEXT["trl"], "image": "a.png", **more})
    assert isinstance(pair, Pair), pair
    assert pair.extra == more


@pytest.mark.parametrize(
    "field",
    [
        {"figure": "b.png"},
        {"meta": {"path": "old/b.png"}},
        {"context": ["a.png", "clip.mp4"]},
        {"context": "https://host/b.png"},
        {"context": "data:image/png;base64,AAAA"},
        {"context": {"bytes": "x", "path": "a.png"}},
    ],
)
def test_another_image_beside_an_image_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    row = {**TEXT["trl"], "image": "a.png", **field}
    bad = read_row(tmp_path, row)
    assert isinstance(bad, BadLine), bad
    (name,) = field
    assert (bad.kind, f"got the field '{name}" in bad.reason) == ("unread field", True)
    assert isinstance(read_row(tmp_path, row, ignore=[name]), Pair)


@pytest.mark.parametrize("name", ["picture", "figure", "jpg", "png", "meta"])
@pytest.mark.parametrize("has_image", [False, True])
def test_bytes_in_a_column_are_refused_by_its_name(name: str, has_image: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    value = {"part": [b"\x89PNG"]} if name == "meta" else {"bytes": b"\x89PNG", "path": None}
    row = {**TEXT["trl"], name: value, **({"image": "a.png"} if has_image else {})}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "d")
    _, bad = open_pairs(tmp_path / "d").read(0)
    assert isinstance(bad, BadLine), bad
    assert (bad.kind, f"got the field '{name}" in bad.reason) == ("unread field", True)
    assert isinstance(open_pairs(tmp_path / "d", ignore=[name]).read(0)[1], Pair)


@pytest.mark.parametrize("path", [None, "0001.png", "other.png"])
def test_file_name_beside_bytes_names_their_image(path: str | None, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    content = base64.b64decode(PNG)
    row = {**TEXT["trl"], "image": {"bytes": content, "path": path}, "file_name": "train/0001.png"}
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "d")
    _, pair = open_pairs(tmp_path / "d", image_dir=tmp_path / "stored").read(0)
    assert isinstance(pair, Pair), pair
    assert pair.extra == {"file_name": "train/0001.png"}
    assert [Path(image).read_bytes() for image in pair.images] == [content]
    datasets.Dataset.from_list([{**row, "figure": "b.png"}]).save_to_disk(tmp_path / "e")
    _, bad = open_pairs(tmp_path / "e", image_dir=tmp_path / "stored").read(0)
    assert isinstance(bad, BadLine)
    assert "got the field 'figure' 'b.png', which is not read" in bad.reason


def test_file_name_beside_a_data_url_names_its_image(tmp_path: Path) -> None:
    row = {**TEXT["trl"], "image": f"data:image/png;base64,{PNG}", "file_name": "train/0001.png"}
    assert isinstance(read_row(tmp_path, row), Pair)
    for other in ({"image": "a.png"}, {"file_name": PNG}, {"file_name": "data:image/png;base64,AAAA"}):
        bad = read_row(tmp_path, {**row, **other})
        assert isinstance(bad, BadLine), other
        assert "got the field 'file_name'" in bad.reason


def test_the_path_in_an_unread_field_is_shown_whole(tmp_path: Path) -> None:
    path = f"/{'long/' * 40}a.png"
    bad = read_row(tmp_path, {**TEXT["trl"], "figure": path})
    assert isinstance(bad, BadLine)
    assert f"got the field 'figure' '{path}'" in bad.reason


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("message", [{"role": "assistant", "content": "c"}, {"from": "gpt", "value": "c"}])
@pytest.mark.parametrize("is_list", [False, True])
def test_responses_that_are_messages_written_as_text_are_refused(
    write: Any, message: dict[str, str], is_list: bool, tmp_path: Path
) -> None:
    text = write([message] if is_list else message)
    for format in ("trl", "mmpr", "rlaif-v", "alpaca"):
        bad = read_row(tmp_path, {**TEXT[format], "chosen": text, "rejected": text}, format=format)
        assert isinstance(bad, BadLine), bad
        assert "chosen and rejected must not be messages that were written as text" in bad.reason
        admin = {**TEXT[format], **dict.fromkeys(("chosen", "rejected"), write({"role": "admin", "content": "x"}))}
        assert isinstance(read_row(tmp_path, admin, format=format), Pair)
        for other in ("r", text + ".", '{"name": "f", "role": 3', '{"role": 1, "role2": }'):
            assert isinstance(
                read_row(tmp_path, {**TEXT[format], "chosen": text, "rejected": other}, format=format), Pair
            )


def test_empty_values() -> None:
    assert all(map(is_empty, (None, "", [], {}, 0, False, [None, ""], {"bytes": None, "path": None}, [[], {}])))
    assert not any(map(is_empty, ("a", ["", "a"], {"bytes": b"x"}, 1, [0, 1])))


QUESTIONS = {
    "mmpr": lambda q: {**GOOD, "question": q, "image": ""},
    "pairs": lambda q: {**TEXT["mmpr"], "question": q, "images": []},
    "trl": lambda q: {**TEXT["trl"], "prompt": q, "image": None},
    "sharegpt": lambda q: {**TEXT["sharegpt"], "conversations": [{"from": "human", "value": q}]},
    "alpaca": lambda q: {**TEXT["alpaca"], "input": q, "images": None},
    "swift": lambda q: {**TEXT["swift"], "messages": [user("a"), assistant("b"), user(q), assistant("c")]},
    "openai": lambda q: {**TEXT["openai"], "input": {"messages": [{"role": "system", "content": q}, user("q")]}},
    "rlaif-v": lambda q: {**TEXT["rlaif-v"], "question": q, "image": {"bytes": None, "path": None}},
}


@pytest.mark.parametrize("format", QUESTIONS)
@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("<image>\nq", "no image"),
        ("see <image> here", "no image"),
        ("<video>q", "video or audio"),
        ("q <audio>", "video or audio"),
        ("q <|audio_1|>", "video or audio"),
        ("<AUDIO>q", "video or audio"),
        ("<|video_pad|>q", "video or audio"),
        ("<Video>q", "video or audio"),
    ],
)
def test_a_mark_without_its_file_is_refused(format: str, question: str, kind: str, tmp_path: Path) -> None:
    bad = read_row(tmp_path, QUESTIONS[format](question), format=format)
    assert isinstance(bad, BadLine), bad
    assert bad.kind == kind


@pytest.mark.parametrize("format", TEXT)
def test_a_mark_in_a_response_is_refused(format: str, tmp_path: Path) -> None:
    for name in ("chosen", "rejected"):
        row = json.loads(json.dumps(TEXT[format]).replace('"c"' if name == "chosen" else '"r"', '"see <image>"'))
        bad = read_row(tmp_path, row, format=format)
        assert isinstance(bad, BadLine), bad
        assert bad.kind in ("image in response", "no image")
        assert f"{name} must not hold <image>" in bad.reason or format == "swift"


ROWS = [
    {**TEXT["trl"], "image": "a.png"},
    {**TEXT["trl"], "prompt": "<image> q"},
    {**TEXT["trl"], "clips": ["a.mp4"]},
    {**TEXT["trl"], "chosen": "<image>"},
    {**TEXT["trl"], "tools": [{"type": "function"}]},
]
COUNTS = {"no image": 1, "unread field": 1, "image in response": 1, "tools": 1}


def test_every_command_counts_the_refused_lines(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_rows(images, ROWS)
    assert check_pairs(source).totals() == COUNTS
    assert collect_stats(source)["rows"].skipped == 4
    assert write_view(tmp_path / "v.html", source)[1].counts == COUNTS
    with pytest.raises(BadLine, match=r"rows.jsonl:2: no image"):
        convert(source, tmp_path / "out.jsonl", "pairs")
    count, skipped = convert(source, tmp_path / "out.jsonl", "pairs", skip_bad=True)
    assert (count, skipped.counts) == (1, COUNTS)
    assert run_data("check", source.path, "--json", tmp_path / "r.json") == 1
    assert "rows.jsonl:3: unread field: images must be in image or images" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["findings"]["rows"] == COUNTS


def test_the_trainer_and_its_dry_run_count_the_refused_lines(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mpo_ext.cli.train import open_mixtures, print_data
    from mpo_ext.train.mixture import Mixture
    from mpo_ext.train.recipe import load_recipe

    path = open_rows(images, ROWS).path
    (images / "r.yaml").write_text(f"model: {{path: m}}\ndata: {{train: {path}}}\noutput: {{dir: out}}\n")
    recipe = load_recipe(images / "r.yaml", [])
    mixture = Mixture(recipe.data.train)
    assert [type(pair) for pair in mixture] == [Pair, *[BadLine] * 4]
    (overview,) = mixture.inspect()
    assert (overview.bad, overview.with_images) == (4, 1)
    assert print_data(recipe, open_mixtures(recipe)) is False
    out = capsys.readouterr().out
    assert "4 lines hold NO PAIR" in out
    assert "rows.jsonl:2: no image: question must hold <image> 0 times for 0 images" in out


def test_the_dry_run_counts_wrong_places(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mpo_ext.cli.train import open_mixtures, print_data
    from mpo_ext.train.mixture import Mixture
    from mpo_ext.train.recipe import load_recipe

    row = {**TEXT["trl"], "image": "a.png"}
    two = {**TEXT["trl"], "images": ["a.png", "sub/b.jpg"]}
    rows = [row, {**row, "prompt": "<image> or <image>?"}, {**two, "prompt": "one <image>"}, two]
    path = open_rows(images, rows).path
    (images / "r.yaml").write_text(f"model: {{path: m}}\ndata: {{train: {path}}}\noutput: {{dir: out}}\n")
    recipe = load_recipe(images / "r.yaml", [])
    (overview,) = Mixture(recipe.data.train).inspect()
    assert (overview.bad, overview.misplaced) == (0, 2)
    assert print_data(recipe, open_mixtures(recipe)) is False
    out = capsys.readouterr().out
    assert "2 pairs have WRONG PLACES for their images" in out
    assert "rows.jsonl:2: question must hold <image> 0 or 1 times for 1 images, got 2" in out
    assert "NOT VALID: the run would stop at the first of them" in out


def test_turns_are_checked_measured_and_shown(tmp_path: Path, images: Path) -> None:
    turns = [user("first <image>"), assistant("b"), user("second <image>")]
    row = {"prompt": turns, "chosen": [assistant("c")], "rejected": [assistant("r")], "images": ["a.png", "sub/b.jpg"]}
    equal = {**row, "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": "a\n\nb\n\nc"}
    source = open_rows(images, [row, row, equal])
    assert check_pairs(source).totals() == {"duplicate": 1}
    assert collect_stats(source, len)["rows"].question.most == len(
        "user: first <image>\n\nassistant: b\n\nuser: second <image>"
    )
    write_view(tmp_path / "v.html", source)
    page = (tmp_path / "v.html").read_text()
    assert "assistant: b" in page


def test_a_format_that_cannot_hold_turns_refuses_the_line(tmp_path: Path, images: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    prompt = [{"role": "system", "content": "s"}, user("q")]
    rows = [
        {**TEXT["trl"]},
        {**TEXT["trl"], "prompt": prompt},
        {**TEXT["trl"], "chosen": [assistant("a"), user("b"), assistant("c")]},
        {**TEXT["trl"], "prompt": [user("q")], "rejected": [assistant("a"), user("b"), assistant("c")]},
    ]
    source = open_rows(images, rows)
    for name, format in (("a", "mmpr"), ("b.jsonl", "trl"), ("c", "hf")):
        with pytest.raises(BadLine, match=r"rows.jsonl:2: several turns: .* got several in messages"):
            convert(source, tmp_path / name, format, kind="standard")  # type: ignore[arg-type]
        count, skipped = convert(source, tmp_path / name, format, kind="standard", skip_bad=True)  # type: ignore[arg-type]
        assert (count, skipped.counts) == (1, {"several turns": 3})


def test_a_field_that_mmpr_cannot_hold_refuses_the_line(tmp_path: Path, images: Path) -> None:
    rows = [{**TEXT["trl"], "question": "raw"}, {**TEXT["trl"], "image": "https://host/a.png"}, TEXT["trl"]]
    count, skipped = convert(open_rows(images, rows), tmp_path / "out", "mmpr", skip_bad=True)
    assert (count, skipped.counts) == (2, {"bad field": 1})


def test_convert_keeps_every_field_and_image(tmp_path: Path, images: Path) -> None:
    row = {
        "prompt": [user([{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "q"}])],
        "chosen": [assistant("c")],
        "rejected": [assistant("r")],
        "score": 0.5,
        "tags": ["x"],
    }
    convert(open_rows(images, [row]), tmp_path / "p.jsonl", "pairs")
    pair = open_pairs(tmp_path / "p.jsonl").read(0)[1]
    assert pair == Pair("<image>\nq", "c", "r", (str(images / "a.png"),), extra={"score": 0.5, "tags": ["x"]})

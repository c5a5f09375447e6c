"""check, stats, convert and view as commands, on files with every defect there is."""

import html.parser
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mmpr_lines import LINES
from PIL import Image

from mpo_ext.cli.main import main
from mpo_ext.data import Pair, open_pairs, write_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.data.hf import load_dataset_folder
from mpo_ext.data.stats import collect_stats, count_words, token_counter
from mpo_ext.data.view import write_view

GOOD = {"image": "a.png", "question": "<image>\nq", "chosen": "c", "rejected": "r"}
DEFECTS: list[tuple[str, Any, str]] = [
    ("bad JSON", b'{"question": "q", "chosen\n', "Unterminated string"),
    ("bad JSON", b'{"question": NaN}\n', "numbers must be finite, got NaN"),
    ("bad JSON", b"{} {}\n", "Extra data"),
    ("bad JSON", b"[" * 50_000 + b"\n", "nested too deeply"),
    ("bad UTF-8", b'{"question": "\xff"}\n', r"invalid start byte at byte 14, b'\xff'"),
    ("huge line", b"x" * 200_000 + b"\n", "must be at most 100,000 bytes long, got 200,001"),
    ("bad field", b"[1]\n", "a line must hold an object, got list"),
    ("bad field", b'{"chosen": "a", "chosen": "b"}\n', "a field must be given once, got 'chosen' twice"),
    ("bad field", {"question": "q", "chosen": "c"}, "rejected must be given"),
    ("bad field", {**GOOD, "chosen": 5}, "chosen must be a str, got int 5"),
    ("bad field", {**GOOD, "image": {"path": "a.png"}}, "image must be a path or a list of paths"),
    ("bad field", {**GOOD, "image": ["a.png", ""]}, "image must be a path or a list of paths"),
    ("bad field", {**GOOD, "$source": 1}, "must be left to the reader"),
    ("bad image path", {**GOOD, "image": "../a.png"}, "image must stay inside"),
    ("missing image", {**GOOD, "image": "none.png"}, "an image must be a file"),
    ("missing image", {**GOOD, "image": "sub"}, "an image must be a file"),
    ("broken image", {**GOOD, "image": "broken.png"}, "an image must open"),
    ("placeholders", {**GOOD, "question": "<image><image>"}, "0 or 1 times for 1 images, got 2"),
    ("placeholders", {**GOOD, "image": ["a.png", "a.png"]}, "2 times for 2 images, got 1"),
    ("placeholders", {"question": "<image>", "chosen": "c", "rejected": "r"}, "0 times for 0 images, got 1"),
    ("empty question", {**GOOD, "question": " ", "chosen": "1"}, "question must hold text, got ' '"),
    ("empty chosen", {**GOOD, "chosen": ""}, "chosen must hold text, got ''"),
    ("empty rejected", {**GOOD, "rejected": "\n"}, r"rejected must hold text, got '\n'"),
    ("equal responses", {**GOOD, "rejected": "c"}, "chosen and rejected must differ, got 'c' twice"),
    ("answer_gt", {**GOOD, "chosen": "d", "answer_gt": 7}, "answer_gt must be text, got 7"),
    ("duplicate", {**GOOD, "answer_gt": "the pair is the same"}, ":1"),
]


def run(*arguments: str | os.PathLike[str]) -> int:
    return main(["data", *map(os.fspath, arguments)])


@pytest.fixture
def broken(write_lines: Any, images: Path) -> Path:
    """A sound line, then one for each defect."""
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:40])
    return write_lines("broken", [GOOD, *(line for _, line, _ in DEFECTS)])


def test_each_defect_is_found_alone_in_its_line(broken: Path) -> None:
    report = check_pairs(open_pairs(broken, max_line_bytes=100_000), keep=100)
    findings = {one.where.line: one for kind in report.examples.values() for one in kind}
    assert report.totals().total() == len(findings) == len(DEFECTS)
    for line, (kind, _, words) in enumerate(DEFECTS, start=2):
        assert (findings[line].kind, words in findings[line].message) == (kind, True), findings[line]
        assert findings[line].where.file.endswith("broken.jsonl")
    bad = sum(kind in ("bad JSON", "bad UTF-8", "huge line", "bad field", "bad image path") for kind, _, _ in DEFECTS)
    assert report.stats["broken"].skipped == bad
    assert report.stats["broken"].pairs == 1 + len(DEFECTS) - bad


def test_a_sound_fixture_is_clean_but_for_its_answers_that_are_no_text(mmpr: Path) -> None:
    report = check_pairs(open_pairs(mmpr))
    assert report.totals() == {"answer_gt": 2}
    assert sum(stats.pairs for stats in report.stats.values()) == sum(map(len, LINES.values()))


def test_a_wrong_length_in_the_meta_file_is_found(mmpr: Path) -> None:
    meta = json.loads(mmpr.read_text())
    meta["multi"]["length"] = 99
    mmpr.write_text(json.dumps(meta))
    report = check_pairs(open_pairs(mmpr))
    assert report.counts["multi"] == {"wrong length": 1}
    assert report.examples["wrong length"][0].message == "length must be the number of lines, 3, got 99"


def test_duplicates_are_found_over_files_and_the_first_is_named(mmpr: Path) -> None:
    meta = json.loads(mmpr.read_text())
    meta["again"] = meta["multi"]
    mmpr.write_text(json.dumps(meta))
    report = check_pairs(open_pairs(mmpr), keep=9)
    assert report.counts["again"] == {"duplicate": 3}
    messages = [finding.message for finding in report.examples["duplicate"]]
    assert [message.rpartition("/")[2] for message in messages] == [f"multi.jsonl:{line}" for line in (1, 2, 3)]


def test_only_decoding_finds_an_image_that_is_cut_off(images: Path, write_lines: Any) -> None:
    noise = Image.effect_noise((200, 200), 90)
    noise.save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-5000])
    meta = write_lines("cut", [{**GOOD, "image": "cut.jpg"}, {**GOOD, "image": "none.png"}])
    kinds = {
        how: set(check_pairs(open_pairs(meta), images=how).totals()) for how in ("verify", "decode", "exists", "skip")
    }
    assert kinds == {
        "verify": {"missing image"},
        "decode": {"missing image", "broken image"},
        "exists": {"missing image"},
        "skip": set(),
    }
    with pytest.raises(ValueError, match="images must be one of verify, decode, exists, skip, got 'no'"):
        check_pairs(open_pairs(meta), images="no")  # type: ignore[arg-type]


def test_check_exits_with_0_1_or_2(
    broken: Path, write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", write_lines("good", [GOOD])) == 0
    assert "No findings." in capsys.readouterr().out
    report = tmp_path / "report.json"
    assert run("check", broken, "--examples", "1", "--json", report, "--max-line-bytes", "100000") == 1
    out = capsys.readouterr().out
    assert f"{tmp_path}/broken.jsonl:2: bad JSON: Unterminated string" in out
    assert "numbers must be finite" not in out
    values = json.loads(report.read_text())
    assert values["findings"]["broken"]["bad JSON"] == 4
    assert run("check", tmp_path / "none.json") == 2
    assert capsys.readouterr().err == f"mpo-ext data check: path must exist, got {tmp_path}/none.json\n"
    (tmp_path / "meta.json").write_text('{"x": {"root": "", "annotation": "none.jsonl"}}')
    assert run("check", tmp_path / "meta.json") == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert run("check", broken, "--root-map", "x") == 2
    assert "root_map must read OLD=NEW, got 'x'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("check", broken, "--examples", "-1")


def test_check_and_stats_name_the_format_and_count_pairs_with_images(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"question": "q", "chosen": "c", "rejected": "r"}
    lines = [
        pair,
        {**pair, "images": ["a.png"]},
        {**pair, "images": ["a.png", "sub/b.jpg"], "question": "<image>" * 2},
    ]
    (images / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for command in ("check", "stats"):
        assert run(command, images / "p.jsonl") == 0
        assert "Format pairs (detected): 2 of 3 pairs with images\n" in capsys.readouterr().out
    assert run("stats", images / "p.jsonl", "--from", "pairs") == 0
    assert "Format pairs (set by --from)" in capsys.readouterr().out


def test_a_hostile_file_cannot_steer_the_terminal(write_lines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", write_lines("evil", [{**GOOD, "image": "\x1b[2J[bold]\r.png"}])) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert r"\x1b[2J[bold]\r.png" in out


def test_stats_measure_each_subset(mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = collect_stats(open_pairs(mmpr), len)
    text = stats["text"]
    assert (text.pairs, text.text_only, text.with_answer, text.images) == (6, 6, 3, 0)
    assert text.chosen.to_dict() == {"min": 1, "mean": 1.0, "max": 1}
    assert (stats["multi"].images, stats["multi"].rejected.most) == (5, len(LINES["multi"][0]["rejected"]))
    assert run("stats", mmpr, "--json", tmp_path / "stats.json") == 0
    out = capsys.readouterr().out
    assert "words (each Chinese, Japanese or Korean character is one)" in out
    assert "m3cot pairs/correctness" in out
    values = json.loads((tmp_path / "stats.json").read_text())
    assert values["subsets"]["text"]["with_answer"] == 3


def test_stats_count_what_they_skip_and_why(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = collect_stats(open_pairs(broken, max_line_bytes=100_000))["broken"]
    assert (stats.pairs, stats.skipped) == (13, 14)
    assert run("stats", broken) == 0
    assert "skipped 7: bad field" in capsys.readouterr().err


def test_words_are_counted_in_scripts_without_spaces() -> None:
    assert [count_words(text) for text in ("", " two  words\n", "两个人。", "见 fig 1", "한국")] == [0, 2, 4, 3, 2]


def test_stats_count_tokens_of_a_tokenizer(mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    length, unit = token_counter(tmp_path / "tokenizer")
    assert (length("abcd"), unit) == (4, f"tokens of {tmp_path}/tokenizer")
    assert run("stats", mmpr, "--tokenizer", tmp_path / "tokenizer") == 0
    assert "tokens of" in capsys.readouterr().out
    assert run("stats", mmpr, "--tokenizer", tmp_path / "none") == 2
    assert "tokenizer must be a name or folder that transformers can load" in capsys.readouterr().err


def test_convert_stops_at_a_bad_line_or_counts_it(
    broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    assert run("convert", broken, out, "--to", "pairs") == 1
    assert "broken.jsonl:2: bad JSON" in capsys.readouterr().err
    assert not out.exists()
    assert run("convert", broken, out, "--to", "pairs", "--skip-bad") == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote 13 pairs to {out}\n"
    assert "skipped 7: bad field" in captured.err
    assert run("convert", broken, out, "--to", "pairs", "--skip-bad") == 2
    assert "out must not exist without --force" in capsys.readouterr().err
    assert run("convert", broken, out, "--to", "trl", "--skip-bad", "--force") == 0
    assert run("convert", out, out, "--to", "pairs", "--force") == 2
    assert "out must be another place than path" in capsys.readouterr().err


def test_a_dataset_with_a_missing_image_is_not_written(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    meta = write_lines("none", [GOOD, {**GOOD, "image": "none.png"}])
    assert run("convert", meta, tmp_path / "out", "--to", "hf") == 2
    assert "none.png" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_dataset_leaves_out_and_counts_images_that_cannot_be_read(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    missing, url = {**GOOD, "image": "none.png"}, {**GOOD, "image": "https://host/a.png"}
    meta = write_lines("none", [missing, GOOD, b"{\n", url])
    assert run("convert", meta, tmp_path / "out", "--to", "hf", "--skip-bad") == 0
    captured = capsys.readouterr()
    assert captured.out == f"wrote 1 pairs to {tmp_path / 'out'}\n"
    assert "skipped 1: unreadable image" in captured.err
    assert "none.png: No such file or directory" in captured.err
    assert "skipped 1: image is a URL" in captured.err
    assert "skipped 1: bad JSON" in captured.err
    assert len(load_dataset_folder(tmp_path / "out")) == 1


def test_a_url_in_the_place_of_an_image_is_said_to_be_one(
    write_lines: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", write_lines("web", [{**GOOD, "image": "https://host/a.png"}])) == 1
    words = "image is a URL: URLs are not fetched: download the image and name its file, got https://host/a.png"
    assert words in capsys.readouterr().out
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", ("s3://bucket/a.png",))])
    assert run("check", tmp_path / "p.jsonl") == 1
    assert "got s3://bucket/a.png" in capsys.readouterr().out
    write_view(tmp_path / "p.html", open_pairs(tmp_path / "p.jsonl"))
    assert "a URL, not fetched" in (tmp_path / "p.html").read_text()


def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty.jsonl", "empty.json"):
        (tmp_path / name).write_text("\n")
        assert run("check", tmp_path / name) == 2
        assert "got an empty file" in capsys.readouterr().err


def test_a_message_of_json_says_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "\t\n')
    assert run("check", tmp_path / "p.jsonl", "--from", "pairs") == 1
    assert "Invalid control character at character 14" in capsys.readouterr().out


def test_relative_images_start_at_the_file(images: Path, tmp_path: Path) -> None:
    write_pairs(images / "p.jsonl", [Pair("q", "c", "r", ("a.png",))])
    assert run("check", images / "p.jsonl") == 0
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", ("a.png",))])
    assert run("check", tmp_path / "p.jsonl") == 1
    assert run("check", tmp_path / "p.jsonl", "--root", images) == 0
    assert run("convert", images / "p.jsonl", tmp_path / "mmpr", "--to", "mmpr", "--out-root", images) == 0
    assert run("check", tmp_path / "mmpr/meta.json") == 0


def test_missing_images_are_warned_of_with_their_number(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [Pair(f"q{n}", "c", "r", (name,)) for n, name in enumerate(("a.png", "b.png", "b.png", "sub/b.jpg"))]
    write_pairs(tmp_path / "p.jsonl", pairs)
    convert = ["convert", tmp_path / "out.jsonl", "--to", "trl"]
    for command in (["stats"], convert, ["view", "--out", tmp_path / "p.html"]):
        assert run(command[0], tmp_path / "p.jsonl", *command[1:]) == 0
        warning = capsys.readouterr().err
        assert f"warning: 3 of 3 images do not exist as files, as {tmp_path}/a.png: " in warning
        assert warning.endswith(f"relative images start at {tmp_path}: try --root\n")
    assert run("stats", tmp_path / "p.jsonl", "--root", images) == 0
    assert "warning: 1 of 3 images do not exist as files" in capsys.readouterr().err
    write_pairs(tmp_path / "good.jsonl", [pairs[0]])
    assert run("stats", tmp_path / "good.jsonl", "--root", images) == 0
    assert capsys.readouterr().err == ""


def test_a_meta_file_is_helped_by_root_map(write_lines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", write_lines("gone", [{**GOOD, "image": "gone.png"}])) == 0
    assert capsys.readouterr().err.endswith(": try --root-map\n")


def test_a_reader_that_leaves_ends_a_command_quietly(mmpr: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mpo_ext",
        "data",
        "convert",
        str(mmpr),
        str(tmp_path / "out.jsonl"),
        "--to",
        "trl",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        text = process.stderr.read()
    assert "roken pipe" not in text
    assert "Errno" not in text


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>&lt;b&gt;\u2028\u2029",
    "{{ 7 * 7 }}{% raw %}",
    "\"'`${alert(1)}\\",
    "javascript:alert(1)",
]


class Page(html.parser.HTMLParser):
    """The elements of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.scripts[-1] += data


def test_the_page_holds_every_pair_and_no_pair_can_break_out(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    pairs = [
        Pair(
            f"{text}q{index}",
            f"shared 😀{text}c",
            f"shared 😀{text}r",
            (f"{images}/a.png", f"{images}/{text.replace('/', '')}.png"),
            text,
            {"pipeline": text, "cut": {"characters": 8, "tokens": 2}, text: text},
            {"$source": {"subset": text}, text: [text]},
        )
        for index, text in enumerate(HOSTILE)
    ]
    write_pairs(tmp_path / "p.jsonl", pairs)
    plain = tmp_path / "plain.html"
    write_pairs(tmp_path / "one.jsonl", [Pair("q", "c", "r", provenance={"pipeline": "x"})])
    write_view(plain, open_pairs(tmp_path / "one.jsonl"), title="t")
    count, skipped = write_view(tmp_path / "p.html", open_pairs(tmp_path / "p.jsonl"), title=HOSTILE[0])
    assert (count, skipped.total) == (len(pairs), 0)

    page, reference = Page((tmp_path / "p.html").read_text()), Page(plain.read_text())
    # The same elements but for the options of the filters: nothing of the data became HTML.
    names, expected = ([tag for tag, _ in one.tags if tag != "option"] for one in (page, reference))
    assert names == expected
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.scripts) == 2
    assert re.sub(r"\s", "", page.scripts[1]) == re.sub(r"\s", "", reference.scripts[1])
    assert not set("<>&\u2028\u2029") & set(page.scripts[0])
    shown = json.loads(page.scripts[0])
    assert [pair["question"] for pair in shown["pairs"]] == [pair.question for pair in pairs]
    for entry, pair, text in zip(shown["pairs"], pairs, HOSTILE, strict=True):
        assert (entry["chosen"], entry["rejected"], entry["answer"]) == (pair.chosen, pair.rejected, text)
        assert entry["subset"] == entry["pipeline"] == text
        assert json.loads(entry["more"]) == {"provenance": pair.provenance, "extra": {text: [text]}}
        utf16 = pair.chosen.encode("utf-16-le")
        assert utf16[: 2 * entry["cut"]].decode("utf-16-le") == "shared 😀"
        assert utf16[: 2 * entry["shared"]].decode("utf-16-le") == f"shared 😀{text}"
        assert entry["images"][0] == {"name": "a.png", "index": 0}
        assert entry["images"][1]["problem"] == "missing"
    assert len(shown["images"]) == 1
    assert shown["images"][0].startswith("data:image/jpeg;base64,")
    assert "http" not in re.sub(r"http-equiv", "", (tmp_path / "p.html").read_text())


def test_the_page_says_what_it_leaves_out(write_lines: Any, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    Image.effect_noise((900, 600), 90).save(images / "large.png")
    lines = [{**GOOD, "question": f"q{index}", "image": ["a.png", "large.png"]} for index in range(50)]
    source = open_pairs(write_lines("many", [*lines, b"{\n"]))
    count, skipped = write_view(tmp_path / "p.html", source, image_budget=2000, max_characters=2)
    assert (count, skipped.counts) == (50, {"bad JSON": 1})
    text = (tmp_path / "p.html").read_text()
    assert "skipped 1: bad JSON" in text
    assert "1 images did not fit into 2,000 bytes." in text
    assert "q1… [" not in text
    assert "q1 … [1 more characters]" in text
    draws = []
    for seed in (1, 1, 2):
        write_view(tmp_path / "p.html", source, limit=10, seed=seed)
        text = (tmp_path / "p.html").read_text()
        assert f"10 of 51 lines, drawn at random with seed {seed}." in text
        draws.append([pair["where"] for pair in json.loads(Page(text).scripts[0])["pairs"]])
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        write_view(tmp_path / "p.html", source, limit=0)


def test_thumbnails_are_small_whatever_the_image(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2")
    modes = {"1": 1, "L": 9, "P": 3, "LA": (1, 2), "RGBA": (1, 2, 3, 0), "CMYK": (1, 2, 3, 4), "I;16": 9, "F": 0.5}
    paths = []
    for index, (mode, color) in enumerate(modes.items()):
        paths.append(images / f"{index}.{'tiff' if mode in ('CMYK', 'F', 'I;16') else 'png'}")
        Image.new(mode, (2000, 1000), color).save(paths[-1])
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", tuple(map(str, paths)))])
    write_view(tmp_path / "p.html", open_pairs(tmp_path / "p.jsonl"), thumbnail=64)
    (pair,) = json.loads(Page((tmp_path / "p.html").read_text()).scripts[0])["pairs"]
    assert [image.get("index") for image in pair["images"]] == list(range(len(modes)))
    assert (tmp_path / "p.html").stat().st_size < 40_000


def test_view_is_a_command(mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jinja2")
    assert run("view", mmpr, "--out", tmp_path / "p.html", "--limit", "5") == 0
    assert capsys.readouterr().out == f"wrote 5 of 13 pairs to {tmp_path}/p.html\n"


@pytest.mark.parametrize(("package", "command"), [("rich", "check"), ("jinja2", "view"), ("datasets", "convert")])
def test_a_missing_package_is_named(package: str, command: str, mmpr: Path, tmp_path: Path) -> None:
    rest = {"convert": [str(tmp_path / "out"), "--to", "hf"]}.get(command, [])
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from mpo_ext.cli.main import main; sys.exit(main({['data', command, str(mmpr), *rest]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert package in done.stderr
    assert "pip install '.[data]'" in done.stderr
    assert "Traceback" not in done.stderr

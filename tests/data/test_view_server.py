"""Tests the local server of the HTML page that shows pairs. The server saves the pairs that a user selects."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mmpr_files import run_data
from PIL import Image

from mpo_ext.data import Pair, open_pairs, view_server, write_pairs
from mpo_ext.data.picks import Picks, pair_digest, read_picks, restrict
from mpo_ext.data.view import write_view
from mpo_ext.data.view_server import PairServer

DRIVER = Path(__file__).with_name("page_driver.js")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script with node")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    pytest.importorskip("jinja2", reason="needs the extra data")
    Image.new("RGB", (500, 300), (200, 30, 40)).save(tmp_path / "red.png")
    names = ["red.png", "none.png", "https://example.org/a.png"]
    lines = [Pair(f"question {n}", f"chosen {n}", "rejected", tuple(names[n % 5 : n % 5 + 1])) for n in range(95)]
    write_pairs(tmp_path / "p.jsonl", lines)
    with open(tmp_path / "p.jsonl", "a") as file:
        file.write("{\n")
    return tmp_path / "p.jsonl"


@contextlib.contextmanager
def served(path: Path, **options: Any) -> Iterator[PairServer]:
    with PairServer(open_pairs(path), picks_path=path.with_name("picked.json"), **options) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(url: str, *, method: str = "GET") -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def drive(page: Path, address: str, *steps: list[Any]) -> dict[str, Any]:
    done = subprocess.run(
        ["node", DRIVER, page, address, json.dumps(steps)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_server_answers_only_with_the_secret_part(pairs: Path) -> None:
    with served(pairs) as server:
        assert server.server_address[0] == "127.0.0.1"
        root = server.url.removesuffix(f"{server.token}/")
        for path in ("", "pairs", "x/pairs", "picked.json", f"{server.token[:-1]}/pairs", f"{server.token}x/"):
            assert get(root + path)[0] == 404, path
        assert get(root + "x/pick?index=0&picked=1", method="POST")[0] == 404
        assert get(server.url + "etc/passwd")[0] == 404
        assert not pairs.with_name("picked.json").exists()
        assert get(server.url)[0] == 200


def test_pairs_are_read_in_parts_and_images_on_demand(pairs: Path) -> None:
    with served(pairs, thumbnail=64) as server:

        def find(**query: Any) -> dict[str, Any]:
            return json.loads(get(f"{server.url}pairs?{urllib.parse.urlencode(query)}")[1])

        first = find(start=0)
        assert [pair["question"] for pair in first["pairs"]] == [f"question {n}" for n in range(20)]
        assert (first["next"], first["total"]) == (20, 96)
        last = find(start=90)
        assert [pair.get("question") for pair in last["pairs"][:-1]] == [f"question {n}" for n in range(90, 95)]
        assert "p.jsonl:96: bad JSON" in last["pairs"][-1]["bad"]
        assert [pair["index"] for pair in find(start=3, query="N 7")["pairs"]] == [7, *range(70, 80)]
        assert find(start=0, subset="p")["pairs"]
        assert find(start=0, subset="other")["pairs"] == []
        status, content = get(server.url + first["pairs"][0]["images"][0]["url"])
        assert status == 200
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size) == ("JPEG", (64, 38))
        problems = [get(server.url + first["pairs"][n]["images"][0]["url"]) for n in (1, 2)]
        assert problems == [(404, b"missing"), (404, b"a URL, not fetched")]
        assert get(f"{server.url}image?index=0&number=9")[0] == 404
        assert get(f"{server.url}image?index=99999999999999999999")[0] == 404


def test_picks_are_written_at_once_and_continued(pairs: Path) -> None:
    path = pairs.with_name("picked.json")
    with served(pairs) as server:
        for index in (7, 3, 11):
            assert get(f"{server.url}pick?index={index}&picked=1", method="POST") == (
                200,
                str(len(server.picks.digests)).encode(),
            )
        assert get(f"{server.url}pick?index=11&picked=0", method="POST")[0] == 200
        assert get(f"{server.url}pick?index=95&picked=1", method="POST")[0] == 404  # a bad line
        assert sorted(read_picks(path).digests) == [3, 7]
    with served(pairs) as server:
        assert sorted(server.picks.digests) == [3, 7]
        found = json.loads(get(f"{server.url}pairs?picked=1")[1])
        assert [pair["index"] for pair in found["pairs"]] == [3, 7]
        assert all(pair["picked"] for pair in found["pairs"])
        assert json.loads(get(f"{server.url}picked.json")[1]) == json.loads(path.read_text())
    path.write_text("notes of mine")
    with pytest.raises(FileExistsError, match="picks must be a new place"):
        PairServer(open_pairs(pairs), picks_path=path)


def test_a_pick_that_cannot_be_written_is_no_pick(pairs: Path) -> None:
    path = pairs.with_name("picked.json")
    with served(pairs) as server:
        path.mkdir()
        assert get(f"{server.url}pick?index=3&picked=1", method="POST")[0] == 404
        path.rmdir()
        assert get(f"{server.url}pick?index=5&picked=1", method="POST")[1] == b"1"
    assert sorted(read_picks(path).digests) == [5]


def test_picked_pairs_are_a_source_for_every_command(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_pairs(pairs)
    digests = {index: pair_digest(source.pairs[index]) for index in (2, 40, 94)}
    Picks("p", 96, digests).write(tmp_path / "picked.json")
    out = tmp_path / "kept.jsonl"
    assert run_data("convert", pairs, out, "--to", "pairs", "--picked", tmp_path / "picked.json") == 0
    assert [pair.question for pair in open_pairs(out).pairs] == ["question 2", "question 40", "question 94"]
    rest = ["--not-picked", tmp_path / "picked.json"]
    assert run_data("convert", pairs, tmp_path / "rest.jsonl", "--to", "pairs", "--skip-bad", *rest) == 0
    left = [pair.question for pair in open_pairs(tmp_path / "rest.jsonl").pairs]
    assert left == [f"question {n}" for n in range(95) if n not in digests]
    capsys.readouterr()
    assert run_data("stats", pairs, "--picked", tmp_path / "picked.json") == 0
    assert "2 of 3 pairs with images" in capsys.readouterr().out
    assert run_data("view", pairs, "--out", tmp_path / "v.html", "--picked", tmp_path / "picked.json") == 0
    assert "wrote 3 of 3 pairs" in capsys.readouterr().out


def test_picks_of_other_lines_are_refused(pairs: Path, tmp_path: Path) -> None:
    source = open_pairs(pairs)
    good = {3: pair_digest(source.pairs[3])}
    assert [pair.question for _, pair in restrict(source, Picks("p", 96, good)).scan()] == ["question 3"]
    with pytest.raises(ValueError, match=r"has 96 lines, got picks of 95 lines of p$"):
        restrict(source, Picks("p", 95, good))
    with pytest.raises(ValueError, match=r"another pair was picked at .*p\.jsonl:5: the file has changed"):
        restrict(source, Picks("p", 96, {4: good[3]}))
    with pytest.raises(ValueError, match=r"another pair was picked at .*p\.jsonl:96"):
        restrict(source, Picks("p", 96, {95: good[3]}))
    values = Picks("p", 96, good).to_dict()
    for bad in ("[]", "{", json.dumps({**values, "format": "x"}), json.dumps({**values, "lines": 2})):
        (tmp_path / "picked.json").write_text(bad)
        with pytest.raises(ValueError, match="picked must be a file of picks"):
            read_picks(tmp_path / "picked.json")
    with pytest.raises(
        FileNotFoundError, match=r"picked must be a file of picks, got .*none\.json: it does not exist"
    ):
        read_picks(tmp_path / "none.json")


@needs_node
@pytest.mark.parametrize("search_s", [0.5, 0.0], ids=["whole pages", "a line per request"])
def test_the_served_page_searches_turns_pages_and_picks(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search_s: float
) -> None:
    monkeypatch.setattr(view_server, "_SEARCH_S", search_s)
    with served(pairs) as server:
        (tmp_path / "page.html").write_bytes(get(server.url)[1])
        steps = [["next"], ["back"], ["place", 91], ["search", "question 9"], ["pick", 0], ["only", True], ["save"]]
        result = drive(tmp_path / "page.html", server.url, *steps)
    start, following, back, end, found, picked, only, saved = result["shown"]
    assert start["questions"] == [f"question {n}" for n in range(20)]
    assert start["count"] == "lines 1\u201320 of 96"
    assert start["images"][0] == "image?index=0&number=0"
    assert following["questions"] == [f"question {n}" for n in range(20, 40)]
    assert back["questions"] == start["questions"]
    assert end["questions"][:5] == [f"question {n}" for n in range(90, 95)]
    assert "bad JSON" in end["questions"][5]
    assert found["questions"] == ["question 9", *(f"question {n}" for n in range(90, 95))]
    assert picked["picked"] == [True, *[False] * 5]
    assert (only["questions"], saved["save"]) == (["question 9"], "save 1 picks")
    assert json.loads(result["saved"][0])["pairs"] == [{"index": 9, "digest": pair_digest(open_pairs(pairs).pairs[9])}]


@needs_node
def test_picks_of_a_written_page_are_saved_as_a_file_that_commands_read(pairs: Path, tmp_path: Path) -> None:
    source = open_pairs(pairs)
    write_view(tmp_path / "page.html", source, limit=50, seed=3)
    steps = [["pick", 1], ["next"], ["pick", 0], ["only", True], ["save"]]
    result = drive(tmp_path / "page.html", "", *steps)
    shown = result["shown"]
    assert shown[0]["count"].startswith("1\u201320 of ")
    assert shown[-1]["questions"] == [shown[0]["questions"][1], shown[2]["questions"][0]]
    (tmp_path / "picked.json").write_text(result["saved"][0])
    chosen = restrict(source, read_picks(tmp_path / "picked.json"))
    assert [pair.question for _, pair in chosen.scan()] == shown[-1]["questions"]


def test_the_command_serves_until_it_is_interrupted(pairs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "mpo_ext", "data", "view", str(pairs), "--serve", "--title", "t<b>"]
    # A shell starts its background jobs with SIGINT ignored, and child processes inherit it.
    options: dict[str, Any] = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes, **options) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[3]
        assert line.startswith("96 lines at http://127.0.0.1:")
        status, page = get(url)
        assert (status, b"t&lt;b&gt;" in page) == (200, True)
        process.send_signal(2)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "0 pairs are picked\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--serve", "--out", "x.html"], "--out must be left out with --serve, got x.html"),
        (["--serve", "--limit", "5"], "--limit must be left out with --serve, got 5"),
        (["--port", "80"], "--port must be left out without --serve, got 80"),
        (["--pick-into", "x"], "--pick-into must be left out without --serve, got x"),
    ],
)
def test_options_without_an_effect_are_refused(
    pairs: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_data("view", pairs, *options) == 2
    assert message in capsys.readouterr().err

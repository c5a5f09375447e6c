"""Tests runs of Correctness and DropoutNTP: killed and resumed, in several processes, and on many questions."""

import json
import multiprocessing
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_engine import StubEngine

from mpo_ext.data.check import check_pairs
from mpo_ext.data.mmpr import write_mmpr
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import open_pairs
from mpo_ext.files import LockedError
from mpo_ext.generate import runner
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.items import Item, item_files, open_items, read_items
from mpo_ext.generate.outputs import ItemResult
from mpo_ext.generate.repetition import is_degenerate
from mpo_ext.generate.responses import RatedResponse, distinct
from mpo_ext.generate.sampler import journal_path
from mpo_ext.journal import SettingsMismatchError, read_records

KILLS = int(os.environ.get("MPO_KILLS", "3"))
RECORDS = int(os.environ.get("MPO_SAMPLING_RECORDS", "4000"))
PIPELINES: dict[str, Callable[[], Any]] = {
    "dropout_ntp": lambda: DropoutNTP(DropoutNTPConfig(samples=2)),
    "correctness": lambda: Correctness(CorrectnessConfig(samples=8, pairs_per_question=3)),
}


def write_items(path: Path, count: int) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            item = {"question": f"Question {number}?", "chosen": f"It is {number} and\nFinal answer: 7", "answer": "7"}
            file.write(json.dumps(item) + "\n")
    return path


def outputs(out: Path) -> dict[str, bytes]:
    names = ("pairs.jsonl", "format_pairs.jsonl", "unsolved.jsonl", "summary.json")
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


def run(pipeline: Any, source: Path, out: Path, engine: StubEngine | None = None, **options: Any) -> Any:
    return runner.run(pipeline, engine or StubEngine(), source, out, stream=None, **options)


def run_until_killed(target: Callable[[], Any], after_s: float) -> bool:
    """Calls ``target`` in a process, and kills the process after ``after_s`` seconds.

    Returns False if ``target`` succeeded in this time, otherwise True.
    """
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(after_s)
    process.kill()
    process.join()
    return process.exitcode != 0


@pytest.mark.parametrize("name", PIPELINES)
def test_a_killed_run_ends_with_the_same_bytes(
    name: str, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    items = write_items(tmp_path / "items.jsonl", 40)
    pipeline = PIPELINES[name]()
    per_item = len(pipeline.keys(Item()))
    run(pipeline, items, tmp_path / "whole")
    delay_s = 1.2 / (40 * per_item)
    rng = random.Random(name)
    kills = 0
    for attempt in range(20 * KILLS):
        out = tmp_path / f"killed-{attempt}"
        for _ in range(4):
            kills += run_until_killed(
                lambda out=out: run(pipeline, items, out, StubEngine(delay_s=delay_s), block_size=2 * per_item),
                rng.uniform(0.05, 0.5),
            )
        engine = StubEngine()
        before = len(list(read_records(journal_path(out, 0, 1)))) if journal_path(out, 0, 1).exists() else 0
        run(pipeline, items, out, engine, block_size=2 * per_item)
        keys = [record["key"] for record in read_records(journal_path(out, 0, 1))]
        assert keys == [key for item in read_items(item_files(items)) for key in pipeline.keys(item)]
        assert len(engine.requests) <= len(keys) - before + 2 * per_item
        assert outputs(out) == outputs(tmp_path / "whole")
        if kills >= KILLS:
            record_property("cases", kills)
            return
    pytest.fail(f"{kills} kills of {KILLS}")


@pytest.mark.parametrize("name", PIPELINES)
def test_a_journal_cut_anywhere_is_completed(name: str, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 5)
    pipeline = PIPELINES[name]()
    run(pipeline, items, tmp_path / "whole")
    journal = journal_path(tmp_path / "whole", 0, 1).read_bytes()
    expected = outputs(tmp_path / "whole")
    for size in range(0, len(journal), 101):
        journal_path(tmp_path / "whole", 0, 1).write_bytes(journal[:size])
        run(pipeline, items, tmp_path / "whole", block_size=16)
        assert journal_path(tmp_path / "whole", 0, 1).read_bytes() == journal
        assert outputs(tmp_path / "whole") == expected


def test_a_finished_run_asks_the_engine_for_nothing(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 5)
    summary = run(PIPELINES["correctness"](), items, tmp_path / "out")
    engine = StubEngine()
    assert run(PIPELINES["correctness"](), items, tmp_path / "out", engine) == summary
    assert engine.requests == []


@pytest.mark.parametrize("name", PIPELINES)
def test_the_block_size_and_the_order_of_items_change_no_pair(name: str, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 12)
    lines = items.read_text().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(lines))
    run(PIPELINES[name](), items, tmp_path / "a")
    run(PIPELINES[name](), shuffled, tmp_path / "b", block_size=1)
    first, second = ((tmp_path / out / "pairs.jsonl").read_bytes().splitlines() for out in "ab")
    assert len(first) > 0
    assert sorted(first) == sorted(second)


@pytest.mark.parametrize("name", PIPELINES)
def test_several_processes_give_the_outputs_of_one(name: str, tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 11)
    run(PIPELINES[name](), items, tmp_path / "one")
    results = [run(PIPELINES[name](), items, tmp_path / "three", rank=rank, world_size=3) for rank in (1, 0, 2)]
    assert results[:2] == [None, None]
    assert outputs(tmp_path / "three") == outputs(tmp_path / "one")
    with pytest.raises(ValueError, match=r"processes must be the 3 that .* was begun with, got 2"):
        run(PIPELINES[name](), items, tmp_path / "three", rank=0, world_size=2)


def test_processes_with_other_settings_are_refused(tmp_path: Path) -> None:
    class Other(StubEngine):
        def settings(self) -> dict[str, Any]:
            return {"engine": "other", "processor": {"date": "2026-01-01"}}

    items = write_items(tmp_path / "items.jsonl", 4)
    out, first = tmp_path / "out", PIPELINES["correctness"]()
    run(first, items, out, rank=0, world_size=2)
    seeded = Correctness(CorrectnessConfig(samples=8, pairs_per_question=3, seed=5))
    for pipeline, engine, name in ((seeded, None, "pipeline.seed: 0"), (first, Other(), "engine.engine: 'stub'")):
        with pytest.raises(SettingsMismatchError, match=name):
            run(pipeline, items, out, engine, rank=1, world_size=2)
    assert not journal_path(out, 1, 2).exists()
    assert run(first, items, out, rank=1, world_size=2) is not None
    path = journal_path(out, 1, 2)  # as if an earlier version had written it
    path.write_text(path.read_text().replace('"seed":0', '"seed":5'))
    with pytest.raises(SettingsMismatchError, match=r"pipeline\.seed"):
        run(first, items, out, rank=0, world_size=2)
    with pytest.raises(SettingsMismatchError, match=r"pipeline\.seed"):
        runner.write_outputs(first, open_items(items), out, world_size=2)


def test_media_that_can_be_read_again_are_named(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    items = tmp_path / "items.jsonl"
    lines = [{"question": f"<image>Q{n}?", "image": f"{n}.png", "answer": "7"} for n in range(2)]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "1.png")
    pipeline = PIPELINES["correctness"]()
    for root in ("wrong", "images"):
        options = {"image_root": str(tmp_path / root)}
        before = run(pipeline, items, tmp_path / root / "out", **options)
        assert run(pipeline, items, tmp_path / root / "out", **options) == before
    with pytest.warns(UserWarning, match=r"1.png could not be read when .* can be read now: .* stay skipped"):
        run(pipeline, items, tmp_path / "wrong" / "out", image_root=str(tmp_path / "images"))
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "0.png")
    with pytest.warns(UserWarning, match=r"0.png could not be read when .* can be read now: .* stay skipped"):
        run(pipeline, items, tmp_path / "images" / "out", image_root=str(tmp_path / "images"))


def test_more_items_may_follow(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 9)
    run(PIPELINES["dropout_ntp"](), items, tmp_path / "whole")
    run(PIPELINES["dropout_ntp"](), items, tmp_path / "parts", limit=4)
    run(PIPELINES["dropout_ntp"](), items, tmp_path / "parts")
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "whole")


def test_other_settings_and_another_input_are_refused(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 3)
    run(DropoutNTP(DropoutNTPConfig(keep=0.5)), items, tmp_path / "out")
    before = outputs(tmp_path / "out")
    with pytest.raises(SettingsMismatchError, match=r"pipeline\.keep: 0\.5 in the file, 0\.25 now"):
        run(DropoutNTP(DropoutNTPConfig(keep=0.25)), items, tmp_path / "out")
    write_items(items, 4)
    with pytest.raises(SettingsMismatchError, match=r"input\.blake2b"):
        run(DropoutNTP(DropoutNTPConfig(keep=0.5)), items, tmp_path / "out")
    assert outputs(tmp_path / "out") == before


def test_two_runs_of_one_folder_are_refused(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 40)
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(PIPELINES["dropout_ntp"](), items, out, StubEngine(delay_s=10))
    )
    process.start()
    try:
        while not (journal_path(out, 0, 1)).exists():
            process.join(0.01)
        with pytest.raises(LockedError, match=rf"process {process.pid} is writing it"):
            run(PIPELINES["dropout_ntp"](), items, out)
    finally:
        process.kill()
        process.join()


def test_a_journal_of_other_records_is_refused(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 3)
    run(PIPELINES["dropout_ntp"](), items, tmp_path / "out")
    path = journal_path(tmp_path / "out", 0, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match=r"must hold the records of this input in its order"):
        run(PIPELINES["dropout_ntp"](), items, tmp_path / "out")


def test_lines_that_cannot_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    good = {"question": "Q?", "chosen": "A long response", "answer_gt": "7"}
    lines = [
        "{", "[]", json.dumps({"chosen": "x"}), json.dumps({**good, "image": "missing.png"}),
        json.dumps({**good, "image": ["a", "b"], "question": "<image> one"}), json.dumps({"question": "Q?"}),
        '{"question": "\\ud800"}', '{"question": "Q?", "score": NaN}', "", json.dumps(good),
    ]  # fmt: skip
    items.write_text("\n".join(lines) + "\n")
    counts = run(PIPELINES["correctness"](), items, tmp_path / "out").skipped
    assert counts["unreadable line"] == 4
    assert counts["no question"] == counts["image cannot be read"] == 1
    assert counts["number of <image> is not that of the images"] == 1
    assert counts["no true answer"] == 1
    assert run(DropoutNTP(), items, tmp_path / "blind").skipped["no chosen response"] == 1


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Returns an MMPR meta file that lists two data files with questions and answers, without responses."""
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    meta = {}
    for name in ("charts", "maps"):
        (tmp_path / "old" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "old" / name / "a.png")
        lines = [{"image": "a.png", "question": f"<image>\n{name} {n}?", "answer": "7"} for n in range(4)]
        lines[3]["image"] = "../maps/a.png"
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        meta[name] = {"root": str(tmp_path / "old" / name), "annotation": f"{name}.jsonl", "length": 4}
    path = tmp_path / "meta.json"
    path.write_text(json.dumps(meta))
    return path


def test_a_meta_file_of_prompts_is_a_source(prompts: Path, tmp_path: Path) -> None:
    """Checks that each pair records the name and the image folder of its data set from an MMPR meta file.

    A second run reads ``unsolved.jsonl``, which the first run has written. The check includes the pairs of both runs.
    """
    correctness = Correctness(CorrectnessConfig(samples=4, pairs_per_question=1))
    summary = run(correctness, prompts, tmp_path / "out")
    assert summary.items == 8
    assert summary.skipped["image outside the root of its subset"] == 1  # for "maps" it is inside
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    unsolved = [json.loads(line) for line in (tmp_path / "out" / "unsolved.jsonl").read_text().splitlines()]
    taken = DropoutNTP(DropoutNTPConfig(samples=16, allow_wrong_chosen=True))  # what is drawn hangs on the path
    run(taken, tmp_path / "out" / "unsolved.jsonl", tmp_path / "blind")
    blind = [json.loads(line) for line in (tmp_path / "blind" / "pairs.jsonl").read_text().splitlines()]
    assert pairs
    assert unsolved
    assert blind
    for pair in [*pairs, *blind]:
        subset = pair["question"].split()[1]
        root = str(tmp_path / "old" / subset)
        assert pair["extra"]["$source"] == {"subset": subset, "root": root}
        assert pair["images"][0].startswith(root)
    written = write_mmpr(tmp_path / "mmpr", map(Pair.from_dict, [*pairs, *blind]))
    assert sum(written.values()) == len(pairs) + len(blind)
    assert set(written) == {"charts", "maps"}


def test_a_meta_file_that_moved_is_the_same_input(prompts: Path, tmp_path: Path) -> None:
    correctness = Correctness(CorrectnessConfig(samples=4))
    run(correctness, prompts, tmp_path / "out")
    (tmp_path / "old").rename(tmp_path / "new")
    engine = StubEngine()
    root_map = [(str(tmp_path / "old"), str(tmp_path / "new"))]
    summary = run(correctness, prompts, tmp_path / "out", engine, root_map=root_map)
    assert summary.items == 8
    assert not engine.requests  # all of it was in the journal
    pair = json.loads((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()[0])
    assert pair["images"][0].startswith(str(tmp_path / "new"))
    fresh = run(correctness, prompts, tmp_path / "again", root_map=root_map)
    assert fresh.skipped["image cannot be read"] == 0
    (tmp_path / "maps.jsonl").write_text("")
    with pytest.raises(SettingsMismatchError):
        run(correctness, prompts, tmp_path / "out", root_map=root_map)


def test_roots_belong_to_the_kind_of_the_source(prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_root must be left out for a meta file"):
        run(DropoutNTP(), prompts, tmp_path / "out", image_root="images")
    items = write_items(tmp_path / "items.jsonl", 1)
    with pytest.raises(ValueError, match="root_map must be left out unless source is a meta file"):
        run(DropoutNTP(), items, tmp_path / "out", root_map=[("a", "b")])


def test_images_that_are_urls_are_said_to_be(tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"question": "Q?", "image": "https://host/a.png", "answer": "7"}) + "\n")
    refused = run(PIPELINES["correctness"](), items, tmp_path / "out").skipped
    assert refused == {"images are URLs, which are not fetched: download them first": 1}


def test_every_output_line_is_a_pair(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 10)
    for name, make in PIPELINES.items():
        run(make(), items, tmp_path / name)
        for output in ("pairs", "format_pairs"):
            path = tmp_path / name / f"{output}.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                pair = Pair.from_dict(json.loads(line))
                assert pair.provenance["model"] == "stub"
                assert pair.provenance["sampling"]["temperature"] == 0.7


def test_the_summary_says_what_became_of_every_sample(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 20)
    summary = run(PIPELINES["dropout_ntp"](), items, tmp_path / "out")
    assert summary.items == 20
    assert summary.records == 40 == summary.pairs + sum(summary.skipped.values())
    text = str(summary)
    assert f"{summary.generated_tokens / summary.pairs:.1f} generated tokens per pair" in text
    for reason, count in summary.skipped.items():
        assert f"{count:>7}  {reason}" in text
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert saved["generated_tokens_per_pair"] == round(summary.generated_tokens / summary.pairs, 2)


def test_progress_says_rate_time_left_and_counts(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 6)
    with open(tmp_path / "log", "w") as stream:
        summary = runner.run(PIPELINES["dropout_ntp"](), StubEngine(), items, tmp_path / "out", stream=stream)
    line = (tmp_path / "log").read_text()
    assert line.startswith("dropout_ntp: 6/6 items, ")
    skipped = sum(summary.skipped.values())
    assert line.endswith(f"/s, 0 s left, {summary.pairs} pairs, 0 items without a pair, {skipped} samples skipped\n")


def test_refused_samples_and_items_without_a_pair_are_told_apart(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 20)
    with open(items, "a") as file:
        file.write('{"question": ""}\n{"question": "no answer"}\n')
    summary = run(PIPELINES["correctness"](), items, tmp_path / "out")
    whole = {"no question", "no true answer", "question without a right answer", "question with right answers only"}
    whole |= {"accuracy outside the band", "question without a pair"}
    assert summary.skipped_items == sum(count for reason, count in summary.skipped.items() if reason in whole) >= 2
    assert summary.skipped_samples == summary.skipped.total() - summary.skipped_items > 0
    told = f"{summary.skipped_items} items without a pair, {summary.skipped_samples} samples skipped:"
    assert told in str(summary)
    saved = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (saved["refused_items"], saved["refused_samples"]) == (summary.skipped_items, summary.skipped_samples)


@pytest.mark.parametrize("image_root", ["", "data", "ABSOLUTE"])
def test_images_of_pairs_start_at_the_folder_of_their_file(
    image_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (4, 4)).save(tmp_path / "data" / "images" / f"{name}.png")
    prefix = "data/" if not image_root else ""
    lines = [
        {"question": "Q", "image": f"{prefix}images/a.png", "answer": "7", "chosen": "It is 7 , as one sees"},
        {"question": "R", "images": [str(tmp_path / "data/images/b.png")], "answer": "7", "chosen": "It is 7 , yes"},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = str(tmp_path / "data") if image_root == "ABSOLUTE" else image_root
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere" / "deep")  # ".." leads out of where a folder really lies
    for out in (Path("runs/one"), tmp_path / "two", Path("linked/three")):
        run(DropoutNTP(DropoutNTPConfig(samples=16)), Path("items.jsonl"), out, image_root=root)
        written = [json.loads(line)["images"][0] for line in (out / "pairs.jsonl").read_text().splitlines()]
        absolute = str(tmp_path / "data/images/b.png")
        relative = os.path.relpath(tmp_path / "data/images/a.png", out.resolve())
        assert set(written) == {relative, absolute}
        monkeypatch.chdir("/")  # whatever the current folder
        source = open_pairs(tmp_path / out / "pairs.jsonl")
        assert check_pairs(source).is_clean
        assert {pair.images[0] for pair in source.pairs if isinstance(pair, Pair)} == set(written)
        assert source.read(0)[1].images == (str(tmp_path / "data/images/a.png"),)
        monkeypatch.chdir(tmp_path)


def test_a_journal_from_before_gives_relative_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that the image paths in the pairs are relative to the output folder, also after a second run.

    The second run reads the responses that the first run stored. Unlike the pairs, ``unsolved.jsonl`` keeps the image
    paths of the input.
    """
    Image = pytest.importorskip("PIL.Image")  # noqa: N806
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    items = [{"question": f"Q{n}", "image": "a.png", "answer": "7" if n else "impossible"} for n in range(4)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for _ in range(2):
        engine = StubEngine()
        run(PIPELINES["correctness"](), tmp_path / "items.jsonl", Path("out"), engine)
        lines = [json.loads(line) for line in Path("out/pairs.jsonl").read_text().splitlines()]
        assert {line["images"][0] for line in lines} == {"../a.png"}
        unsolved = [json.loads(line) for line in Path("out/unsolved.jsonl").read_text().splitlines()]
        assert {line["image"][0] for line in unsolved} == {"a.png"}
        Path("out/pairs.jsonl").unlink()
    assert not engine.requests
    assert '"a.png' not in Path("out/journal-00000-of-00001.jsonl").read_text()


def test_equal_questions_with_other_options_are_not_repeated(tmp_path: Path) -> None:
    lines = [
        {"question": "Which?", "chosen": "It is one of them.\nFinal answer: B", "options": [animal, "7"]}
        for animal in ("cat", "dog", "cat")
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pipeline = DropoutNTP(DropoutNTPConfig(samples=1))
    summary = run(pipeline, tmp_path / "items.jsonl", tmp_path / "out")
    assert summary.lines["pairs"] == 3
    assert summary.notes == {"pairs of questions that occur more than once": 1}


def test_duplicates_leave_the_order_of_the_responses() -> None:
    result = ItemResult()
    texts = ["a", "b", "c", " b", "a"]
    responses = distinct([RatedResponse(text, 0.0, {}) for text in texts], result)
    assert [response.text for response in responses] == ["a", "b", "c"]
    assert result.skipped == {"sample is a duplicate": 2}


def test_memory_stays_flat(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", RECORDS // 2)
    engine = StubEngine()
    engine.keep_requests = False
    peaks = []
    for limit in (RECORDS // 20, RECORDS // 2):
        tracemalloc.start()
        run(PIPELINES["dropout_ntp"](), items, tmp_path / f"out-{limit}", engine, limit=limit)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000  # the records alone would take more than that


@pytest.mark.parametrize(
    "text",
    ["I see " + "a cat and " * 10, "\u4e00\u53ea\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u3002" * 8, "x" * 60,
     " ".join(f"the red car is next to the blue car , and {number} so on" for number in "ab" * 8)],
)  # fmt: skip
def test_loops_are_seen(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    ["", "7", "no no no no no", "The sum is 10000000000000000000.", "a b c d e f g h i j k l m n o p",
     "\n".join(f"Step {number}: add {number} to {number * 7}, which gives {number * 8}." for number in range(40))],
)  # fmt: skip
def test_what_is_no_loop_is_let_through(text: str) -> None:
    assert not is_degenerate(text)

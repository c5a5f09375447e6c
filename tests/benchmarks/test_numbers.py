"""The figures of README.md and docs/: those in blocks are what the result files say, the others have a source."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks import by_hand, check_model, machine_code, numbers, schema, suite
from benchmarks.measure import provenance
from mpo_ext.plan import machines
from mpo_ext.plan.roofline import LossShape

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
PAGES = numbers.pages(ROOT)
MADE = [page for page in PAGES if list(numbers.blocks(page.read_text(encoding="utf-8")))]
PREDICTED = [name for name in numbers.BLOCKS if name.startswith("predicted")]
HOW = "run `make bench` on a quiet machine (or `python -m benchmarks --render --docs` where results/ is there)"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    absent = [one for one in schema.BENCHMARKS if not (RESULTS / f"{one}.json").exists()]
    if absent:
        pytest.fail(f"results/ lacks {', '.join(absent)}: {HOW}")
    return numbers.load(RESULTS)


# ----------------------------------------------------------------------------------------- the documents as they stand


def test_readme_and_performance_hold_blocks() -> None:
    assert {"README.md", "docs/performance.md"} <= {name(page) for page in MADE}
    held = [block for page in MADE for block, _ in numbers.blocks(page.read_text(encoding="utf-8"))]
    assert set(numbers.BLOCKS) <= set(held), "a block that no page shows"


@pytest.mark.parametrize("page", MADE, ids=name)
def test_each_block_is_what_the_result_files_say(page: Path, results: dict[str, Any]) -> None:
    for block, content in numbers.blocks(page.read_text(encoding="utf-8")):
        assert content == numbers.render(block, results), f"{name(page)}: block {block!r} is not up to date: {HOW}"


def test_results_are_of_full_runs(results: dict[str, Any]) -> None:
    for one in schema.BENCHMARKS:
        assert results[one]["quick"] is False, f"results/{one}.json is of a quick run: {HOW}"
        assert "--only" not in results[one]["environment"]["command"]


def test_the_cost_model_holds_for_at_least_thirty_measured_points(results: dict[str, Any]) -> None:
    points = results["cost_model"]["points"]
    ours = [point for point in points if check_model.is_ours(point["provider"])]
    within = sum(abs(check_model.error(point)) <= check_model.WITHIN for point in ours)
    assert within >= 30, f"{within} of {len(ours)} points of mpo_ext are predicted within {check_model.WITHIN:.0%}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_quantity_outside_of_blocks_has_a_source(page: Path) -> None:
    entries = by_hand.load(RESULTS / "by_hand.json")
    found = list(by_hand.problems(name(page), page.read_text(encoding="utf-8"), entries))
    assert not found, "\n".join([*found, "Take the figure out, or say where it comes from in results/by_hand.json."])


def test_no_entry_is_of_a_page_that_is_not_there() -> None:
    assert {entry["document"] for entry in by_hand.load(RESULTS / "by_hand.json")} <= {name(page) for page in PAGES}


_HEADING = re.compile(r"^#+ .*$", re.MULTILINE)
_MADE = re.compile(r"^<!-- results: \S+ -->$.*?^<!-- end of results -->$", re.MULTILINE | re.DOTALL)
_NEGATED = re.compile(r"\b(?:no|not|nothing|never|none|nobody)\b[^.]*$", re.IGNORECASE)


def called_measured(text: str) -> list[str]:
    """Sentences that say "measured" without a negation in the sections with a block of predictions."""
    ends = [found.start() for found in _HEADING.finditer(text)]
    sections = [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    wrong = []
    for section in sections:
        if any(block.startswith("predicted") for block, _ in numbers.blocks(section)):
            prose = _MADE.sub(".", section)
            for found in re.finditer(r"\bmeasure[ds]?\b|\bmeasurements?\b", prose, re.IGNORECASE):
                before = prose[: found.start()].rpartition(".")[2]
                if not _NEGATED.search(before):
                    wrong.append(" ".join((before + found[0]).split()))
    return wrong


@pytest.mark.parametrize("page", MADE, ids=name)
def test_no_prediction_is_called_a_measurement(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not called_measured(text)
    for block, content in numbers.blocks(text):
        if block.startswith("predicted"):
            assert "predicted" in content.lower(), block
            assert "measured" not in content.lower(), block


def test_a_prediction_that_is_called_a_measurement_is_found() -> None:
    page = "# A\n\nMeasured.\n\n## B\n\n{}\n\n<!-- results: predicted_paths -->\n<!-- end of results -->\n"
    assert called_measured(page.format("As measured on a GPU.")) == ["## B As measured"]
    assert not called_measured(page.format("Nothing here was measured on a GPU."))


# --------------------------------------------------------------------------------------------------- what makes blocks


def document(benchmark: str, points: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
    made = {
        "schema": schema.VERSION,
        "benchmark": benchmark,
        "quick": True,
        "environment": provenance("python -m benchmarks", "2026-01-02T00:00:00+00:00", (0.25, 0.5, 0.5)),
        "settings": {},
        "missing": {},
        "points": points,
        **rest,
    }
    schema.check(made, benchmark)
    return made


def made_documents() -> dict[str, Any]:
    """Result files of a run that never was."""
    loss = LossShape(tokens=8, vocab=1024, dtype="float32")
    few = LossShape(tokens=8, vocab=1024, dtype="float32", share=0.125)
    wide = LossShape(tokens=8, vocab=1024, hidden=256, dtype="float32")
    floor = {"floor_s": 0.02, "share_of_floor": 0.5}
    logits = [
        suite.point("base", "mpo_ext", loss, seconds=[0.04, 0.03, 0.05], peak_bytes=3 << 20, **floor),
        suite.point("base", "eager", loss, seconds=[1.5], peak_bytes=9 << 20, **floor),
        suite.point("base", "quack cross entropy", loss, reason="ModuleNotFoundError: No module. More"),
        suite.point("share", "mpo_ext", few, seconds=[0.004], floor_s=0.002, share_of_floor=0.5),
    ]
    grads = 4 * 256 * (16 + 1024)
    linear = [
        suite.point("base", "mpo_ext", wide, seconds=[2.0], peak_bytes=grads + (5 << 20), **floor),
        suite.point("base", "mpo_ext, frozen head", wide, seconds=[1.0], peak_bytes=4 * 256 * 16 + (7 << 20), **floor),
    ]
    sizes = {
        "images": 2, "image_tokens": 256, "layers": 2, "response": 8, "batch": 1, "vocab": 1024, "hidden": 64,
    }  # fmt: skip
    steps = [
        suite.point("base=512", "TRL", None, **sizes, seconds=[6.0], peak_bytes=4 << 20, losses=[2.0, 1.0]),
        suite.point("base=512", "mpo_ext", None, **sizes, seconds=[2.0], peak_bytes=1 << 20, losses=[2.0, 1.25]),
    ]
    compared = [
        {**logits[0], "benchmark": "logits", "predicted_s": 0.05, "predicted_bytes": 1},
        {**logits[1], "benchmark": "logits", "predicted_s": 0.75, "predicted_bytes": 1},
    ]
    rates = {
        "bandwidth": 1e10, "products": {"float32": 1e11, "bfloat16": 2e11}, "kernel_rate": 1e9, "softmax_rate": 1e8,
        "fresh": 1e9, "huge": 2e9, "overhead": 1e-3,
    }  # fmt: skip
    return {
        "logits": document("logits", logits, missing={"quack cross entropy": "ModuleNotFoundError: No module. More"}),
        "linear": document("linear", linear),
        "train_step": document("train_step", steps),
        "sampling": document("sampling", [suite.point("base", "one by one", None, seconds=[2.0], prompts=4)]),
        "cost_model": document("cost_model", compared, settings={"rates": rates}),
        "machine_code": machine_code.load(RESULTS / "machine_code.json"),
    }


def rows(block: str) -> dict[str, list[str]]:
    lines = [line for line in block.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)}


def test_the_readme_has_short_tables_with_machine_and_command() -> None:
    documents = made_documents()
    for block in ("readme_logits", "readme_linear", "readme_step"):
        made = numbers.render(block, documents)
        assert all(len(cells) <= 4 for cells in rows(made).values())
        assert "threads of" in made
        assert "`python -m benchmarks`" in made
        assert "2026-01-02" in made
    made = numbers.render("readme_logits", documents)
    assert rows(made)["mpo_ext"] == ["40.0 ms", "", "4.0 ms", "3 MiB"]
    assert rows(made)["the same loss in eager torch"] == ["1.50 s", "", "", "9 MiB"]
    assert rows(made)[""] == ["float32", "bfloat16", "float32, 12% labelled", "memory, float32"]
    assert rows(made)["the floor: one read, then one read and one write in place"][:1] == ["20.0 ms"]
    assert "T = 8, V = 1,024" in made
    assert "quack" not in made


def test_full_tables_say_spread_floor_and_who_was_not_run() -> None:
    made = numbers.render("logits", made_documents())
    assert rows(made)["mpo_ext"][:3] == ["40.0 ms", "30.0 ms to 50.0 ms", "50%"]
    assert "Not run: quack's cross entropy (ModuleNotFoundError: No module)." in made


def test_memory_from_hidden_states_is_beyond_the_gradients() -> None:
    made = rows(numbers.render("linear", made_documents()))
    assert made["mpo_ext"][-2] == "5 MiB"
    assert made["mpo_ext, frozen head"][-2] == "7 MiB"


def test_steps_are_compared_with_those_of_trl() -> None:
    made = numbers.render("readme_step", made_documents())
    assert rows(made)["mpo_ext"] == ["2.00 s", "1 MiB", "3.0 times faster"]
    assert rows(made)["TRL's DPOTrainer"] == ["6.00 s", "4 MiB", ""]
    assert "differ from those of TRL's by at most 2.5e-01" in made


def test_the_check_of_the_cost_model_states_how_many_points_hold() -> None:
    made = numbers.render("cost_model", made_documents())
    assert "Of 2 measured points the predicted time of 1 is within 25% of the measured one" in made
    assert "the same loss in eager torch (logits): 1, -50%." in made


@pytest.mark.parametrize("block", numbers.BLOCKS)
def test_every_block_can_be_made_and_is_stable(block: str) -> None:
    documents = made_documents()
    made = numbers.render(block, documents)
    assert made.startswith("\n")
    assert made.endswith("\n\n")
    text = f"a\n<!-- results: {block} -->\nold\n<!-- end of results -->\nb\n"
    new = numbers.rewrite(text, documents)
    assert new == f"a\n<!-- results: {block} -->\n{made}<!-- end of results -->\nb\n"
    assert numbers.rewrite(new, documents) == new


@pytest.mark.parametrize("block", PREDICTED)
def test_predictions_follow_the_cost_model(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numbers.render(block, made_documents())
    slower = {one: dataclasses.replace(sheet, bandwidth=sheet.bandwidth / 2) for one, sheet in machines.GPUS.items()}
    monkeypatch.setattr(machines, "GPUS", slower)
    assert numbers.render(block, made_documents()) != before


def test_products_are_counted_in_the_cost_model() -> None:
    assert numbers._products_of("mpo_ext") == "4, labelled rows"
    assert numbers._products_of("mpo_ext, frozen head") == "2, labelled rows"
    assert numbers._products_of("mpo_ext, from logits") == "3, all rows"


@pytest.mark.parametrize(
    "text",
    [
        "<!-- results: logits -->\n",
        "<!-- end of results -->\n",
        "<!-- results: logits -->\n<!-- results: linear -->\n<!-- end of results -->\n",
        "<!-- results: logits -->\n  <!-- end of results -->\n",
        "<!-- results: two words -->\n<!-- end of results -->\n",
    ],
)
def test_markers_must_come_in_pairs(text: str) -> None:
    with pytest.raises(ValueError, match="markers must come in pairs"):
        numbers.rewrite(text, made_documents())


def test_a_block_that_nobody_makes_and_a_file_that_is_not_there_are_errors() -> None:
    with pytest.raises(ValueError, match=r"block must be one of readme_logits, .*, got 'speed'"):
        numbers.render("speed", made_documents())
    with pytest.raises(ValueError, match=r"block 'logits' must have results/logits\.json, got linear"):
        numbers.render("logits", {"linear": made_documents()["linear"]})
    with pytest.raises(ValueError, match=r"block 'study_main' must have results/study\.json, got no file"):
        numbers.render("study_main", {})


def test_the_study_makes_its_own_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = types.ModuleType("benchmarks.study.tables")
    study.load = lambda path: {"from": path.name}  # type: ignore[attr-defined]
    study.tables = lambda document: {"study_main": f"| {document['from']} |"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "benchmarks.study.tables", study)
    import mpo_ext.demo

    monkeypatch.setattr(mpo_ext.demo, "study", study, raising=False)
    (tmp_path / "study.json").write_text("{}")
    documents = numbers.load(tmp_path)
    assert numbers.render("study_main", documents) == "\n| study.json |\n\n"
    with pytest.raises(ValueError, match="block must be one of study_main, got 'study_more'"):
        numbers.render("study_more", documents)


def test_a_block_that_cannot_be_made_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = "<!-- results: {} -->\nold\n<!-- end of results -->\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(block.format("speed"))
    (tmp_path / "docs" / "a.md").write_text(block.format("study_main") + block.format("data_sheets"))
    (tmp_path / "docs" / "b.md").write_text("no block\n")
    monkeypatch.chdir(tmp_path)
    assert program._write_documents({}) == 1
    assert (tmp_path / "README.md").read_text() == block.format("speed")
    page = (tmp_path / "docs" / "a.md").read_text()
    assert page.startswith(block.format("study_main"))
    assert "H100" in page
    said = capsys.readouterr()
    assert "left as it was: block must be one of" in said.err
    assert "left as it was: block 'study_main' must have results/study.json" in said.err
    assert said.out.split() == ["docs/a.md"]


def test_documents_are_not_made_of_a_quick_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--quick", "--docs"])
    assert "--docs must not be given with --quick" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "must have schema 1"),
        ({"extra": 1}, "must have schema 1"),
        ({"compiler": ""}, "compiler must be a text"),
        ({"registers": {}}, "must not be empty"),
        ({"instructions": {"sm_90": {"x": {"per_logit": 0}}}}, "x for sm_90 must have instructions"),
    ],
)
def test_a_bad_file_of_machine_code_is_refused(change: dict[str, Any], message: str) -> None:
    good = machine_code.load(RESULTS / "machine_code.json")
    with pytest.raises(ValueError, match=message):
        machine_code.check({**good, **change}, "x.json")


# --------------------------------------------------------------------------------------------------- figures in prose


def found(text: str) -> list[str]:
    return [" ".join(text[begin:end].split()) for begin, end in by_hand.quantities(text)]


@pytest.mark.parametrize(
    ("text", "quantity"),
    [
        ("it took 9.5 s in all", "9.5 s"),
        ("99.7 ms", "99.7 ms"),
        ("about 0.8 us", "0.8 us"),
        ("in 20 min", "20 min"),
        ("within 25 %", "25 %"),
        ("within 25%", "25%"),
        ("1,187 MiB more", "1,187 MiB"),
        ("from 4 to 7 GiB", "4 to 7 GiB"),
        ("3.35 TB/s", "3.35 TB/s"),
        ("at 989 TFLOP/s", "989 TFLOP/s"),
        ("900 tokens/s", "900 tokens/s"),
        ("14.9 times faster", "14.9 times"),
        ("2.1x", "2.1x"),
        ("3 x faster", "3 x"),
        ("0.39 of the memory", "0.39 of the memory"),
        ("falls 29\n  points", "29 points"),
        ("0.143 to 0.599 nats", "0.143 to 0.599 nats"),
        ("in about two minutes", "two minutes"),
        ("a quarter of an hour", "quarter of an hour"),
        ("costs a few percent", "a few percent"),
        ("is four times faster", "four times faster"),
        ("| MPO | 60.6 |", "60.6"),
        ("| MPO | 60.6 ± 1.3 |", "60.6 ± 1.3"),
    ],
)
def test_quantities_are_found(text: str, quantity: str) -> None:
    assert found(text) == [quantity]


@pytest.mark.parametrize(
    "text",
    [
        "8192 x 151674 elements",
        "a rate of 1e-6",
        "torch 2.13.0 and arXiv 2404.04656",
        "a second model",
        "16-byte loads",
        "V = 151,936, D = 896",
        "float32 and 4-bit weights",
        "| rank | 16 |",
        "```bash\nsleep 3 s\n```",
        "<!-- not run: takes 3 hours -->",
        "<!-- results: logits -->\n12 ms\n<!-- end of results -->",
    ],
)
def test_other_numbers_and_what_is_left_out_are_not(text: str) -> None:
    assert found(text) == []


ENTRY = {
    "document": "a.md", "text": "took 3 s and 4 MiB", "kind": "measured", "command": "c", "machine": "m", "date": "d",
}  # fmt: skip


def test_a_quantity_must_lie_within_the_quoted_passage() -> None:
    assert not list(by_hand.problems("a.md", "It took 3 s\nand 4 MiB.", [ENTRY]))
    (problem,) = by_hand.problems("a.md", "x\nIt took 3 s and 4 MiB, then 5 s.", [ENTRY])
    assert problem.startswith("a.md:2: '5 s' has no source")
    (problem,) = by_hand.problems("b.md", "It took 3 s", [ENTRY])
    assert problem.startswith("b.md:1: '3 s' has no source")


def test_an_entry_must_quote_a_quantity_that_stands_there() -> None:
    (problem,) = by_hand.problems("a.md", "It took long.", [ENTRY])
    assert "quotes what does not stand there: 'took 3 s and 4 MiB'" in problem
    (problem,) = by_hand.problems("a.md", "It took long.", [{**ENTRY, "text": "took long"}])
    assert "quotes no quantity: 'took long'" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "guess"}, "kind must be one of measured, arithmetic, paper, setting, got 'guess'"),
        ({"machine": ""}, "an entry of kind measured must say machine"),
        ({"date": None}, "an entry of kind measured must say date"),
        ({"kind": "paper"}, "an entry of kind paper must say source"),
        ({"kind": "arithmetic"}, "an entry of kind arithmetic must say formula"),
        ({"text": " "}, "must say text"),
        ({"by": "x"}, "fields must be among"),
    ],
)
def test_a_bad_entry_is_refused(change: dict[str, Any], message: str) -> None:
    by_hand.check(ENTRY, "x")
    with pytest.raises(ValueError, match=message):
        by_hand.check({**ENTRY, **change}, "x")

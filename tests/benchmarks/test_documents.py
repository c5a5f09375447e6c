"""Tests that the generated sections of README.md and docs/ agree with results/."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as program
from benchmarks import (
    audit,
    check_model,
    documents,
    hardware,
    integrations,
    machine_code,
    pipelines,
    predictions,
    schema,
    suite,
)
from benchmarks.measure import provenance
from benchmarks.study import tables as study
from mpo_ext.plan import machines
from mpo_ext.plan.roofline import LossShape

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
PAGES = documents.pages(ROOT)
MADE = [page for page in PAGES if list(documents.blocks(page.read_text(encoding="utf-8")))]
PREDICTED = [name for name in documents.BLOCKS if name.startswith("predicted")]
HOW = "run `make bench` on a quiet machine (or `python -m benchmarks --render --docs` where results/ is there)"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    absent = [one for one in schema.ON_CPU if not (RESULTS / f"{one}.json").exists()]
    if absent:
        pytest.fail(f"results/ lacks {', '.join(absent)}: {HOW}")
    return documents.load(RESULTS)


# ----------------------------------------------------------------------------------------- the documents as they stand


def test_readme_and_performance_hold_blocks() -> None:
    assert {"README.md", "docs/performance.md"} <= {name(page) for page in MADE}
    held = [block for page in MADE for block, _ in documents.blocks(page.read_text(encoding="utf-8"))]
    assert set(documents.BLOCKS) <= set(held), "a block that no page shows"


@pytest.mark.parametrize("page", MADE, ids=name)
def test_each_block_is_up_to_date(page: Path, results: dict[str, Any]) -> None:
    for block, content in documents.blocks(page.read_text(encoding="utf-8")):
        assert content == documents.render(block, results), f"{name(page)}: block {block!r} is not up to date: {HOW}"


def test_results_are_of_full_runs_on_one_machine(results: dict[str, Any]) -> None:
    machines = set()
    for one in schema.ON_CPU:
        assert results[one]["quick"] is False, f"results/{one}.json is of a quick run: {HOW}"
        environment = results[one]["environment"]
        machines.add((environment["cpu"], environment["threads"], environment["versions"]["torch"]))
    assert len(machines) == 1, f"benchmarks that ran separately must have run on one machine, got {machines}"


def test_the_cost_model_holds_for_at_least_thirty_measured_points(results: dict[str, Any]) -> None:
    points = results["cost_model"]["points"]
    ours = [point for point in points if check_model.is_ours(point["provider"])]
    within = sum(abs(check_model.error(point)) <= check_model.WITHIN for point in ours)
    assert within >= 30, f"{within} of {len(ours)} points of mpo_ext are predicted within {check_model.WITHIN:.0%}"


@pytest.mark.parametrize(
    ("gigabytes", "size"), [(1, 24), (21.6, 24), (21.7, 48), (43.2, 48), (60, 80), (126.9, 141), (127, None)]
)
def test_the_smallest_gpu(gigabytes: float, size: int | None) -> None:
    assert hardware.smallest_gpu(round(gigabytes * 1e9)) == size


@pytest.mark.parametrize("page", MADE, ids=name)
def test_no_prediction_is_called_a_measurement(page: Path) -> None:
    for block, content in documents.blocks(page.read_text(encoding="utf-8")):
        if block.startswith("predicted"):
            assert "predicted" in content.lower(), block
            assert "measured" not in content.lower(), block


# --------------------------------------------------------------------------------------------------- what makes blocks


def make_document(benchmark: str, points: list[dict[str, Any]], **rest: Any) -> dict[str, Any]:
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


def make_documents() -> dict[str, Any]:
    """Returns the contents of all result files: some have made-up numbers, and some are read from results/."""
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
        "bandwidth": 1e10, "matmul_rates": {"float32": 1e11, "bfloat16": 2e11}, "kernel_rate": 1e9,
        "softmax_rate": 1e8, "fresh": 1e9, "huge": 2e9, "overhead": 1e-3,
    }  # fmt: skip
    return {
        "logits": make_document(
            "logits", logits, missing={"quack cross entropy": "ModuleNotFoundError: No module. More"}
        ),
        "linear": make_document("linear", linear),
        "train_step": make_document("train_step", steps),
        "sampling": make_document("sampling", [suite.point("base", "one by one", None, seconds=[2.0], prompts=4)]),
        "cost_model": make_document("cost_model", compared, settings={"rates": rates}),
        "machine_code": machine_code.load(RESULTS / "machine_code.json"),
        "audit": audit.load(RESULTS / "audit.json"),
        "pipelines": pipelines.load(RESULTS / "pipelines.json"),
        "study": study.load(RESULTS / "study.json"),
        "study_prior": study.load(RESULTS / "study_prior.json"),
        "integrations": make_integrations(),
    }


def make_integrations() -> dict[str, Any]:
    run = {
        "command": "python side_by_side.py trl", "date": "2026-11-30", "version": "1.16.0",
        "own": {"seconds": 9.0, "cpu_seconds": 6.0, "peak_mib": 4000.0},
        "mpo": {"seconds": 3.0, "cpu_seconds": 1.5, "peak_mib": 1000.0}, "largest_loss_difference": 1e-6,
    }  # fmt: skip
    tests = {"versions": {"openrlhf": "0.11.2", "verl": "0.9.1"}, "passed": 3, "skipped": 0, "date": "2026-11-30"}
    document = {"schema": 1, "runs": {"trl 1.16.0": run}, "tests": {"log-probs": tests}}
    integrations.check(document, "made up")
    return document


def test_the_figures_of_other_trainers_are_ratios_of_before_and_after() -> None:
    (cells,) = [cells for key, cells in rows(documents.render("integrations_runs", make_documents())).items()
                if key.startswith("TRL")]  # fmt: skip
    assert cells == ["9.0 s", "3.0 s", "3.0", "4.0", "4,000 MiB", "1,000 MiB", "0.25"]
    assert "OpenRLHF 0.11.2, verl 0.9.1" in documents.render("integrations_tests", make_documents())
    without = {**make_integrations(), "runs": {}}
    assert "make integrations" in integrations.runs({"integrations": without})


def rows(block: str) -> dict[str, list[str]]:
    lines = [line for line in block.splitlines() if line.startswith("|") and set(line) - set("|-: ")]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)}


def test_the_readme_has_short_tables_with_machine_and_command() -> None:
    results = make_documents()
    for block in ("readme_logits", "readme_step"):
        made = documents.render(block, results)
        assert all(len(cells) <= 4 for cells in rows(made).values())
        assert "threads of" in made or "1 thread of" in made
        assert "`python -m benchmarks`" in made
        assert "2026-01-02" in made
    made = documents.render("readme_logits", results)
    assert rows(made)["mpo_ext"] == ["40.0 ms", "4.0 ms", "3 MiB"]
    assert rows(made)["the same loss in eager torch"] == ["1.50 s", "", "9 MiB"]
    assert rows(made)["method"] == ["float32", "float32, 12% labelled", "memory, float32"]
    assert rows(made)["only reading the logits twice and writing them once, in torch"][:1] == ["20.0 ms"]
    assert "T = 8, V = 1,024" in made
    assert "quack" not in made


def test_full_tables_have_spread_floor_and_missing_providers() -> None:
    made = documents.render("logits", make_documents())
    assert rows(made)["mpo_ext"][:3] == ["40.0 ms", "30.0 ms to 50.0 ms", "50%"]
    assert "Not run:\n\n- quack's cross entropy: ModuleNotFoundError: No module" in made


def test_memory_from_hidden_states_is_beyond_the_gradients() -> None:
    made = rows(documents.render("linear", make_documents()))
    assert made["mpo_ext"][-1] == "5 MiB"
    assert made["mpo_ext, frozen head"][-1] == "7 MiB"


def test_steps_are_compared_with_those_of_trl() -> None:
    made = documents.render("readme_step", make_documents())
    assert rows(made)["mpo_ext"] == ["2.00 s", "1 MiB", "3.0 times faster"]
    assert rows(made)["TRL's DPOTrainer"] == ["6.00 s", "4 MiB", ""]
    assert "differ from those of TRL by at most 2.5e-01" in made


def test_the_check_of_the_cost_model_states_how_many_points_hold() -> None:
    made = documents.render("cost_model", make_documents())
    assert "within 25% of the measured time for 1 of 2 points" in made
    assert rows(made)["the same loss in eager torch"] == ["logits", "1", "-50.0%"]


@pytest.mark.parametrize("block", documents.BLOCKS)
def test_every_block_can_be_made_and_is_stable(block: str) -> None:
    results = make_documents()
    made = documents.render(block, results)
    assert made.startswith("\n")
    assert made.endswith("\n\n")
    text = f"a\n<!-- results: {block} -->\nold\n<!-- end of results -->\nb\n"
    new = documents.rewrite(text, results)
    assert new == f"a\n<!-- results: {block} -->\n{made}<!-- end of results -->\nb\n"
    assert documents.rewrite(new, results) == new


@pytest.mark.parametrize("block", [name for name in PREDICTED if name != "predicted_gpus"])  # memory alone
def test_predictions_follow_the_cost_model(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = documents.render(block, make_documents())
    slower = {gpu: dataclasses.replace(sheet, bandwidth=sheet.bandwidth / 2) for gpu, sheet in machines.GPUS.items()}
    monkeypatch.setattr(machines, "GPUS", slower)
    assert documents.render(block, make_documents()) != before


def test_products_are_counted_in_the_cost_model() -> None:
    assert predictions.products_of("mpo_ext") == "4, labelled rows"
    assert predictions.products_of("mpo_ext, frozen head") == "2, labelled rows"
    assert predictions.products_of("mpo_ext, from logits") == "3, all rows"


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
        documents.rewrite(text, make_documents())


def test_an_unknown_block_and_a_missing_file_are_errors() -> None:
    with pytest.raises(ValueError, match=r"block must be one of readme_logits, .*, got 'speed'"):
        documents.render("speed", make_documents())
    with pytest.raises(ValueError, match=r"block 'logits' must have results/logits\.json, got linear"):
        documents.render("logits", {"linear": make_documents()["linear"]})
    with pytest.raises(ValueError, match=r"block 'study_main' must have results/study\.json, got no file"):
        documents.render("study_main", {})


def test_the_study_has_its_blocks(results: dict[str, Any]) -> None:
    only = {"study": results["study"]}
    assert "| SFT start " in documents.render("study_main", only)
    assert " compared with |" in documents.render("study_differences", only)


def test_a_block_that_cannot_be_made_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = "<!-- results: {} -->\nold\n<!-- end of results -->\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(block.format("speed"))
    (tmp_path / "docs" / "a.md").write_text(block.format("study_main") + block.format("data_sheets"))
    (tmp_path / "docs" / "b.md").write_text("no block\n")
    monkeypatch.chdir(tmp_path)
    assert documents.write_pages({}) == 1
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
def test_a_bad_file_of_machine_code_is_rejected(change: dict[str, Any], message: str) -> None:
    good = machine_code.load(RESULTS / "machine_code.json")
    with pytest.raises(ValueError, match=message):
        machine_code.check({**good, **change}, "x.json")

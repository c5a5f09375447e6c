"""Tests the study's RLAIF-V judge: it splits a response into claims and checks each claim with a direct question."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

for package in ("torch", "transformers", "sklearn", "PIL"):
    pytest.importorskip(package)

from benchmarks.study.reading_judge import ReadingJudge, claims_of, config
from mpo_ext.demo import digits
from mpo_ext.demo.reading import CELLS
from mpo_ext.generate.engine import Generation, Request
from mpo_ext.generate.items import item_files, read_items
from mpo_ext.generate.rlaif_v import RlaifV
from mpo_ext.generate.routing import RoutedEngine

QUESTION = f"Which digit is largest ? {digits.INSTRUCTIONS['cot']}"
RIGHT = "top-left 3 , top-right 4 , bottom-left 5 , bottom-right 9 . Final answer: 9"
WRONG = "top-left 3 , top-right 4 , bottom-left 5 , bottom-right 6 . Final answer: 6"


def test_the_claims_of_a_response_are_its_digits_and_its_answer() -> None:
    cells = CELLS[2]
    assert claims_of(QUESTION, RIGHT, cells) == [
        "top-left is 3", "top-right is 4", "bottom-left is 5", "bottom-right is 9", "largest is 9",
    ]  # fmt: skip
    asked = f"Which digit is top-right ? {digits.INSTRUCTIONS['cot']}"
    assert claims_of(asked, RIGHT.replace(": 9", ": 4"), cells).count("top-right is 4") == 1
    assert "top-right is 9" in claims_of(asked, RIGHT, cells)
    assert claims_of(QUESTION, "no digit", cells) == []


@dataclasses.dataclass
class ScriptedEngine:
    """An engine with scripted answers.

    Every second step-by-step question gets a wrong answer. ``truth`` has the answers to direct questions.
    """

    truth: dict[str, str]
    name: str = "scripted"
    asked: list[str] = dataclasses.field(default_factory=list)

    def settings(self) -> dict[str, Any]:
        return {}

    def generate(self, requests: list[Request]) -> list[Generation]:
        texts = []
        for number, request in enumerate(requests):
            subject = request.question.removeprefix("Which digit is ").partition(" ? ")[0]
            if request.question.endswith(digits.INSTRUCTIONS["direct"]):
                assert len(request.images) == 1
                self.asked.append(subject)
                texts.append(self.truth[subject])
            else:
                texts.append((RIGHT, WRONG)[number % 2])
        return [Generation(tuple(range(len(text.split()))), text, "stop") for text in texts]


def test_the_response_that_the_direct_answers_confirm_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text(json.dumps({"image": "grid.png", "question": QUESTION}) + "\n")
    Image.new("L", (32, 32)).save(tmp_path / "grid.png")
    engine = ScriptedEngine(
        {"top-left": "3", "top-right": "4", "bottom-left": "5", "bottom-right": "9", "largest": "9"}
    )
    pipeline = RlaifV(config(samples=4, temperature=1.0, seed=0, pairs_per_question=2))
    (item,) = read_items(item_files(tmp_path / "items.jsonl", image_root=str(tmp_path)))
    judge = ReadingJudge(engine, 2)
    (records,) = pipeline.sample([item], RoutedEngine(engine, judge))
    result = pipeline.make_pairs(item, records, "scripted")
    ((_, pair),) = result.lines
    assert (pair["chosen"], pair["rejected"]) == (RIGHT, WRONG)
    assert pair["provenance"]["rejected_claims"] == [0, 2]
    assert sorted(engine.asked) == sorted([*CELLS[2], "bottom-right", "largest", "largest"])  # each claim once
    assert judge.claim_tokens == 2 * 5 * 4  # two different responses of five claims of four words

"""Tests the files for other evaluation toolkits, and the HTML page of failed questions."""

import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scripted_engine import ScriptedEngine, SeeingEngine, write_lines

from mpo_ext.evaluate.run import evaluate
from mpo_ext.evaluate.scoring import EvaluationConfig
from mpo_ext.generate.engine import Generation

COT = EvaluationConfig(prompts=("cot",))
HOSTILE = "</script><script>alert(1)</script> \"\t' \u2028 ]]> <!--"


class Page(HTMLParser):
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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    return write_lines(
        tmp_path / "d.jsonl",
        [
            {"question": "easy", "answer_gt": "1"},
            {"question": "hard", "answer_gt": ["2", "two"], "options": ["2", "two"], "category": "c", "index": 77,
             "image": "red.png"},
            {"question": f"odd {HOSTILE}", "answer_gt": "3", "image": "none.png"},
            {"question": f"late {HOSTILE}", "answer_gt": "4"},
        ],
    )  # fmt: skip


class RefusingEngine(ScriptedEngine):
    """Refuses some questions."""

    def __init__(self, answers: dict[str, list[str]], *, refused: str = "a") -> None:
        super().__init__(answers)
        self.refused = refused

    def _answer(self, request: Any) -> Any:
        if request.question.splitlines()[0] in self.refused:
            return Generation((), "", "stop", refusal="too long")
        return super()._answer(request)


ANSWERS = {
    "a": {"easy": "Final answer: 1", "hard": "First line\n\tand\nFinal answer: two", f"late {HOSTILE}": "?..."},
    "b": {"easy": "Final answer: 1", "hard": "Final answer: 3", f"late {HOSTILE}": f"{HOSTILE}\nFinal answer: 5"},
}


def run(data: Path, out: Path, **options: Any) -> Any:
    # splitlines() also splits at U+2028.
    models = {
        name: ScriptedEngine({question.splitlines()[0]: [text] for question, text in own.items()})
        for name, own in ANSWERS.items()
    }
    return evaluate(models, {"d": data}, out, config=COT, image_root=str(data.parent), **options)


def test_vlmevalkit_reads_its_table(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", exports=["vlmevalkit"])
    path = tmp_path / "out" / "vlmevalkit" / "a" / "a_d-cot.tsv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert list(rows[0])[:2] == ["index", "question"]
    assert set(rows[0]) == {
        "index", "question", "answer", "prediction", "extracted", "hit", "A", "B", "category"
    }  # fmt: skip
    assert [row["index"] for row in rows] == ["0", "77", "3"]
    assert (rows[1]["A"], rows[1]["B"], rows[1]["category"], rows[0]["A"]) == ("2", "two", "c", "")
    assert rows[1]["prediction"] == "First line\n\tand\nFinal answer: two"
    assert [(row["extracted"], row["hit"]) for row in rows] == [("1", "1"), ("two", "1"), ("", "0")]
    assert rows[2]["question"] == f"late {HOSTILE}"
    pandas = pytest.importorskip("pandas", reason="needs pandas, which dev installs")
    table = pandas.read_csv(path, sep="\t")  # like VLMEvalKit
    assert table["prediction"].tolist() == [row["prediction"] for row in rows]
    assert table["answer"].tolist()[0] == "1"


def test_lmms_eval_has_its_keys(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "out", exports=["lmms-eval"])
    lines = (tmp_path / "out" / "lmms-eval" / "a" / "mpo-ext_samples_d-cot.jsonl").read_text().split("\n")[:-1]
    samples = [json.loads(line) for line in lines]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 3]
    easy, hard, late = samples
    assert set(easy) == {
        "doc_id", "target", "input", "resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash", "exact_match"
    }  # fmt: skip
    assert (easy["target"], easy["resps"], easy["filtered_resps"]) == ("1", [["Final answer: 1"]], ["1"])
    assert (easy["exact_match"], hard["exact_match"], late["exact_match"]) == (1.0, 1.0, 0.0)
    assert late["filtered_resps"] == ["[invalid]"]
    assert hard["input"].startswith("hard\nA. 2\nB. two\n\nReason")
    assert easy["prompt_hash"] == hashlib.sha256(easy["input"].encode()).hexdigest()
    assert len({sample["doc_hash"] for sample in samples}) == 3


def test_lmms_eval_keeps_all_samples_of_a_question(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", [{"question": "a", "answer_gt": "7"}])
    config = EvaluationConfig(prompts=("cot",), samples=2, temperature=1.0)
    engine = ScriptedEngine({"a": ["Final answer: 7", "?"]})
    evaluate({"m": engine}, {"d": data}, tmp_path / "out", config=config, exports=["lmms-eval", "vlmevalkit"])
    (line,) = (tmp_path / "out" / "lmms-eval" / "m" / "mpo-ext_samples_d-cot.jsonl").read_text().splitlines()
    sample = json.loads(line)
    assert (sample["resps"], sample["filtered_resps"]) == ([["Final answer: 7", "?"]], [["7", "[invalid]"]])
    assert sample["exact_match"] == 0.5
    for number, hit in enumerate("10"):
        table = (tmp_path / "out" / "vlmevalkit" / "m" / f"m_d-cot_sample{number}.tsv").read_text()
        assert table.rstrip().endswith(f'"{hit}"')


def test_the_page_shows_the_failures_and_escapes_all_text(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    run(data, tmp_path / "out")
    text = (tmp_path / "out" / "failures.html").read_text()
    page = Page(text)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert len(page.scripts) == 2
    assert not set("<>&\u2028\u2029") & set(page.scripts[0])
    assert "http" not in text.replace("http-equiv", "")
    assert "2 of 4 questions have a wrong answer" in text
    assert "1 questions could not be asked" in text
    shown = json.loads(page.scripts[0])
    assert shown["columns"] == ["a, cot", "b, cot"]
    hard, late = shown["items"]
    assert (hard["question"], hard["truth"], hard["where"]) == ("hard", "2 | two", "d 2")
    assert hard["images"] == [{"name": "red.png", "index": 0}]
    assert shown["images"][0].startswith("data:image/jpeg;base64,")
    assert [answers["right"] for answers in hard["answers"]] == [1, 0]
    (sample,) = hard["answers"][1]["samples"]
    # 3 is not an option of this question.
    assert sample == {"text": "Final answer: 3", "answer": "3", "right": False, "unreadable": True, "cutOff": False}
    assert late["question"] == f"late {HOSTILE}"
    assert (late["answers"][0]["unreadable"], late["answers"][0]["cutOff"]) == (1, 1)
    assert late["answers"][1]["samples"][0]["text"].startswith(HOSTILE)
    options = [tag for tag, attributes in page.tags if tag == "option"]
    assert len(options) == 2 + 4 * 3  # data, and two models in each of four filters


def test_the_page_lists_wrong_answers_with_the_image_only(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    lines = [{"question": question, "image": "a.png", "answer_gt": "7"} for question in ("seen", "misread")]
    data = write_lines(tmp_path / "d.jsonl", lines)

    right, wrong = ["Final answer: 7"], ["Final answer: 1"]
    engine = SeeingEngine({"seen": right, "misread": wrong}, {"seen": wrong, "misread": right})
    config = EvaluationConfig(prompts=("cot",), without_image=True)
    evaluate({"m": engine}, {"d": data}, tmp_path / "out", config=config, image_root=str(tmp_path))
    text = (tmp_path / "out" / "failures.html").read_text()
    shown = json.loads(Page(text).scripts[0])
    assert [item["question"] for item in shown["items"]] == ["misread"]
    assert shown["columns"] == ["m, cot", "m, cot-without-image"]
    assert "1 of 2 questions have a wrong answer" in text
    assert "Answers without the image stand in the columns of the prompts ending in -without-image" in text


def test_the_page_reports_omissions(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    count = 50
    data = write_lines(tmp_path / "d.jsonl", [{"question": f"Q{n}", "answer_gt": "7"} for n in range(count)])
    engine = ScriptedEngine({f"Q{n}": ["x" * 9000] for n in range(count)})
    picked = []
    for seed in (0, 1):
        config = EvaluationConfig(prompts=("cot",), seed=seed)
        evaluate({"m": engine}, {"d": data}, tmp_path / str(seed), config=config, page_limit=10)
        text = (tmp_path / str(seed) / "failures.html").read_text()
        assert f"10 of them are shown, drawn at random with seed {seed}." in text
        assert "[1,000 more characters]" in text
        picked.append([item["where"] for item in json.loads(Page(text).scripts[0])["items"]])
    assert picked[0] != picked[1]
    assert [len(one) for one in picked] == [10, 10]


def test_wrong_samples_come_first_if_there_are_too_many(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    data = write_lines(tmp_path / "d.jsonl", [{"question": "a", "answer_gt": "7"}])
    texts = [f"Final answer: {7 if n < 10 else n}" for n in range(12)]
    config = EvaluationConfig(prompts=("cot",), samples=12, temperature=1.0)
    evaluate({"m": ScriptedEngine({"a": texts})}, {"d": data}, tmp_path / "out", config=config)
    (item,) = json.loads(Page((tmp_path / "out" / "failures.html").read_text()).scripts[0])["items"]
    (answers,) = item["answers"]
    assert (answers["right"], answers["count"]) == (10, 12)
    assert [sample["answer"] for sample in answers["samples"]] == ["7"] * 6 + ["10", "11"]


def test_the_pages_of_equal_runs_are_equal(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    run(data, tmp_path / "one")
    run(data, tmp_path / "two")
    one, two = ((tmp_path / name / "failures.html").read_bytes() for name in ("one", "two"))
    assert one == two
    assert re.search(rb"nonce-[0-9a-f]{32}'", one)


def test_a_lone_surrogate_in_a_response_is_written(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    data = write_lines(tmp_path / "d.jsonl", [{"question": "a", "answer_gt": "7"}])
    engine = ScriptedEngine({"a": ["\ud83d Final answer: \udc00"]})
    evaluate({"m": engine}, {"d": data}, tmp_path / "out", config=COT, exports=["vlmevalkit", "lmms-eval"])
    assert (tmp_path / "out" / "results.json").exists()
    (item,) = json.loads(Page((tmp_path / "out" / "failures.html").read_text()).scripts[0])["items"]
    assert item["answers"][0]["samples"][0]["answer"] == "\udc00"
    (table,) = (tmp_path / "out" / "vlmevalkit").rglob("*.tsv")
    assert "? Final answer: ?" in table.read_text()


def test_the_page_counts_questions_that_another_model_refuses(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs jinja2, which dev installs")
    data = write_lines(tmp_path / "d.jsonl", [{"question": q, "answer_gt": "7"} for q in ("a", "b")])
    answers = {"a": ["Final answer: 7"], "b": ["Final answer: 8"]}
    models = {"m": ScriptedEngine(answers), "n": RefusingEngine(answers), "o": RefusingEngine(answers, refused="ab")}
    results = evaluate(models, {"d": data}, tmp_path / "out", config=COT)["results"]
    assert [row["accuracy"] for row in results] == [0.5, 0.0, None]
    assert "2 questions could not be asked of all models" in (tmp_path / "out" / "failures.html").read_text()
    picture = tmp_path / "out" / "accuracy.svg"
    if picture.exists():
        assert "<!-- nan -->" not in picture.read_text()
        assert picture.read_text().count("<!-- 0.0 -->") == 1  # the bar of "n"; "o" has no bar

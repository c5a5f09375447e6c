"""Tests the prompts of resumed runs.

A run does not resume with another processor. The prompts keep the date of the first start.
"""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for package in ("transformers", "sklearn", "PIL"):
    pytest.importorskip(package)

import torch

from mpo_ext.demo.model import build_model, build_processor
from mpo_ext.evaluate.models import set_weights
from mpo_ext.evaluate.run import evaluate
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.routing import RoutedEngine
from mpo_ext.generate.runner import run
from mpo_ext.generate.sampler import journal_path
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.journal import SettingsMismatchError

DATED = "{{ strftime_now('%d') }} "
FRIDAY = datetime.date(2024, 7, 26)
SATURDAY = datetime.date(2024, 7, 27)


def make_engine(change: Callable[[Any], Any] = lambda processor: None, **options: Any) -> TransformersEngine:
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer, hidden_size=32, layers=1)
    change(processor)
    return TransformersEngine(model, processor, name="tiny", **options)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    lines = [{"question": f"Read row {number} .", "answer_gt": str(number)} for number in range(1, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sample(items: Path, out: Path, engine: TransformersEngine) -> Any:
    sampling = SamplingConfig(max_new_tokens=3)
    return run(Correctness(CorrectnessConfig(samples=2, sampling=sampling)), engine, items, out)


def weighed() -> TransformersEngine:
    engine = make_engine()
    set_weights(engine)
    return engine


def header(out: Path) -> dict[str, Any]:
    with open(journal_path(out, 0, 1)) as file:
        return json.loads(file.readline())["settings"]["engine"]


def set_template(processor: Any) -> None:
    processor.chat_template = processor.chat_template.replace("{{ '<|user|> '", "{{ 'user <|user|> '")


def set_words(processor: Any) -> None:
    processor.tokenizer.add_tokens(["another"])


def set_mean(processor: Any) -> None:
    processor.image_processor.image_mean = [0.5] * 3


def set_image_tokens(processor: Any) -> None:
    processor.image_seq_length = 8


@pytest.mark.parametrize(
    ("change", "options", "setting"),
    [
        (set_template, {}, "chat_template"),
        (set_words, {}, "tokenizer"),
        (set_mean, {}, "image_processor.image_mean"),
        (set_image_tokens, {}, "processor.image_seq_length"),
        (lambda processor: None, {"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ],
)
def test_another_processor_is_refused_by_name(
    tmp_path: Path, items: Path, change: Callable[[Any], Any], options: dict[str, Any], setting: str
) -> None:
    out = tmp_path / "out"
    sample(items, out, make_engine())
    sample(items, out, make_engine())
    with pytest.raises(SettingsMismatchError, match=rf"engine\.processor\.{setting}"):
        sample(items, out, make_engine(change, **options))
    questions, folder = {"q": items}, tmp_path / "evaluation"
    evaluate({"m": make_engine()}, questions, folder)
    with pytest.raises(SettingsMismatchError, match=rf"engine\.processor\.{setting}"):
        evaluate({"m": make_engine(change, **options)}, questions, folder)


def test_other_stop_tokens_are_refused(tmp_path: Path, items: Path) -> None:
    sample(items, tmp_path / "out", make_engine())
    engine = make_engine()
    engine.model.generation_config.eos_token_id = [engine.chat.end_id, 9]
    with pytest.raises(SettingsMismatchError, match=r"engine\.processor\.end_ids: \[1\] in the file, \[1, 9\] now"):
        sample(items, tmp_path / "out", TransformersEngine(engine.model, engine.processor, name="tiny"))


@pytest.mark.parametrize("as_judge", [False, True])
def test_other_weights_in_the_same_folder_are_refused(tmp_path: Path, items: Path, as_judge: bool) -> None:
    def engine(other: bool) -> Any:
        changed, unchanged = make_engine(), make_engine()
        with torch.no_grad():
            next(changed.model.parameters()).add_(other)
        for part in (changed, unchanged):
            set_weights(part)
        return RoutedEngine(unchanged, changed) if as_judge else changed

    out = tmp_path / "out"
    sample(items, out, engine(False))
    sample(items, out, engine(False))
    with pytest.raises(SettingsMismatchError, match=r"engine\.judge\.weights" if as_judge else r"engine\.weights"):
        sample(items, out, engine(True))


@pytest.mark.parametrize("fields", [["processor"], ["weights"], ["processor", "weights"]])
def test_journals_of_earlier_versions_still_resume(tmp_path: Path, items: Path, fields: list[str]) -> None:
    out = tmp_path / "out"
    sample(items, out, weighed())
    outputs = (out / "summary.json").read_bytes()
    path = journal_path(out, 0, 1)
    first, *records = path.read_text().splitlines()
    values = json.loads(first)
    for field in fields:
        del values["settings"]["engine"][field]
    path.write_text("\n".join([json.dumps(values), *records[:2]]) + "\n")
    sample(items, out, weighed())
    assert not set(fields) & set(header(out))
    assert (out / "summary.json").read_bytes() == outputs
    assert path.read_text().splitlines()[1:] == records


def dated(date: datetime.date) -> TransformersEngine:
    template = DATED + build_processor().chat_template
    return make_engine(chat_template=template, date=date)


def test_a_run_keeps_the_date_of_its_prompts(tmp_path: Path, items: Path) -> None:
    out = tmp_path / "out"
    sample(items, out, dated(FRIDAY))
    whole = journal_path(out, 0, 1).read_text()
    journal_path(out, 0, 1).write_text("\n".join(whole.splitlines()[:3]) + "\n")  # as a kill leaves it
    engine = dated(SATURDAY)
    sample(items, out, engine)
    assert engine.chat.date == FRIDAY
    assert journal_path(out, 0, 1).read_text() == whole
    assert header(out)["processor"]["date"] == "2024-07-26"
    sample(items, tmp_path / "new", dated(SATURDAY))
    assert header(tmp_path / "new")["processor"]["date"] == "2024-07-27"


def test_an_evaluation_keeps_the_date_of_its_prompts(tmp_path: Path, items: Path) -> None:
    more = items.with_name("more.jsonl")
    more.write_text(items.read_text().replace("Read", "Read the"))
    evaluate({"m": dated(FRIDAY)}, {"q": items}, tmp_path / "out")
    results = evaluate({"m": dated(SATURDAY)}, {"more": more, "q": items}, tmp_path / "out")
    assert results is not None
    assert results["settings"]["models"]["m"]["processor"]["date"] == "2024-07-26"

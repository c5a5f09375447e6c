"""Tests model cards: their text and the picture of the training curves."""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_ext.report import Panel
from mpo_ext.train import model_card as card
from mpo_ext.train.model_card import write_card
from mpo_ext.train.recipe import DataRecipe, LoraRecipe, LossRecipe, ModelRecipe, OutputRecipe, Recipe, load_recipe

KEYS = (
    "loss", "dpo_loss", "bco_loss", "ntp_loss", "chosen_reward", "rejected_reward", "reward_margin", "reward_accuracy",
    "reward_shift", "chosen_logp", "rejected_logp", "entropy", "top1", "learning_rate", "grad_norm", "pairs",
    "chosen_tokens", "rejected_tokens", "tokens_per_s", "memory_mib",
)  # fmt: skip


def log(steps: int) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "epoch": 0.1, **{key: 1 / (step + place) for place, key in enumerate(KEYS)}})
        if step % 5 == 0:
            lines.append({"step": step, "eval_loss": 2.0 / step, "eval_reward_accuracy": 0.5})
    return lines


def make(**sections: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": ModelRecipe(path="org/base-1B"),
        "data": DataRecipe(train="pairs.jsonl"),  # type: ignore[arg-type]
        "output": OutputRecipe(dir="out"),
    }
    return Recipe(**{**given, **sections})


def write(folder: Path, recipe: Recipe, lines: list[dict[str, Any]] | None = None, **summary: Any) -> str:
    write_card(folder, recipe=recipe, curves=lines or [], summary=summary)
    return (folder / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    first, matter, _ = text.split("---\n", 2)
    assert first == ""
    return yaml.safe_load(matter)


def code(text: str, language: str) -> str:
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[2]


def test_the_front_matter_is_that_of_the_hub(tmp_path: Path) -> None:
    assert front_matter(write(tmp_path, make())) == {
        "base_model": "org/base-1B",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "tags": ["mpo", "preference-optimization", "mpo_ext"],
    }
    lora = make(model=ModelRecipe(path="org/base-1B", lora=LoraRecipe()))
    matter = front_matter(write(tmp_path, lora, datasets=["org/pairs: é"]))
    assert (matter["library_name"], matter["base_model_relation"]) == ("peft", "adapter")
    assert matter["datasets"] == ["org/pairs: é"]
    sft = make(loss=LossRecipe(dpo_weight=0, bco_weight=0))
    assert front_matter(write(tmp_path, sft))["tags"] == ["sft", "mpo_ext"]


def test_a_folder_is_not_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for path in ("models/mine", "./models", "../models", str(tmp_path), "a/b/c", "gpt2-in-a-folder"):
        text = write(tmp_path, make(model=ModelRecipe(path=path)))
        assert "base_model" not in front_matter(text)
        assert f"`{path}`" in text


def test_the_recipe_can_be_taken_out_again(tmp_path: Path) -> None:
    recipe = make(model=ModelRecipe(path="org/base-1B", chat_template="```\n{{ x }}\n````\n"))
    text = write(tmp_path, recipe)
    (tmp_path / "again.yaml").write_text(code(text, "yaml"), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_fence_is_longer_than_those_in_the_text() -> None:
    assert card._fenced("a\n```\n", "yaml") == "````yaml\na\n```\n````\n"
    assert card._fenced("a", "yaml") == "```yaml\na\n```\n"


def test_the_numbers_are_in_a_table(tmp_path: Path) -> None:
    text = write(tmp_path, make(), loss=1.234567, pairs=12345, dropped={"too | long": 3}, note="a\nb", bad=math.nan)
    rows = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"
    ]
    assert rows[0] == ["at the end", "value"]
    assert rows[2:] == [
        ["loss", "1.2346"], ["pairs", "12,345"], ["dropped: too \\| long", "3"], ["note", "a b"], ["bad", "nan"],
    ]  # fmt: skip
    assert "No numbers were recorded." in write(tmp_path, make())


def test_the_run_is_described(tmp_path: Path) -> None:
    text = write(tmp_path, make(model=ModelRecipe(path="org/b", freeze=("vision_tower",))))
    assert "0.8 x DPO + 0.2 x BCO + 1 x next-token loss, beta 0.1" in text
    assert "all weights but those of vision_tower" in text
    assert "- `pairs.jsonl` (x 1)" in text
    assert "# b, trained with MPO" in text
    assert "2411.10442" in code(text, "bibtex")
    sft = write(tmp_path, make(loss=LossRecipe(dpo_weight=0, bco_weight=0)))
    assert "no preference term" in sft
    assert "trained with MPO" not in sft


@pytest.mark.parametrize(
    ("files", "lora", "expected"),
    [
        ({"config.json": {"vision_config": {}}}, None, ("AutoModelForImageTextToText", "AutoProcessor")),
        ({"config.json": {}}, None, ("AutoModelForCausalLM", "AutoTokenizer")),
        ({"preprocessor_config.json": {}}, LoraRecipe(), ("AutoModelForImageTextToText", "AutoProcessor")),
        (
            {"merged/config.json": {"vision_config": {}}},
            LoraRecipe(),
            ("AutoModelForImageTextToText", "AutoProcessor"),
        ),
        ({"adapter_config.json": {}}, LoraRecipe(), ("AutoModelForCausalLM", "AutoTokenizer")),
    ],
)
def test_how_to_load_it(
    tmp_path: Path, files: dict[str, Any], lora: LoraRecipe | None, expected: tuple[str, str]
) -> None:
    for name, values in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    text = write(tmp_path, make(model=ModelRecipe(path="org/base-1B", lora=lora)))
    program = code(text, "python")
    ast.parse(program)
    for name in expected:
        assert f"{name}.from_pretrained" in program
    assert ("PeftModel.from_pretrained(base" in program) == (lora is not None)
    assert ('"org/base-1B"' in program) == (lora is not None)


def test_the_merged_model_is_mentioned_where_there_is_one(tmp_path: Path) -> None:
    model = ModelRecipe(path="org/base-1B", lora=LoraRecipe())
    assert "`merged`" in write(tmp_path, make(model=model, output=OutputRecipe(dir="o", save_merged=True)))
    assert "`merged`" not in write(tmp_path, make(model=model))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Panel]:
    """Returns a list that receives the panels of the card's picture. Nothing is drawn."""
    panels: list[Panel] = []
    monkeypatch.setattr(card, "save_panels", lambda path, title, given: panels.extend(given))
    return panels


def test_the_curves_are_those_of_the_log(tmp_path: Path, drawn: list[Panel]) -> None:
    lines = log(20)
    text = write(tmp_path, make(), lines)
    assert [panel.title for panel in drawn] == [
        "Loss", "Terms", "Rewards", "Reward accuracy", "Reward shift", "Log-probabilities", "Learning rate",
        "Gradient norm", "Entropy",
    ]  # fmt: skip
    training, evaluation = drawn[0].content
    assert list(training.x) == list(range(1, 21))  # type: ignore[union-attr]
    assert list(training.y) == [line["loss"] for line in lines if "loss" in line]  # type: ignore[union-attr]
    assert list(evaluation.x) == [5, 10, 15, 20]  # type: ignore[union-attr]
    assert list(evaluation.y) == [0.4, 0.2, 2 / 15, 0.1]  # type: ignore[union-attr]
    shown = {line.label: line.y[0] for panel in drawn for line in panel.content}  # type: ignore[union-attr]
    assert {name: shown[name] for name in ("DPO", "BCO", "next token", "margin", "delta", "rate", "norm")} == {
        name: 1 / (1 + KEYS.index(key))
        for name, key in {
            "DPO": "dpo_loss", "BCO": "bco_loss", "next token": "ntp_loss", "margin": "reward_margin",
            "delta": "reward_shift", "rate": "learning_rate", "norm": "grad_norm",
        }.items()
    }  # fmt: skip
    for panel, labels in ((drawn[2], ["chosen", "rejected", "margin"]), (drawn[5], ["chosen", "rejected"])):
        assert [line.label for line in panel.content] == labels
    assert "![Curves of the run: loss, terms, rewards," in text


def test_values_that_are_not_numbers_are_left_out(tmp_path: Path, drawn: list[Panel]) -> None:
    lines = [
        {"step": 1, "loss": math.nan, "dpo_loss": "nan"}, {"step": 2, "loss": 1.0}, {"loss": 3.0},
        {"step": 3, "loss": math.inf}, {"step": 4, "loss": True}, {"step": 5, "loss": 2},
    ]  # fmt: skip
    write(tmp_path, make(), lines)
    assert [panel.title for panel in drawn] == ["Loss"]
    (line,) = drawn[0].content
    assert (list(line.x), list(line.y)) == ([2, 5], [1.0, 2])  # type: ignore[union-attr]


def test_long_curves_are_smoothed_but_not_the_learning_rate(tmp_path: Path, drawn: list[Panel]) -> None:
    write(tmp_path, make(), log(1000))
    smooth = {panel.title: panel.content[0].smooth for panel in drawn}  # type: ignore[union-attr]
    assert smooth["Loss"] == 20
    assert smooth["Learning rate"] == 1
    drawn.clear()
    write(tmp_path, make(), log(100))
    assert {line.smooth for panel in drawn for line in panel.content} == {1}  # type: ignore[union-attr]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, which dev installs")
    text = write(tmp_path, make(), log(20))
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "](curves.png)" in text
    text = write(tmp_path, make(), [])
    assert "The log has no numbers to draw." in text
    assert not (tmp_path / "curves.png").exists()  # that of the earlier run


def test_without_matplotlib_the_card_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == "matplotlib":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write(tmp_path, make(), log(20))
    assert "No picture of the curves: matplotlib is not installed" in text
    assert "curves.png" not in text
    assert not (tmp_path / "curves.png").exists()


HOSTILE = (
    "<img src=x onerror=alert(1)>", "a`<script>alert(1)</script>`b", "x](javascript:alert(1)) ![y](https://evil/z.png)",
    "p\n\n# Injected\n\n<b>c</b>", "a | b | <i>c</i>", "``` \n<u>d</u>\n```", "&lt;b&gt; @someone https://evil.example",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_neither_markdown_nor_html(tmp_path: Path, text: str) -> None:
    from markdown_it import MarkdownIt

    def rendered(name: str) -> tuple[list[str], str]:
        recipe = make(
            model=ModelRecipe(path=f"models/{name}"),
            data=DataRecipe(train=[{"path": name, "repeat_time": 2}]),  # type: ignore[list-item]
        )
        written = write(tmp_path, recipe, dropped={name: 3}, datasets=[name], note=name)
        assert front_matter(written)["datasets"] == [name]
        body = written.split("---\n", 2)[2]
        parser = MarkdownIt("commonmark", {"html": True}).enable("table")
        tokens = [token for token in parser.parse(body)]
        kinds = [f"{token.type} {token.tag}" for token in tokens]
        inner = [f"{each.type} {each.tag}" for token in tokens for each in token.children or () if each.type != "text"]
        return [kind for kind in kinds + inner if "escape" not in kind], parser.render(body)

    kinds, html = rendered(text)
    assert kinds == rendered("plain")[0]
    for tag in ("<img src=x", "<script", 'javascript:alert(1)"', "<b>", "<i>", "<u>", 'evil/z.png"'):
        assert tag not in html


def test_the_model_is_loaded_as_in_training(tmp_path: Path) -> None:
    path, options = '/models/"😀"\\base', {"revision": "v1", "trust_remote_code": True}
    for lora in (None, LoraRecipe()):
        text = write(tmp_path, make(model=ModelRecipe(path=path, lora=lora, **options)))
        calls = [node for node in ast.walk(ast.parse(code(text, "python"))) if isinstance(node, ast.Call)]
        given = [{word.arg: ast.literal_eval(word.value) for word in call.keywords} for call in calls]
        assert {"dtype": "auto", "trust_remote_code": True, **({"revision": "v1"} if lora else {})} in given
        assert given[-1] == {"trust_remote_code": True}
        assert (
            path in [ast.literal_eval(call.args[0]) for call in calls if not isinstance(call.args[0], ast.Name)]
        ) == (lora is not None)
        assert "at the revision `v1`. Trained" in text

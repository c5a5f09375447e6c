"""Tests the recipe of rounds, the messages about wrong settings, and the commands that a round runs."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from mpo_ext.cli import data, evaluate, sample
from mpo_ext.cli.main import main
from mpo_ext.iterate import rounds, stages
from mpo_ext.iterate.recipe import IterateRecipe, load_iterate_recipe
from mpo_ext.journal import SettingsMismatchError

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "iterate").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "model": "start",
    "output": "out",
    "rounds": 3,
    "sample": {"questions": "q.jsonl", "correctness": {}},
    "train": {},
    "evaluate": {"data": "test.jsonl"},
}


def build(**settings: Any) -> IterateRecipe:
    """Returns the small recipe with settings such as ``train__optim__seed=1``."""
    values = json.loads(json.dumps(SMALL))
    for name, value in settings.items():
        place = values
        *sections, last = name.split("__")
        for part in sections:
            place = place.setdefault(part, {})
        place[last] = value
    return IterateRecipe(**values)


def parse(stage: stages.RoundStage) -> argparse.Namespace:
    """Returns the parsed arguments of the command that a stage runs, such as ``mpo-ext sample``."""
    parser = argparse.ArgumentParser()
    subcommands = parser.add_subparsers(required=True)
    for module in (data, sample, evaluate):
        module.add_parser(subcommands)
    return parser.parse_args(stage.arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"round": 3}, "unknown setting round; did you mean rounds?"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"rounds": "3"}, "rounds must be an integer, got '3'"),
        ({"reference": "last"}, "reference must be 'round' or 'first', got 'last'"),
        ({"sample": {"questions": "q.jsonl"}}, "sample.correctness or dropout_ntp must be given, got neither"),
        ({"sample__correctness": None}, r"sample.correctness must be a section \(\{\} takes its defaults\), got None"),
        ({"sample": {"correctness": {}}}, "sample.questions must be given, or correctness.questions, got neither"),
        ({"sample__correctness__samples": 1}, "sample.correctness.samples must be at least 2, got 1"),
        ({"sample__correctness__sample": 4}, "unknown setting sample.correctness.sample; did you mean"),
        ({"sample__correctness__top_p": 1.5}, r"sample.correctness.top_p must be in \(0, 1\], got 1.5"),
        ({"sample__correctness__accuracy": [0.9, 0.1]}, "sample.correctness.accuracy must be two numbers"),
        ({"sample__correctness__matcher": "numberx"}, "sample.correctness.*matcher.*numberx.*did you mean 'number'"),
        ({"sample__dropout_ntp__keep": 1.0}, r"sample.dropout_ntp.keep must be in \[0, 1\), got 1.0"),
        ({"sample__dropout_ntp__max_pairs": 0}, "sample.dropout_ntp.max_pairs must be at least 1, got 0"),
        (
            {"sample__questions": ["a", "b"]},
            "sample.questions of correctness must have a file for each of the 3 rounds",
        ),
        ({"evaluate__data": []}, r"evaluate.data must not be empty, got \{\}"),
        ({"evaluate__data": ["a/t.jsonl", "b/t.jsonl"]}, "evaluate.data.* must have different file names"),
        ({"evaluate__prompts": ["cott"]}, "evaluate.*cott.*did you mean 'cot'"),
        ({"evaluate__samples": 2}, "evaluate.*temperature"),
        ({"engine__name": "openai"}, "engine.name must be 'transformers' or 'vllm', got 'openai'"),
        ({"engine": {"name": "vllm", "batch_size": 4}}, "engine.batch_size must be left out with the engine 'vllm'"),
        ({"engine__options": {"revision": "x"}}, "engine.options must be other arguments.*got 'revision'"),
        ({"launch__train": "accelerate"}, "launch.train must be a list of strings, got 'accelerate'"),
        ({"train": None}, "train must be a section"),
        ({"train__model__path": "x"}, "train.model.path must be left out, because each round sets it, got 'x'"),
        ({"train__output__dir": "x"}, "train.output.dir must be left out"),
        ({"train__output__push_to_hub": "me/x"}, "train.output.push_to_hub must be left out"),
        ({"train__optim__batch_sise": 1}, "train: unknown setting optim.batch_sise; did you mean optim.batch_size?"),
        ({"train__optim__epochs": 0}, "train: optim.epochs must be at least 1, got 0"),
        ({"train__model": "x"}, "train.model must be a section, got 'x'"),
        (
            {"train__model__lora": {}, "train__output__save_merged": False},
            "train.output.save_merged must be true or left out with lora",
        ),
        (
            {"reference": "first", "train__model__revision": "abc"},
            "reference must be 'round' with train.model.revision",
        ),
        ({"reference": "first", "train__loss": {"dpo_weight": 0, "bco_weight": 0}}, "reference must be 'round' for"),
        (
            {"reference": "first", "train__model__lora": {}, "train__reference__kind": "adapter"},
            "train: .*reference.path must be None for kind 'adapter'|train: reference.kind must be",
        ),
    ],
)
def test_wrong_settings_name_the_field_the_rule_and_the_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build(**settings)


def test_a_recipe_is_a_yaml_file_with_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(SMALL))
    recipe = load_iterate_recipe(path, ["rounds=5", "sample.dropout_ntp={keep: 0.25}", "train.optim.epochs=2"])
    assert (recipe.rounds, recipe.sample.dropout_ntp.keep) == (5, 0.25)  # type: ignore[union-attr]
    assert recipe.train_recipe(1, [{"path": "p"}]).optim.epochs == 2
    assert main(["iterate", str(path), "rounds=-1"]) == 2
    assert f"{path} with rounds=-1: rounds must be at least 1, got -1" in capsys.readouterr().err
    assert main(["iterate", str(tmp_path / "none.yaml")]) == 2
    path.write_text(json.dumps({name: value for name, value in SMALL.items() if name != "model"}))
    assert main(["iterate", str(path)]) == 2
    assert "model must be given" in capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_rounds_can_be_loaded(path: Path) -> None:
    assert load_iterate_recipe(path).rounds > 1
    assert f"mpo-ext iterate recipes/iterate/{path.name} --dry-run" in path.read_text()


def test_every_option_reaches_the_command_of_its_stage() -> None:
    recipe = build(
        seed=7,
        sample__questions={"path": ["a", "b", "c"], "image_root": "images", "limit": 9, "root_map": [["x", "y"]]},
        sample__correctness={
            **{"samples": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.5, "max_new_tokens": 6},
            **{"allow_truncated": True, "template": "cot", "style": "boxed", "pairs_per_question": 2},
            **{"accuracy": [0.1, 0.9], "length_balance": True, "reuse_limit": 3, "keep_duplicates": True},
            **{"matcher": {"kind": "number", "relative": 0.05}},
        },
        sample__dropout_ntp={
            **{"keep": 0.25, "unit": "words", "with_image": True, "sample_chosen": False, "allow_wrong_chosen": True},
            **{"questions": "d.jsonl", "matcher": "vqa"},
        },
        engine={"dtype": "bfloat16", "device": "cpu", "batch_size": 3, "block_size": 5, "options": {"a": [1]}},
        train__model={
            **{"trust_remote_code": True, "revision": "abc", "chat_template": "{{ x }}"},
            **{"chat_template_kwargs": {"enable_thinking": False}},
        },
        evaluate={
            **{"data": {"one": "1.jsonl", "two": "2.json"}, "prompts": ["direct", "cot"], "samples": 2, "seed": 3},
            **{"temperature": 0.5, "top_k": 4, "top_p": 0.75, "max_new_tokens": 8, "style": "answer", "limit": 5},
            **{"matcher": "choice", "image_root": "i", "root_map": [["old", "new"]]},
        },
    )  # fmt: skip
    args = parse(stages.sample_stage(recipe, 1, "correctness"))
    correctness = recipe.sample.correctness
    assert correctness is not None
    assert args.build(args).config == correctness.pipeline(7).config
    assert (str(args.source), str(args.out), args.model) == ("a", "out/round-1/correctness", "start")
    assert (args.image_root, args.root_map, args.limit, args.seed) == ("images", ["x=y"], 9, 7)
    assert (args.dtype, args.device, args.batch_size, args.block_size) == ("bfloat16", "cpu", 3, 5)
    assert args.engine_option == ["a=[1]", 'revision="abc"']
    assert (args.trust_remote_code, args.chat_template) == (True, "out/chat_template.jinja")
    assert json.loads(args.chat_template_kwargs) == {"enable_thinking": False}

    args = parse(stages.sample_stage(recipe, 3, "dropout-ntp"))
    dropout = recipe.sample.dropout_ntp
    assert dropout is not None
    assert args.build(args).config == dropout.pipeline(9).config
    assert (str(args.source), args.model, args.seed) == ("d.jsonl", "out/round-2/train/final", 9)
    assert (args.image_root, args.engine_option) == ("", ["a=[1]"])

    args = parse(stages.evaluate_stage(recipe, 2))
    assert args.models == ["round-2=out/round-2/train/final"]
    assert (args.data, args.prompt) == (["one=1.jsonl", "two=2.json"], ["direct", "cot"])
    assert (args.samples, args.temperature, args.top_k, args.top_p, args.max_new_tokens) == (2, 0.5, 4, 0.75, 8)
    assert (args.seed, args.style, args.limit, args.matcher) == (3, "answer", 5, "choice")
    assert (args.image_root, args.root_map) == ("i", ["old=new"])
    assert parse(stages.evaluate_stage(recipe, 0)).models == ["round-0=start"]

    args = parse(stages.page_stage(recipe, 2, "dropout-ntp"))
    assert (args.path, str(args.out)) == ("out/round-2/dropout-ntp/pairs.jsonl", "out/round-2/dropout-ntp.html")


def test_the_defaults_are_those_of_the_commands() -> None:
    recipe = build(sample__dropout_ntp={"sample_chosen": False})
    for name in ("correctness", "dropout-ntp"):
        args = parse(stages.sample_stage(recipe, 1, name))
        plain = argparse.ArgumentParser()
        sample.add_parser(plain.add_subparsers(required=True))
        default = plain.parse_args(["sample", name, args.source.name, str(args.out), "--model", "start"])
        given = {**vars(args), "accuracy": tuple(getattr(args, "accuracy", ()))}
        assert given == {**vars(default), "accuracy": getattr(default, "accuracy", ())}


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["round", "first"])
def test_a_round_starts_from_the_round_before(lora: dict[str, Any] | None, reference: str) -> None:
    extra = {"path": "old.jsonl", "repeat_time": 0.5}
    settings = {"train__model__lora": lora} if lora else {}
    recipe = build(reference=reference, train__data__train=extra, train__model__revision=None, **settings)
    final = "final/merged" if lora else "final"
    first, second = (recipe.train_recipe(number, [{"path": "new.jsonl", "repeat_time": 2}]) for number in (1, 2))
    assert (first.model.path, first.output.dir) == ("start", "out/round-1/train")
    assert (second.model.path, second.output.dir) == (f"out/round-1/train/{final}", "out/round-2/train")
    assert [(source.path, source.repeat_time) for source in second.data.train] == [
        ("new.jsonl", 2),
        ("old.jsonl", 0.5),
    ]
    assert first.reference.path is None
    assert second.reference.path == ("start" if reference == "first" else None)
    assert second.reference_kind == ("adapter" if lora and reference == "round" else "copy")
    assert second.output.save_merged == (lora is not None)


def test_launchers_come_before_the_module() -> None:
    recipe = build(launch={"train": ["accelerate", "launch", "--num_processes", "8"], "sample": ["torchrun"]})
    assert stages.train_stage(recipe, 1).command == [
        *("accelerate", "launch", "--num_processes", "8", "-m", "mpo_ext.train", "out/round-1/recipe.yaml"),
    ]
    assert stages.sample_stage(recipe, 1, "correctness").command[:3] == ["torchrun", "-m", "mpo_ext"]
    assert stages.evaluate_stage(recipe, 1).command[1:3] == ["-m", "mpo_ext"]


def test_sources_are_mixed_by_repeat_time_and_max_pairs(tmp_path: Path) -> None:
    recipe = build(
        output=str(tmp_path), sample__dropout_ntp={"max_pairs": 30}, sample__correctness={"format_pairs": True}
    )
    for name, lines in (("correctness", {"pairs": 8, "format_pairs": 0}), ("dropout-ntp", {"pairs": 120})):
        folder = recipe.round_folder(1) / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps({"lines": lines}))
    sources = stages.round_sources(recipe, 1)
    assert [(source["pairs"], source["repeat_time"]) for source in sources] == [(8, 1.0), (0, 0.0), (120, 0.25)]


LISTS: dict[str, Any] = {
    "evaluate__matcher": {"kind": "any", "matchers": ["exact"]},
    "evaluate__prompts": ["direct"],
    "train__model__freeze": ["vision_tower"],
    "train__data__train": ["x.jsonl"],
    "sample__questions": ["q.jsonl", "r.jsonl", "s.jsonl"],
}


@pytest.mark.parametrize(
    ("name", "longer"),
    [
        ("evaluate__matcher", {"kind": "any", "matchers": ["exact", "number"]}),
        ("evaluate__prompts", ["direct", "cot"]),
        ("train__model__freeze", ["vision_tower", "projector"]),
        ("train__data__train", ["x.jsonl", "y.jsonl"]),
    ],
)
def test_a_begun_run_refuses_longer_lists_of_other_settings_than_questions(
    name: str, longer: Any, tmp_path: Path
) -> None:
    begun = build(output=str(tmp_path), **LISTS)
    rounds.check_settings(begun, {})
    rounds.check_settings(begun, {})
    with pytest.raises(SettingsMismatchError, match=f"recipe.{name.replace('__', '.')}"):
        rounds.check_settings(build(output=str(tmp_path), **{**LISTS, name: longer}), {})
    paths = [*LISTS["sample__questions"], "t.jsonl"]
    rounds.check_settings(build(output=str(tmp_path), **{**LISTS, "sample__questions": paths, "rounds": 4}), {})


def test_each_pipeline_checks_the_questions_of_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "shared", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1 + 1?", "answer_gt": "2"}\n')
    own = {name: [str(tmp_path / f"{each}.jsonl") for each in (name, "shared", "shared")] for name in "ab"}
    recipe = build(
        output=str(tmp_path / "out"),
        sample={"correctness": {"questions": own["a"]}, "dropout_ntp": {"questions": own["b"]}},
        evaluate__data=str(tmp_path / "test.jsonl"),
    )
    checked = []
    for name in ("check_model_path", "check_is_no_run", "check_model"):
        monkeypatch.setattr(rounds, name, lambda *values, **options: None)
    monkeypatch.setattr(rounds, "check_run", lambda run, path, *values, **options: checked.append((run.name, path)))
    rounds.check_inputs(recipe)
    assert [path for _, path in checked] == [*own["a"][:2], *own["b"][:2]]
    assert len({name for name, _ in checked}) == 2

"""Tests training apart from its arithmetic: adapters, frozen parts, model families, bad input, and written files."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from digits_run import recipe, tiny, weights, write_pairs
from model_folders import write_qwen2
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from vision_families import BUILDERS

from mpo_ext import train as package
from mpo_ext.evaluate.models import ModelSource, find_model, load_engine
from mpo_ext.generate.transformers_engine import TransformersEngine
from mpo_ext.loss.weights import fingerprint
from mpo_ext.ops import linear as linear_ops
from mpo_ext.train import batch_loss, loop
from mpo_ext.train.batch import Batch
from mpo_ext.train.model import PARTS, add_lora, freeze_parts, modules_of, switch_off_dropout
from mpo_ext.train.optim_recipe import OptimRecipe
from mpo_ext.train.optimizer import parameter_groups
from mpo_ext.train.recipe import LoraRecipe, Recipe


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), 20)


def run(recipe: Recipe, model: nn.Module | None = None, processor: Any = None) -> list[dict[str, Any]]:
    if model is None:
        model, processor = tiny()
    assert loop.train(recipe, model=model, processor=processor) == 0
    return log(recipe)


def log(recipe: Recipe) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(recipe.output.dir, "log.jsonl").read_text().splitlines()]


def text_tokenizer() -> Any:
    words = ["<pad>", "<|im_end|>", "<|user|>", "<|assistant|>", "<unk>", *"abcdefghijklmnop"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>"
    )
    wrapped.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    wrapped.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} "
        "{% if message['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return wrapped


def text_pairs(path: Path, count: int) -> Path:
    lines = [
        {
            "question": f"a b {'c ' * (n % 3)}",
            "chosen": "d e f g"[: 1 + 2 * (n % 4)],
            "rejected": "h i j",
            "images": [],
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


TEXT = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture
def text_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "qwen2"
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)).save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return folder


# Adapters and frozen parts.


def test_lora_trains_adapters_only_and_its_reference_is_the_base_model(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    whole = linear_ops.linear_token_logp

    def note(*args: Any) -> Any:
        if torch.is_grad_enabled():
            kept.append(args[5])
        return whole(*args)

    monkeypatch.setattr(linear_ops, "linear_token_logp", note)
    model, processor = tiny()
    before = weights(model)
    adapted = recipe(tmp_path / "lora", pairs, model__lora={"rank": 4}, optim__learning_rate=1e-2, optim__epochs=3)
    lines = run(adapted, model, processor)
    assert lines[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["reward_accuracy"] > 0.7
    after = {name.replace(".base_layer", ""): value for name, value in model.named_parameters()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in after.items())
    learning = [name for name, value in model.named_parameters() if value.requires_grad]
    assert learning
    assert all("lora_" in name and "language_model" in name for name in learning)
    assert set(kept) == {linear_ops.KEEP_HIDDEN_GRAD}  # the path of a frozen head


def test_lora_reference_agrees_with_a_copy(tmp_path: Path, pairs: Path) -> None:
    settings = {"model__lora": {"rank": 4}, "optim__learning_rate": 1e-2, "optim__epochs": 3}
    adapter = run(recipe(tmp_path / "adapter", pairs, **settings))
    copied = run(recipe(tmp_path / "copy", pairs, reference__kind="copy", **settings))
    for one, other in zip(adapter, copied, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def test_saved_adapters_load_and_merged_ones_give_the_same(tmp_path: Path, text_model: Path) -> None:
    import peft

    data = text_pairs(tmp_path / "pairs.jsonl", 12)
    out = tmp_path / "out"
    trained = recipe(
        out, data, model__path=str(text_model), model__lora={"rank": 2}, output__save_merged=True,
        optim__learning_rate=1e-2, optim__epochs=3,
    )  # fmt: skip
    assert loop.train(trained) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(text_model)
    adapted = peft.PeftModel.from_pretrained(base, str(out / "final")).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "final" / "merged").eval()
    ids = torch.tensor([[2, 5, 6, 3, 8, 9]])
    with torch.no_grad():
        ours, plain = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            untrained = adapted(ids).logits
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    assert (ours - untrained).abs().max() > 1e-3


def test_adapters_are_merged_into_the_revision_that_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="needs peft, which dev installs")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bases, repository = {}, tmp_path / "hub" / "models--owner--base"
    (repository / "refs").mkdir(parents=True)
    for seed, name in enumerate(("main", "v1")):
        (repository / "refs" / name).write_text(str(seed) * 40)
        bases[name] = write_qwen2(repository / "snapshots" / (str(seed) * 40), seed=seed)
    data = text_pairs(tmp_path / "pairs.jsonl", 4)
    model = {"model__path": "owner/base", "model__revision": "v1", "model__lora": {"rank": 2}}
    assert (
        loop.train(recipe(tmp_path / "out", data, **model, output__save_merged=True, optim__learning_rate=1e-9)) == 0
    )
    final = tmp_path / "out" / "final"
    assert json.loads((final / "adapter_config.json").read_text())["revision"] == "v1"
    shutil.move(final / "merged", tmp_path / "merged")  # the adapters remain
    assert find_model(str(final)) == ModelSource("owner/base", str(final), "v1")
    engine: Any = load_engine(
        find_model(str(final)), lambda path: TransformersEngine.from_pretrained(path, device="cpu")
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    truth = transformers.AutoModelForCausalLM.from_pretrained(bases["v1"]).state_dict()
    for loaded in (merged, engine.model):
        for name, value in loaded.state_dict().items():
            torch.testing.assert_close(value, truth[name], atol=1e-4, rtol=0)
    assert 'from_pretrained("owner/base", revision="v1", dtype' in (final / "README.md").read_text()
    (repository / "refs" / "v1").unlink()
    with pytest.raises(FileNotFoundError, match="the adapters need the base model owner/base at the revision 'v1'"):
        load_engine(find_model(str(final)), lambda path: pytest.fail(path))


@pytest.mark.parametrize("parts", [["vision_tower"], ["projector"], ["language_model"], ["vision_tower", "projector"]])
def test_frozen_parts_stay_as_they_were(tmp_path: Path, pairs: Path, parts: list[str]) -> None:
    model, processor = tiny()
    before = weights(model)
    run(recipe(tmp_path / "out", pairs, model__freeze=parts, optim__learning_rate=1e-2), model, processor)
    names = [name for part in parts for name in PARTS[part]] + (["lm_head"] if "language_model" in parts else [])
    for name, value in model.named_parameters():
        is_frozen = any(part in name for part in names)
        assert torch.equal(value, before[name]) == is_frozen, name


@pytest.mark.parametrize("parts", [["vision_tower"], ["projector"], ["vision_tower", "projector"]])
def test_the_projectors_after_layers_of_the_tower_are_no_part_of_it(parts: list[str]) -> None:
    def part_of(name: str) -> str:
        merger = "visual.merger" in name or "visual.deepstack_merger_list" in name
        return "projector" if merger else "vision_tower" if "visual" in name else "language_model"

    model = families.qwen3_vl()
    freeze_parts(model, parts)
    for name, value in model.named_parameters():
        assert value.requires_grad == (part_of(name) not in parts), name
    model.requires_grad_(True)
    names = {id(value): name for name, value in model.named_parameters()}
    for group in parameter_groups(model, OptimRecipe(groups={part: {"learning_rate": 1e-3} for part in parts})):
        for value in group.parameters:
            part = part_of(names[id(value)])
            assert group.part == (part if part in parts else ""), names[id(value)]


@pytest.mark.parametrize(
    ("names", "tower", "projector"),
    [
        (["visual.blocks", "visual.merger", "visual.merger_list"], 1, 2),  # Qwen3-Omni
        (["vision_tower.blocks", "vision_tower.merger"], 1, 1),
        (["vision_tower.blocks", "vision_tower.patch_merger"], 1, 1),
        (["vision_model.blocks", "vision_model.connector"], 1, 1),
        (["vision_model", "high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj", "aligner"], 4, 1),
        (["vision_encoder", "vision_projection"], 1, 1),
        (["image_tower", "video_tower", "multi_modal_projector"], 2, 1),
        (["visual", "projector"], 1, 1),
        (["vision_tower", "vision_adapter", "vision_projection"], 1, 2),
    ],
)
def test_all_modules_of_a_part_are_found(names: list[str], tower: int, projector: int) -> None:
    model = nn.Module()
    for name in ["language_model", *names]:
        owner = model
        for part in f"model.{name}".split("."):
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
    assert len(list(modules_of(model, "vision_tower"))) == tower
    assert len(list(modules_of(model, "projector"))) == projector
    assert [name for name, _ in modules_of(model, "language_model")] == ["model.language_model"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (["q_proj", "v_prj"], "'v_prj'; did you mean 'v_proj'"),
        (["proj"], "'proj'"),
        (["layers.7.self_attn.q_proj"], "'layers.7"),
    ],
)
def test_each_name_of_lora_targets_must_match(target: list[str], words: str) -> None:
    pytest.importorskip("peft", reason="needs peft, which dev installs")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))
    with pytest.raises(ValueError, match=rf"lora\.target must name layers of the model, got {words}"):
        add_lora(model, LoraRecipe(target=target))
    adapted = add_lora(model, LoraRecipe(target=["q_proj", "layers.1.self_attn.v_proj"], rank=2))
    trained = [name for name, value in adapted.named_parameters() if value.requires_grad and "lora_A" in name]
    assert len(trained) == 3


def test_freezing_a_missing_part_is_an_error() -> None:
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT))
    with pytest.raises(ValueError, match="freeze must name parts that the model has, got 'vision_tower'"):
        freeze_parts(model, ["vision_tower"])
    with pytest.raises(ValueError, match="freeze must leave something to train, got 'language_model'"):
        freeze_parts(model, ["language_model"])


def test_dropout_is_off_wherever_a_model_keeps_it() -> None:
    config = transformers.Qwen2Config(**TEXT, attention_dropout=0.5)
    model = transformers.Qwen2ForCausalLM(config)
    model.extra = nn.Dropout(0.3)
    switch_off_dropout(model)
    ids = torch.randint(32, (2, 9))
    model.train()
    assert model.extra.p == 0
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_fingerprint_is_that_of_the_weights_and_not_of_adapters(tmp_path: Path, pairs: Path) -> None:
    model, processor = tiny()
    before = fingerprint(model)
    assert fingerprint(tiny()[0]) == before
    assert fingerprint(tiny(seed=1)[0]) != before
    run(recipe(tmp_path / "out", pairs, model__lora={"rank": 2}), model, processor)
    assert fingerprint(model) == before
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    assert fingerprint(model) != before


# Other families.


TEXT_FAMILIES = {
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT)),
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "Gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT, sliding_window=4, head_dim=8)),
}


@pytest.mark.parametrize("family", ["InternVL", *BUILDERS, *TEXT_FAMILIES])
def test_families_train_an_epoch_and_learn(tmp_path: Path, family: str) -> None:
    torch.manual_seed(0)
    if family in TEXT_FAMILIES:
        model, processor, data = TEXT_FAMILIES[family](), text_tokenizer(), text_pairs(tmp_path / "text.jsonl", 9)
    else:
        model, processor = tiny() if family == "InternVL" else BUILDERS[family]()
        data = write_pairs(tmp_path / "digits", 9, text_only=3)
    settings = {
        "optim__batch_size": 3,
        "optim__micro_batch_size": 2,
        "optim__epochs": 4,
        "optim__learning_rate": 5e-3,
        "optim__schedule": "constant",
        "optim__warmup_ratio": 0,
    }
    lines = run(recipe(tmp_path / "out", data, **settings), model, processor)
    assert len(lines) == 12
    assert lines[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["ntp_loss"] < lines[0]["ntp_loss"]
    assert lines[-1]["reward_accuracy"] > 0.6


# The cost of a step.


def test_no_logits_are_made_and_only_labelled_rows_are_projected(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projected, labelled = [], []
    whole = linear_ops.linear_token_logp

    def note(hidden: Any, *args: Any) -> Any:
        projected.append(hidden.shape[:-1].numel())
        return whole(hidden, *args)

    batches = Batch.to

    def to(self: Batch, device: Any, **options: Any) -> Batch:
        labelled.append(self.projected_rows)
        return batches(self, device, **options)

    monkeypatch.setattr(linear_ops, "linear_token_logp", note)
    monkeypatch.setattr(Batch, "to", to)
    model, processor = tiny()
    seen: list[int] = []
    towers: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    model.model.vision_tower.register_forward_hook(
        lambda module, args, output: towers.append(len(args[0] if args else [0]))
    )
    run(recipe(tmp_path / "out", pairs, reference__kind="precomputed"), model, processor)
    assert projected
    assert sum(projected) == pytest.approx(sum(labelled), rel=0)
    assert set(seen) <= {8}  # the probe of hidden_and_head, not the vocabulary
    micro_batches = len(labelled)
    assert len(towers) <= micro_batches + 3  # once each, for policy and reference, and three of the check


# Bad input.


def test_a_bad_pair_ends_the_run_by_name_or_is_counted(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    lines = pairs.read_text().splitlines()
    broken = json.loads(lines[3])
    broken["images"] = ["gone.png"]
    lines[3] = json.dumps(broken)
    data = pairs.with_name("broken.jsonl")
    data.write_text("\n".join(lines) + "\n")
    line = r"broken\.jsonl:4: no such image: \S*gone\.png"
    advice = r"1 of 20 images and videos do not exist: relative images start at .*{path: .*broken\.jsonl, root: \.}"
    with pytest.raises(ValueError, match=rf"(?s){line}.*{advice}.*data\.skip_bad=true"):
        run(recipe(tmp_path / "stop", data))
    assert not list((tmp_path / "stop").rglob("step-*"))
    assert "loss" not in "".join(path.read_text() for path in (tmp_path / "stop").glob("log.jsonl"))
    run(recipe(tmp_path / "skip", data, data__skip_bad=True))
    text = capsys.readouterr().err
    assert re.search(r"skipped 1: .*broken\.jsonl:4", text)
    assert "MOST PAIRS" not in text
    assert re.search(r"broken\.jsonl: format pairs \(detected\); 20 of 20 pairs with images\n", text)


def test_a_pair_with_wrong_places_for_its_images_ends_the_run_or_is_counted(
    tmp_path: Path, pairs: Path, capsys: Any
) -> None:
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    lines[3]["images"] = lines[3]["images"] * 2
    lines[3]["question"] = lines[3]["question"].replace("<image>", "")
    data = pairs.with_name("places.jsonl")
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"places\.jsonl:4: question must hold <image> 2 times for 2 images, got 0"):
        run(recipe(tmp_path / "stop", data))
    run(recipe(tmp_path / "skip", data, data__skip_bad=True))
    assert re.search(r"skipped 1: .*places\.jsonl:4", capsys.readouterr().err)


def test_a_run_with_most_pairs_skipped_says_so_loudly(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    for line in lines[:11]:
        line["images"] = ["gone.png"]
    data = pairs.with_name("most.jsonl")
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(recipe(tmp_path / "out", data, data__skip_bad=True))
    assert "WARNING: MOST PAIRS WERE SKIPPED, 11 of 20" in capsys.readouterr().err


def test_a_run_without_any_pair_is_an_error_and_saves_no_model(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    model, processor = tiny()
    before = weights(model)
    settings = recipe(tmp_path / "out", pairs, data__max_length=5, optim__epochs=3)
    with pytest.raises(ValueError, match=r"every pair was skipped, so nothing was learned(.|\n)*skipped 20:"):
        loop.train(settings, model=model, processor=processor)
    assert "all of its pairs were skipped" in capsys.readouterr().err
    assert not (tmp_path / "out" / "final").exists()
    assert not list((tmp_path / "out").glob("checkpoints/step*"))
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_a_model_with_other_image_tokens_than_the_processor_is_an_error(tmp_path: Path, pairs: Path) -> None:
    model, processor = tiny()
    processor.image_seq_length = 3
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)image"):
        run(recipe(tmp_path / "out", pairs), model, processor)


def poison(model: nn.Module, calls: set[int]) -> None:
    """Makes the hidden states NaN in the training forward passes with the numbers ``calls``, counted from 1."""
    count = 0

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal count
        if not torch.is_grad_enabled():
            return output
        count += 1
        return output * math.nan if count in calls else output

    model.model.language_model.norm.register_forward_hook(hook)


def test_a_loss_that_is_not_finite_names_step_pairs_and_checkpoint(tmp_path: Path, pairs: Path) -> None:
    model, processor = tiny()
    poison(model, {5})  # two micro-batches a step, and one in the third, which has four pairs
    with pytest.raises(FloatingPointError) as caught:
        run(recipe(tmp_path / "out", pairs, output__save_every=1), model, processor)
    text = str(caught.value)
    assert text.startswith("step 3: not finite: the loss of ")
    assert text.count("pairs.jsonl:") == 4
    assert "step-00000002" in text


def test_a_step_that_is_not_finite_can_be_skipped(tmp_path: Path, pairs: Path) -> None:
    model, processor = tiny()
    poison(model, {3})
    settings = {"output__on_nonfinite": "skip", "optim__warmup_ratio": 0}
    lines = run(recipe(tmp_path / "out", pairs, **settings), model, processor)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert math.isfinite(lines[2]["loss"])
    assert math.isfinite(lines[2]["reward_shift"])
    assert all(value.isfinite().all() for value in model.parameters())


def test_out_of_memory_names_sizes_and_what_lowers_them(
    tmp_path: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(batch_loss, "linear_mpo_loss", full)
    with pytest.raises(RuntimeError, match=r"step 1 with 4 pairs in 1 rows of \d+ positions.*optim\.micro_batch_size"):
        run(recipe(tmp_path / "out", pairs))


def test_a_stale_reference_is_refused_with_what_changed(tmp_path: Path, pairs: Path) -> None:
    kept = str(tmp_path / "reference.jsonl")
    settings = {"reference__kind": "precomputed", "reference__file": kept}
    first = run(recipe(tmp_path / "a", pairs, **settings))
    again = run(recipe(tmp_path / "b", pairs, **settings))
    assert [line["loss"] for line in first] == [line["loss"] for line in again]
    with pytest.raises(ValueError, match=r"(?s)reference\.file must .* is stale:.*max_length was 4096, is 100"):
        run(recipe(tmp_path / "c", pairs, data__max_length=100, **settings))
    with pytest.raises(ValueError, match=r"(?s)stale.*model was '.*', is '"):
        run(recipe(tmp_path / "d", pairs, **settings), *tiny(seed=1))
    fewer = pairs.with_name("fewer.jsonl")
    fewer.write_text("\n".join(pairs.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"(?s)stale.*pairs was 20, is 19"):
        run(recipe(tmp_path / "e", fewer, **settings))


def test_an_image_that_has_changed_is_found_in_a_precomputed_reference(tmp_path: Path) -> None:
    from PIL import Image

    data = write_pairs(tmp_path / "pairs", 8)
    settings = {"reference__kind": "precomputed", "reference__file": str(tmp_path / "reference.jsonl")}
    run(recipe(tmp_path / "a", data, **settings))
    Image.new("RGB", (32, 32), "white").save(data.with_name("0-5.png"))
    with pytest.raises(ValueError, match=r"must hold the pair .*pairs\.jsonl:6.*the image files have changed"):
        run(recipe(tmp_path / "b", data, **settings))


# Console and files.


def test_the_first_step_says_what_its_loss_should_be(tmp_path: Path, pairs: Path, capsys: Any) -> None:
    accuracy = run(recipe(tmp_path / "same", pairs))[0]["reward_accuracy"]
    said = capsys.readouterr().err
    assert re.search(r"step 1: loss \S+, expected 0\.8318 \+ \S+ \(next token\): policy and reference agree", said)
    assert f"the reward accuracy, {accuracy:.2f}, is rounding noise until the first update" in said
    run(recipe(tmp_path / "ipo", pairs, loss__preference="ipo", loss__bco_weight=0.0))
    assert "is rounding noise until the first update" in capsys.readouterr().err
    model, processor = tiny()
    kept: dict[str, Any] = {}

    class Other(loop.Trainer):
        def make_reference(self) -> Any:
            reference = super().make_reference()
            with torch.no_grad():
                for parameter in reference.model.parameters():  # type: ignore[union-attr]
                    parameter.mul_(1.5)
            kept["reference"] = reference
            return reference

    Other(recipe(tmp_path / "other", pairs), model=model, processor=processor).run()
    said = capsys.readouterr().err
    assert "policy and reference DIFFER" in said
    assert "rounding noise" not in said


def test_the_log_has_every_quantity_and_the_model_its_card(tmp_path: Path, pairs: Path) -> None:
    trained = recipe(
        tmp_path / "out", pairs, data__eval=[str(pairs)], output__trackers=["tensorboard"], output__eval_every=2
    )
    lines = run(trained)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    wanted = (
        "epoch", "loss", "dpo_loss", "bco_loss", "ntp_loss", "chosen_reward", "rejected_reward", "reward_margin",
        "reward_accuracy", "reward_shift", "chosen_logp", "rejected_logp", "entropy", "top1", "learning_rate",
        "grad_norm", "pairs", "chosen_tokens", "rejected_tokens", "tokens_per_s", "pairs_per_s", "step_s",
        "memory_mib", "skipped_steps", "length_accuracy", "balanced_accuracy",
    )  # fmt: skip
    assert set(wanted) <= set(steps[0])
    assert steps[0]["pairs"] == 8
    assert steps[2]["pairs"] == 4
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 3]
    assert list(Path(trained.output.dir).rglob("events.out.tfevents*"))
    final = Path(trained.output.dir, "final")
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(final)
    assert type(loaded).__name__ == "InternVLForConditionalGeneration"
    assert "2411.10442" in (final / "README.md").read_text()


def test_sft_needs_no_reference_and_no_rejected_responses(tmp_path: Path, pairs: Path) -> None:
    settings = {"loss__dpo_weight": 0, "loss__bco_weight": 0}
    lines = run(recipe(tmp_path / "sft", pairs, **settings))
    assert "dpo_loss" not in lines[0]
    assert lines[-1]["loss"] < lines[0]["loss"]
    both = run(recipe(tmp_path / "mpo", pairs))
    assert lines[0]["ntp_loss"] == pytest.approx(both[0]["ntp_loss"], rel=1e-6)


def test_the_reference_moves_when_it_is_synced(tmp_path: Path, pairs: Path) -> None:
    settings = {"optim__epochs": 2, "optim__learning_rate": 1e-2, "optim__warmup_ratio": 0}
    fixed = run(recipe(tmp_path / "fixed", pairs, **settings))
    synced = run(recipe(tmp_path / "synced", pairs, reference__sync_every=1, reference__sync_mix=1.0, **settings))
    assert synced[0]["loss"] == fixed[0]["loss"]
    assert synced[1]["chosen_reward"] == pytest.approx(0, abs=1e-5)  # the reference has become the policy
    assert abs(fixed[1]["chosen_reward"]) > 1e-3


def test_pairs_of_one_question_share_its_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_pairs(tmp_path / "pairs", 4, repeats=4)
    rows: list[tuple[int, int]] = []
    whole = batch_loss.forward

    def note(model: nn.Module, batch: Batch) -> Any:
        rows.append((batch.rows, batch.pairs))
        return whole(model, batch)

    grouped = run(recipe(tmp_path / "grouped", data, data__group_prompts=True))
    monkeypatch.setattr(batch_loss, "forward", note)
    again = run(recipe(tmp_path / "again", data, data__group_prompts=True))
    assert [line["loss"] for line in grouped] == [line["loss"] for line in again]
    assert rows[-1] == (1, 4)


def test_the_package_says_what_it_is() -> None:
    assert package.__doc__

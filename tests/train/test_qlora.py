"""Tests QLoRA with bitsandbytes' CPU kernels: a run equals LoRA on the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_folders
import pytest
import torch
import transformers
from digits_run import recipe

from mpo_ext.train import export, model_card
from mpo_ext.train.loop import Trainer
from mpo_ext.train.model import add_lora, language_linears, load_model
from mpo_ext.train.quantization import disable_weight_packing, quantized_layers
from mpo_ext.train.recipe import LoraRecipe, ModelRecipe

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra qlora, which dev installs")

MODELS = {"qwen2": model_folders.write_qwen2, "llava": model_folders.write_llava}
QLORA = LoraRecipe(rank=4, quantization="4bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    for name, write in MODELS.items():
        write(folder / name)
        model_folders.write_pairs(folder / f"{name}-pairs", 10, images=name == "llava")
    return folder


@pytest.fixture(autouse=True)
def cpu_that_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes bitsandbytes pack weights as on a CPU with AVX512-BF16."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True, raising=False)


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_card, "write_card", lambda *args, **options: None)


def dequantized(folder: Path, name: str) -> Path:
    """Saves a copy of a model in which the 4-bit weights of bitsandbytes are dequantized. Returns its folder."""
    path = folder / f"{name}-dequantized"
    model, processor = load_model(ModelRecipe(path=str(folder / name), lora=QLORA))
    base = model.unload().dequantize()
    base.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def train(folder: Path, name: str, path: Path, lora: dict[str, Any], out: Path, **settings: Any) -> Trainer:
    settings |= {"model__path": str(path), "model__lora": {"rank": 4, **lora}, "optim__learning_rate": 1e-2}
    settings |= {"optim__batch_size": 4, "optim__micro_batch_size": 2, "optim__epochs": 2, "optim__warmup_ratio": 0.2}
    trainer = Trainer(recipe(out, folder / f"{name}-pairs" / "pairs.jsonl", **settings))
    assert trainer.run() == 0
    return trainer


def losses(trainer: Trainer) -> list[float]:
    lines = [json.loads(line) for line in trainer.output.log.path.read_text().splitlines()]
    return [value for line in lines for value in (line["loss"], line["grad_norm"])]


@pytest.mark.parametrize("name", MODELS)
def test_a_run_equals_lora_on_the_dequantized_weights(folder: Path, tmp_path: Path, name: str) -> None:
    four = train(folder, name, folder / name, {"quantization": "4bit"}, tmp_path / "four", output__save_merged=True)
    plain = train(folder, name, dequantized(folder, name), {}, tmp_path / "plain")
    assert losses(four) == pytest.approx(losses(plain), abs=1e-6, rel=1e-6)
    assert losses(four)[-2] < losses(four)[0] - 0.1
    truth = {key: value for key, value in plain.model.named_parameters() if "lora_" in key}
    ours = {key: value for key, value in four.model.named_parameters() if value.requires_grad}
    assert ours.keys() == truth.keys()
    for key, value in truth.items():
        torch.testing.assert_close(ours[key], value, atol=1e-6, rtol=0)

    folder_of_merged = tmp_path / "four" / "final" / "merged"
    loader = transformers.AutoModelForImageTextToText if name == "llava" else transformers.AutoModelForCausalLM
    merged = loader.from_pretrained(folder_of_merged).eval()
    assert not hasattr(merged.config, "quantization_config")
    ids = torch.randint(1, 250, (2, 20))
    with torch.no_grad():
        trained = four.model.eval()(input_ids=ids).logits
        with four.model.disable_adapter():
            untrained = four.model(input_ids=ids).logits
        torch.testing.assert_close(merged(input_ids=ids).logits, trained, atol=1e-4, rtol=0)
    assert (trained - untrained).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_only_linear_layers_of_the_language_model_are_quantized(folder: Path, name: str) -> None:
    model, _ = load_model(ModelRecipe(path=str(folder / name), lora=QLORA, dtype="bfloat16"))
    base = model.unload()
    assert [key for key, _ in quantized_layers(base)] == language_linears(base)
    assert len(language_linears(base)) == 2 * 7
    others = [parameter for key, parameter in base.named_parameters() if parameter.dtype != torch.uint8]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}
    towers = [key for key, _ in quantized_layers(base) if "vision" in key or "projector" in key or "head" in key]
    assert towers == []
    assert not any(layer.support_avx512bf16_for_cpu for _, layer in quantized_layers(base))


def test_weights_that_are_packed_nevertheless_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(ModelRecipe(path=str(folder / "qwen2"), lora=QLORA))
    forward = bitsandbytes.nn.Linear4bit.forward

    def pack(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.weight.quant_state.packing_format_for_cpu = True
        return forward(self, x)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", pack)
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda x, weight, **options: x)
    with pytest.raises(RuntimeError, match=r"keep the 4-bit weights of .*q_proj.* got packed weights from version"):
        disable_weight_packing(model)


def test_a_quantized_model_without_a_name_cannot_be_merged(folder: Path) -> None:
    base = load_model(ModelRecipe(path=str(folder / "qwen2"), lora=QLORA))[0].unload()
    base.name_or_path = base.config._name_or_path = ""
    model = add_lora(base, QLORA)
    with pytest.raises(export.CheckpointError, match="a quantized model to be merged must have come from"):
        export.check_mergeable(model)

"""Runs TRL's own DPO tests with MPOTrainer in place of DPOTrainer.

    python tests/integrations/trl_own_tests.py TRL_CHECKOUT [--trainer DPOTrainer] [options of pytest]

The tests need models and data sets from the Hugging Face hub. This script makes local replacements. The data sets come
from TRL's own scripts. The models have the same classes, with random weights and a byte tokenizer. Only the models in
the lists below are replaced. Tests of other models, such as those with a video processor, do not find their model.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATASETS = ("zen", "zen_image", "zen_multi_image", "harmony", "toolcall")
SIZES = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
TEXT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Cohere2ForCausalLM": ("Cohere2", {"logit_scale": 1.0}),
    "tiny-Glm4MoeForCausalLM": ("Glm4Moe", {"n_routed_experts": 4, "head_dim": 4, **EXPERTS}),
    "tiny-GptOssForCausalLM": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}),
    "tiny-Lfm2ForCausalLM": ("Lfm2", {"full_attn_idxs": [1], "block_multiple_of": 8}),
    "tiny-Lfm2ForCausalLM-2.5": ("Lfm2", {"full_attn_idxs": [1], "block_multiple_of": 8}),
    "tiny-Olmo3ForCausalLM": ("Olmo3", {}),
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", {"num_experts": 4, "head_dim": 4, **EXPERTS}),
}


def make_datasets(checkout: Path, hub: Path) -> None:
    """Runs TRL's data set scripts. Writes the data sets to parquet files instead of pushing them to the hub."""
    import datasets

    def push(self: Any, repo_id: str, config_name: str) -> None:
        folder = hub / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        splits = []
        for split, dataset in self.items():
            dataset.to_parquet(folder / f"{config_name}-{split}.parquet")
            splits.append(f"  - split: {split}\n    path: {config_name}-{split}.parquet")
        entry = f"- config_name: {config_name}\n  data_files:\n" + "\n".join(splits) + "\n"
        card = folder / "README.md"
        text = card.read_text().removesuffix("---\n") if card.exists() else "---\nconfigs:\n"
        card.write_text(f"{text}{entry}---\n")

    datasets.DatasetDict.push_to_hub = push
    for name in DATASETS:
        path = checkout / "scripts" / f"generate_{name}_dataset.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(0.1, True, f"trl-internal-testing/{name.replace('_', '-')}")


def make_models(hub: Path) -> None:
    import tiny_models
    import torch
    import transformers

    for name, (family, settings) in TEXT_MODELS.items():
        folder = hub / "trl-internal-testing" / name
        tokenizer = tiny_models.qwen_tokenizer()
        config = getattr(transformers, f"{family}Config")(
            **{**SIZES, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, **settings}
        )
        torch.manual_seed(0)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    tiny_models.save_image_model(
        hub / "trl-internal-testing" / "tiny-LlavaForConditionalGeneration", vision_feature_layer=-2
    )
    for name, make in {"tiny-Gemma3ForConditionalGeneration": gemma3}.items():
        torch.manual_seed(0)
        model, processor = make()
        model.save_pretrained(hub / "trl-internal-testing" / name)
        processor.save_pretrained(hub / "trl-internal-testing" / name)


def gemma3() -> tuple[Any, Any]:
    import tiny_processors
    import transformers

    processor = tiny_processors.gemma3()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image_soft_token>")
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 4, "eos_token_id": processor.tokenizer.eos_token_id, "sliding_window": 64},
        vision_config={**VISION, "image_size": 28, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4, image_token_id=image_token, image_token_index=image_token,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config), processor


class Replacing:
    """A pytest plugin that replaces ``trl.DPOTrainer`` before TRL's tests are collected."""

    def __init__(self, trainer: Callable[[], Any], helpers: Path) -> None:
        self.trainer, self.helpers = trainer, helpers

    def pytest_collection(self, session: Any) -> None:
        import trl

        import_utils = importlib.import_module("trl.import_utils")
        trl.DPOTrainer = self.trainer()
        for name in re.findall(r"^    (is_\w+_available),$", self.helpers.read_text(), re.MULTILINE):
            if not hasattr(import_utils, name):  # the tests may be of another version than TRL
                setattr(import_utils, name, lambda: False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--trainer", choices=("MPOTrainer", "DPOTrainer"), default="MPOTrainer")
    options, rest = parser.parse_known_args()
    logging.disable(logging.WARNING)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    import pytest

    checkout = options.checkout.resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))
        import datasets

        datasets.disable_progress_bars()
        make_datasets(checkout, Path(folder))
        make_models(Path(folder))
        os.chdir(folder)  # where "trl-internal-testing/..." is a folder

        def trainer() -> Any:
            import trl

            from mpo_ext.integrations.trl import MPOTrainer

            return MPOTrainer if options.trainer == "MPOTrainer" else trl.DPOTrainer

        arguments = [
            f"--rootdir={checkout}",
            "-p",
            "no:cacheprovider",
            str(checkout / "tests" / "test_dpo_trainer.py"),
        ]
        return int(
            pytest.main([*arguments, *rest], plugins=[Replacing(trainer, checkout / "tests" / "testing_utils.py")])
        )


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "train")]
    sys.exit(main())

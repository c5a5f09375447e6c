"""Writes the model card of a finished run: README.md in the format of Hugging Face, and a plot of the metrics."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from mpo_ext.report import Line, Panel, markdown_table, save_panels
from mpo_ext.train.recipe import Recipe

CURVES = "curves.png"

# Title, label of the y axis, and for each line its log key, label and colour.
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Loss", "loss", (("loss", "training", "C0"), ("eval_loss", "evaluation", "C3"))),
    ("Terms", "loss", (("dpo_loss", "DPO", "C0"), ("bco_loss", "BCO", "C1"), ("ntp_loss", "next token", "C2"))),
    (
        "Rewards",
        "reward",
        (("chosen_reward", "chosen", "C2"), ("rejected_reward", "rejected", "C3"), ("reward_margin", "margin", "C0")),
    ),
    (
        "Reward accuracy",
        "share of pairs",
        (("reward_accuracy", "training", "C0"), ("eval_reward_accuracy", "evaluation", "C3")),
    ),
    ("Reward shift", "delta", (("reward_shift", "delta", "C0"),)),
    ("Log-probabilities", "nats", (("chosen_logp", "chosen", "C2"), ("rejected_logp", "rejected", "C3"))),
    ("Learning rate", "rate", (("learning_rate", "rate", "C0"),)),
    ("Gradient norm", "norm", (("grad_norm", "norm", "C0"),)),
    ("Entropy", "nats", (("entropy", "entropy", "C0"),)),
)
_SMOOTHED_FROM = 200  # minimum number of points of a smoothed line
CITATION = """@article{wang2024mpo,
  title={Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization},
  author={Wang, Weiyun and Chen, Zhe and Wang, Wenhai and Cao, Yue and Liu, Yangzhou and Gao, Zhangwei and Zhu, Jinguo
    and Zhu, Xizhou and Lu, Lewei and Qiao, Yu and Dai, Jifeng},
  journal={arXiv preprint arXiv:2411.10442},
  year={2024}
}"""


def write_card(
    folder: Path, *, recipe: Recipe, curves: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Writes README.md, and curves.png if matplotlib is installed and the log has finite numbers.

    Args:
        folder: Folder of the exported model. Its config.json determines the loading code in the card.
        recipe: Recipe of the run.
        curves: Log lines of steps and evaluations. The keys of evaluation metrics start with ``eval_``.
        summary: Last metrics by name, for the table of results. A value may be a mapping, such as the number of
            skipped pairs for each reason. The key ``datasets`` lists dataset names for the hub's metadata.
    """
    folder = Path(folder)
    texts = [f"---\n{_metadata(recipe, summary).to_yaml()}\n---\n", f"# {_title(recipe)}\n", _description(recipe)]
    texts += ["## Results\n", _results(summary), _picture(folder, curves)]
    texts += ["## How to load it\n", _loading(folder, recipe)]
    texts += ["## Recipe\n", "The recipe of `mpo-ext train` (`mpo_ext/train/recipe.py` explains each setting):\n"]
    texts += [_fenced(recipe.to_yaml(), "yaml")]
    texts += ["## Citation\n", _fenced(CITATION, "bibtex")]
    (folder / "README.md").write_text("\n".join(text for text in texts if text), encoding="utf-8")


def _metadata(recipe: Recipe, summary: Mapping[str, Any]) -> ModelCardData:
    """Returns the model's metadata for the Hugging Face hub."""
    has_lora, is_on_hub = recipe.model.lora is not None, _is_on_hub(recipe.model.path)
    tags = ["preference-optimization"] if recipe.loss.has_preference else ["sft"]
    if recipe.loss.has_preference and recipe.loss.preference is None:
        tags = ["mpo", *tags]
    relation = "adapter" if has_lora else "finetune"
    return ModelCardData(
        base_model=recipe.model.path if is_on_hub else None,
        base_model_relation=relation if is_on_hub else None,
        library_name="peft" if has_lora else "transformers",
        tags=[*tags, "mpo_ext"],
        datasets=list(summary.get("datasets", ())) or None,
    )


def _title(recipe: Recipe) -> str:
    name = _plain(Path(os.path.normpath(recipe.model.path)).name)
    if not recipe.loss.has_preference:
        return f"{name}, fine-tuned on chosen responses"
    return f"{name}, trained with {recipe.loss.preference or 'MPO'}"


def _description(recipe: Recipe) -> str:
    loss = recipe.loss
    if loss.preference is not None:
        how = (
            f"{loss.dpo_weight:g} x the preference loss `{loss.preference}` of mpo_ext.loss.preference + "
            f"{loss.ntp_weight:g} x next-token loss, beta {loss.beta:g}"
        )
    elif loss.has_preference:
        how = (
            "Mixed Preference Optimization ([arXiv 2411.10442](https://arxiv.org/abs/2411.10442)): "
            f"{loss.dpo_weight:g} x DPO + {loss.bco_weight:g} x BCO + {loss.ntp_weight:g} x next-token loss, "
            f"beta {loss.beta:g}"
        )
    else:
        how = "next-token loss on the chosen responses alone (no preference term)"
    reference = recipe.reference
    if reference.sync_every:
        how += (
            f", with a reference that moves by {reference.sync_mix:g} of the way to the policy every "
            f"{reference.sync_every:,} steps (TR-DPO, [arXiv 2404.09656](https://arxiv.org/abs/2404.09656))"
        )
    trained = "LoRA adapters" if recipe.model.lora is not None else "all weights"
    if recipe.model.freeze:
        trained = f"all weights but those of {', '.join(recipe.model.freeze)}"
    sources = "\n".join(f"- {_code(source.path)} (x {source.repeat_time:g})" for source in recipe.data.train)
    revision = "" if recipe.model.revision is None else f" at the revision {_code(recipe.model.revision)}"
    return (
        f"Base model: {_code(recipe.model.path)}{revision}. Trained: {trained}. Loss: {how}.\n\n"
        f"Pairs come from\n\n{sources}\n"
    )


def _results(summary: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for name, value in summary.items():
        if name == "datasets":
            continue
        if isinstance(value, Mapping):
            rows += [(f"{name}: {key}", _number(count)) for key, count in value.items()]
        else:
            rows.append((name, _number(value)))
    if not rows:
        return "No numbers were recorded.\n"
    return markdown_table(("at the end", "value"), [(_cell(name), _cell(value)) for name, value in rows])


def _picture(folder: Path, curves: Sequence[Mapping[str, Any]]) -> str:
    panels = _panels(curves)
    (folder / CURVES).unlink(missing_ok=True)  # may come from an earlier run
    if not panels:
        return "The log has no numbers to draw.\n"
    try:
        save_panels(folder / CURVES, "Training", panels)
    except ImportError:
        return "No picture of the curves: matplotlib is not installed (pip install matplotlib).\n"
    return f"![Curves of the run: {', '.join(panel.title.lower() for panel in panels)}]({CURVES})\n"


def _panels(curves: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Returns the panels of the plot. A panel without finite numbers in the log is left out."""
    panels = []
    for title, y_label, keys in _PANELS:
        lines = []
        for key, label, color in keys:
            points = [(line["step"], line[key]) for line in curves if _is_finite(line.get(key)) and "step" in line]
            if points:
                x, y = zip(*points, strict=True)
                smooth = max(1, len(x) // 50) if len(x) >= _SMOOTHED_FROM and title != "Learning rate" else 1
                style = "--" if key.startswith("eval_") else "-"
                lines.append(Line(label, x, y, color=color, style=style, smooth=smooth))
        if lines:
            panels.append(Panel(title, "step", y_label, lines))
    return panels


def _loading(folder: Path, recipe: Recipe) -> str:
    is_adapter = (folder / "adapter_config.json").exists() or (recipe.model.lora is not None)
    kind, processor = _classes(folder, recipe)
    lines = [f"from transformers import {kind}, {processor}", ""]
    trust = ", trust_remote_code=True" if recipe.model.trust_remote_code else ""
    if is_adapter:
        lines.insert(0, "from peft import PeftModel")
        revision = "" if recipe.model.revision is None else f", revision={_string(recipe.model.revision)}"
        lines += [
            f'base = {kind}.from_pretrained({_string(recipe.model.path)}{revision}, dtype="auto"{trust})',
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        ]
    else:
        lines.append(f'model = {kind}.from_pretrained("path/to/this/folder", dtype="auto"{trust})')
    lines.append(f'processor = {processor}.from_pretrained("path/to/this/folder"{trust})')
    text = _fenced("\n".join(lines), "python")
    if is_adapter and recipe.output.save_merged:
        text += "\nThe folder `merged` holds the whole model, which loads without peft.\n"
    return text


def _classes(folder: Path, recipe: Recipe) -> tuple[str, str]:
    """Returns the names of the auto classes that load the model and its processor, such as "AutoTokenizer"."""
    for path in (folder / "config.json", folder / "merged" / "config.json", Path(recipe.model.path) / "config.json"):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and "vision_config" not in config:
            return "AutoModelForCausalLM", "AutoTokenizer"
        break
    else:
        if not any((folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")):
            return "AutoModelForCausalLM", "AutoTokenizer"
    return "AutoModelForImageTextToText", "AutoProcessor"


def _string(text: str) -> str:
    """Returns the text as a string literal of Python, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _is_on_hub(path: str) -> bool:
    """Returns whether a path looks like a name on the hub, such as "a/b", and does not exist on this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not path.startswith(".") and not os.path.exists(path)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _plain(text: str) -> str:
    """Returns the text on one line, with the special characters of Markdown and HTML escaped."""
    return re.sub(r"([\\`*_{}\[\]()<>#!|&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Returns the text on one line as a Markdown code span, even if it contains backticks."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall(r"`+", text)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}"


def _cell(text: str) -> str:
    return _plain(text) if re.search(r"[^\w .,:%()+-]", text) else " ".join(text.split())


def _fenced(text: str, language: str) -> str:
    """Returns the text as a fenced Markdown code block, even if it contains runs of backticks."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"

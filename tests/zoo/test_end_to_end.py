"""Tests mpo_ext on models trained by transformers alone: the loss must be equal, and all generated answers right."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo_processors as processors
import zoo_templates as templates
import zoo_tokenizers as tokenizers
from PIL import Image
from torch import nn
from zoo_families import with_template
from zoo_oracle import messages_of, template_ids

from mpo_ext.cli.main import main

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
QUESTIONS = ("What is shown here?", "Which colour?", "How many squares?", "Is it red?")
ANSWERS = ("12", "red", "7", "blue")
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 128, 0), "white": (255, 255, 255)}

transformers.logging.set_verbosity_error()
Example = tuple[str, str, str, str | None]  # question, answer, response, path of an image


def text_model(family: str, processor: Any, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(processor), pad_token_id=0, bos_token_id=None, eos_token_id=None, **TEXT, **settings
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def chatml_of_sentencepiece() -> tuple[nn.Module, Any]:
    """Returns a Llama model and its tokenizer.

    The tokenizer has the ChatML format, and marks spaces as SentencePiece does. Many fine-tuned models have such a
    tokenizer.
    """
    processor = with_template(
        lambda: tokenizers.sentencepiece("<|im_start|>", "<|im_end|>", scheme="legacy"), templates.INTERNLM2
    )
    return text_model("Llama", processor), processor


def thinking() -> tuple[nn.Module, Any]:
    processor = with_template(lambda: tokenizers.qwen(plain=("<think>", "</think>")), templates.QWEN3)
    return text_model("Qwen3", processor, head_dim=16), processor


def smolvlm() -> tuple[nn.Module, Any]:
    """Returns an Idefics3, and a processor with SmolVLM's chat template. The generation prompt ends with "Assistant:".

    SmolVLM's own processor needs torchvision.
    """
    processor = processors.idefics3()
    processor.chat_template = templates.SMOLVLM.replace("<|im_start|>", "<|begin_of_text|>")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.Idefics3Config(
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1},
            **{"image_size": 32, "patch_size": 8},
        },
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), "bos_token_id": None, **TEXT},
        image_token_id=image,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def text_examples(*thoughts: str) -> Callable[[Path], list[Example]]:
    """Returns a function that makes examples. Each response begins with one of the ``thoughts``, in turn."""

    def examples(folder: Path) -> list[Example]:
        return [
            (question, answer, f"{thoughts[number % len(thoughts)]}It is so.\n\nFinal answer: {answer}", None)
            for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
        ]

    return examples


def image_examples(folder: Path) -> list[Example]:
    examples = []
    for answer, colour in COLOURS.items():
        path = folder / f"{answer}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        examples.append(("<image>\nWhich colour?", answer, f"Final answer: {answer}", str(path)))
    return examples


FORMS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], Callable[[Path], list[Example]], str]] = {
    "SmolVLM": (smolvlm, image_examples, "<end_of_utterance>"),
    "SentencePiece and ChatML": (chatml_of_sentencepiece, text_examples(""), "<|im_end|>"),
    "thinking": (thinking, text_examples("<think>\nCount the squares.\n</think>\n\n", ""), "<|im_end|>"),
}


def labelled(processor: Any, example: Example, end: str) -> dict[str, torch.Tensor]:
    """Returns model inputs and labels of a conversation, made with ``apply_chat_template`` alone."""
    question, _, response, path = example
    content: Any = question
    if path is not None:
        content = [Image.open(path).convert("RGB"), question.removeprefix("<image>\n")]
    prompt = messages_of(processor, [("user", content)])
    whole = [*prompt, *messages_of(processor, [("assistant", response)])]
    out = processor.apply_chat_template(whole, tokenize=True, return_dict=True, return_tensors="pt")
    ids = out["input_ids"][0].tolist()
    start = len(template_ids(processor, prompt, generation_prompt=True))
    tokenizer = getattr(processor, "tokenizer", processor)
    stop = ids.index(tokenizer.convert_tokens_to_ids(end), start) + 1
    labels = [token if start <= place < stop else -100 for place, token in enumerate(ids)]
    return {**out, "labels": torch.tensor([labels])}


def loss_and_labels(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Returns the summed negative log-probs of the labels, and the number of labels."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    labels = inputs["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
    return loss, int((labels != -100).sum())


def train_in_own_form(model: nn.Module, examples: Sequence[dict[str, torch.Tensor]]) -> None:
    """Trains until the mean loss of the labels is below 0.02. Fails if 300 steps are not enough."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(300):
        optimizer.zero_grad()
        losses = [loss_and_labels(model, inputs) for inputs in examples]
        loss = sum(part for part, _ in losses) / sum(count for _, count in losses)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss.item() < 0.02:
            return
    pytest.fail(f"the model must learn {len(examples)} examples, got loss {loss.item():.3f}")


@pytest.fixture(scope="module", params=list(FORMS))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Example], Any]:
    """Trains a model. Returns the folder of the model, the training examples, and the loss on these examples.

    The loss is computed without mpo_ext.
    """
    build, make_examples, end = FORMS[request.param]
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model, processor = build()
    examples = make_examples(folder)
    inputs = [labelled(processor, example, end) for example in examples]
    train_in_own_form(model, inputs)
    model.eval()
    with torch.no_grad():
        losses = [loss_and_labels(model, each) for each in inputs]
    model.generation_config.eos_token_id = None  # the end of the turn comes from the template
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder, examples, float(sum(part for part, _ in losses)) / sum(count for _, count in losses)


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_first_loss_is_that_of_the_model_s_own_form(trained: tuple[Path, list[Example], float]) -> None:
    folder, examples, own_loss = trained
    lines = []
    for number, (question, _, response, path) in enumerate(examples):
        rejected = examples[number - 1][2]
        lines.append(
            {"question": question, "chosen": response, "rejected": rejected, "images": [path] if path else []}
        )
    recipe = {
        "model": {"path": str(folder / "model")},
        "data": {"train": [str(write(folder / "pairs.jsonl", lines))]},
        "optim": {"batch_size": len(lines), "max_steps": 1, "learning_rate": 1e-6},
        "output": {"dir": str(folder / "out"), "save_every": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    (line, *_) = [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]
    assert line["pairs"] == len(examples)
    assert line["ntp_loss"] == pytest.approx(own_loss, abs=1e-4)


def test_evaluate_finds_every_answer_right(trained: tuple[Path, list[Example], float]) -> None:
    folder, examples, _ = trained
    items = [
        {"question": question, "answer_gt": answer, **({"image": path} if path else {})}
        for question, answer, _, path in examples
    ]
    data = write(folder / "items.jsonl", items)
    options = ["--prompt", "none", "--style", "final_answer", "--max-new-tokens", "60", "--device", "cpu"]
    out = folder / "evaluation"
    assert main(["evaluate", f"m={folder / 'model'}", "--data", str(data), "--out", str(out), *options]) == 0
    predictions = [json.loads(line) for path in out.rglob("predictions*.jsonl") for line in path.open()]
    assert [one["correct"] for one in predictions] == [True] * len(examples)
    texts = {one["response"].removeprefix("<think>\n\n</think>\n\n") for one in predictions}
    assert texts == {response for _, _, response, _ in examples}

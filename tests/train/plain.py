"""Mixed Preference Optimization in plain float64 PyTorch. Tests compare the trainer with this reference.

The script does not use mpo_ext. Each response gets a separate forward pass with full logits and log_softmax. A step
has one backward pass. The loss follows the paper (arXiv 2411.10442), and the settings follow the recipe's
documentation. The reward shift follows the authors' rule. AdamW, gradient clipping and the schedules follow torch and
transformers.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

IMAGE_TOKENS = 4
PIXEL_MEAN, PIXEL_SPREAD = 0.3, 0.35


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run, named as in a recipe. The prefix ``shift_`` stands for the section ``reward_shift``."""

    beta: float = 0.1
    dpo_weight: float = 0.8
    bco_weight: float = 0.2
    ntp_weight: float = 1.0
    label_smoothing: float = 0.0
    ntp_average: str = "token"
    average_over: str = "step"
    shift_mode: str = "cumulative"
    shift_decay: float = 0.99
    shift_update: str = "before"
    shift_value: float = 0.0
    shift_per: str = "micro_batch"
    sync_every: int = 0
    sync_mix: float = 0.6
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    warmup_ratio: float = 0.03
    schedule: str = "cosine"
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and its two responses, and the image (``[1, 3, 32, 32]`` float32) or None."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    pixels: Tensor | None


def read_pairs(path: Path, vocabulary: Mapping[str, int]) -> list[Pair]:
    """Reads a file of pairs. Each word is a token; pairs with equal responses are kept."""
    pairs = []
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        image = ["<img>", *["<IMG_CONTEXT>"] * IMAGE_TOKENS, "</img>"] if fields["images"] else []
        prompt = ["<|user|>", *image, *fields["question"].split(), "<|assistant|>"]
        texts = [prompt, *([*fields[side].split(), "<|im_end|>"] for side in ("chosen", "rejected"))]
        ids, chosen, rejected = (tuple(vocabulary.get(word, vocabulary["<unk>"]) for word in text) for text in texts)
        pixels = read_pixels(path.with_name(fields["images"][0])) if image else None
        pairs.append(Pair(ids, chosen, rejected, pixels))
    return pairs


def read_pixels(path: Path) -> Tensor:
    """Returns a grey image as model input: three channels of ``(value / 255 - mean) / spread`` in float32."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("RGB"))
    scaled = values.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return torch.from_numpy((scaled - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_SPREAD)).unsqueeze(0)


class WideNorm(nn.Module):
    """RMSNorm that computes in its input's dtype. transformers' RMSNorm rounds float64 inputs to float32."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def widen(model: nn.Module) -> nn.Module:
    """Converts a model to float64 in place, including its norms."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.__class__ = WideNorm
    return model.double()


class Lora(nn.Module):
    """A linear layer with LoRA: ``W x + b + (alpha / r) B A x``. Only A and B are trained."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.A, self.B = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * (x @ self.A.T) @ self.B.T


def add_lora(model: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> nn.Module:
    """Returns a frozen copy of the model with LoRA adapters.

    ``adapters`` maps the names of layers to ``(A [r, in], B [out, r])``.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    for name, (a, b) in adapters.items():
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, Lora(getattr(owner, last), a.double(), b.double(), scale))
    return model


def row_logp(model: nn.Module, pair: Pair, response: tuple[int, ...]) -> Tensor:
    """Returns the log-probs of all tokens at each position of the response, ``[length, V]``."""
    ids = torch.tensor([[*pair.prompt, *response]])
    images = {} if pair.pixels is None else {"pixel_values": pair.pixels.double()}
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **images).logits[0]
    return F.log_softmax(logits[len(pair.prompt) - 1 : -1], dim=-1)


def taken(rows: Tensor, response: tuple[int, ...]) -> Tensor:
    """Returns the log-prob of each response token. ``rows`` has the log-probs of the whole vocabulary, ``[length,
    V]``.
    """
    return rows[torch.arange(len(response)), torch.tensor(response)]


class Delta:
    """The state of the reward shift."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.value = settings.shift_value
        self.means: list[float] = []  # of all updates so far
        self.waiting: list[float] = []  # rewards since the last optimizer step

    def of_micro_batch(self, rewards: list[float]) -> float:
        """Adds all rewards of a micro-batch. Returns the reward shift for the loss of this micro-batch."""
        before = self.value
        if self.settings.shift_per == "optimizer_step":
            self.waiting += rewards
        else:
            self._move(sum(rewards) / len(rewards))
        return self.value if self.settings.shift_update == "before" else before

    def end_step(self) -> None:
        """Updates the shift at the end of an optimizer step, with the rewards collected during the step."""
        if self.waiting:
            self._move(sum(self.waiting) / len(self.waiting))
            self.waiting = []

    def _move(self, mean: float) -> None:
        mode, decay = self.settings.shift_mode, self.settings.shift_decay
        self.means.append(mean)
        if mode == "cumulative":
            self.value = sum(self.means) / len(self.means)
        elif mode == "ema":
            self.value = decay * self.value + (1 - decay) * mean


def rate(settings: Settings, step: int, steps: int) -> float:
    """Returns the learning rate of a step, counted from 0.

    The schedules are those of transformers' ``get_<schedule>_schedule_with_warmup``.
    """
    warmup = math.ceil(settings.warmup_ratio * steps)
    if step < warmup:
        factor = step / max(1, warmup)
    elif settings.schedule == "constant":
        factor = 1.0
    elif settings.schedule == "linear":
        factor = (steps - step) / max(1, steps - warmup)
    else:
        progress = (step - warmup) / max(1, steps - warmup)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * factor


class AdamW:
    """AdamW (arXiv 1711.05101) with weight decay on parameters with at least two axes.

    A parameter without a gradient does not change, as in torch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: Settings) -> None:
        self.parameters, self.settings = parameters, settings
        self.first = [torch.zeros_like(one) for one in parameters]
        self.second = [torch.zeros_like(one) for one in parameters]
        self.steps = [0 for _ in parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], learning_rate: float) -> None:
        """Updates the parameters with their gradients. A parameter with the gradient None stays unchanged."""
        beta1, beta2 = self.settings.betas
        for number, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            if gradient is None:
                continue
            self.steps[number] += 1
            steps, first, second = self.steps[number], self.first[number], self.second[number]
            first.copy_(beta1 * first + (1 - beta1) * gradient)
            second.copy_(beta2 * second + (1 - beta2) * gradient**2)
            mean, variance = first / (1 - beta1**steps), second / (1 - beta2**steps)
            decay = self.settings.weight_decay if parameter.dim() > 1 else 0.0
            parameter.sub_(learning_rate * decay * parameter)
            parameter.sub_(learning_rate * mean / (variance.sqrt() + self.settings.eps))


def train(
    model: nn.Module,
    reference: nn.Module | None,
    steps: Sequence[Sequence[Sequence[Pair]]],
    settings: Settings,
) -> Iterator[dict[str, float]]:
    """Trains in place, and yields the metrics of each step.

    Args:
        model: Model in float64. Parameters with ``requires_grad`` are trained.
        reference: Reference model in float64; None if the loss has no preference term. If ``sync_every`` is not 0, the
            reference model is changed in place.
        steps: The micro-batches of each step. A micro-batch is a list of pairs.
        settings: Settings of the run.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, delta = AdamW(learning, settings), Delta(settings)
    known: dict[tuple[Any, ...], float] = {}  # log-probs under the reference, until it moves
    for number, micro_batches in enumerate(steps):
        measured = [
            _micro_batch(model, reference, micro_batch, settings, delta, known) for micro_batch in micro_batches
        ]
        loss = _average([pair for pairs in measured for pair in pairs], settings)
        if settings.average_over == "micro_batch":
            loss = torch.stack([_average(pairs, settings) for pairs in measured]).mean()
        gradients = torch.autograd.grad(loss, learning, allow_unused=True)
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients if gradient is not None))
        factor = min(1.0, settings.max_grad_norm / (norm + 1e-6)) if settings.max_grad_norm else 1.0
        learning_rate = rate(settings, number, len(steps))
        clipped = [None if gradient is None else gradient * factor for gradient in gradients]
        optimizer.step(clipped, learning_rate)
        delta.end_step()
        yield {
            **_line([pair for pairs in measured for pair in pairs], settings, reference is not None),
            "loss": loss.item(),
            "grad_norm": norm,
            "learning_rate": learning_rate,
            **({} if reference is None else {"reward_shift": delta.value}),
        }
        if settings.sync_every and (number + 1) % settings.sync_every == 0 and reference is not None:
            with torch.no_grad():
                for theirs, ours in zip(reference.parameters(), model.parameters(), strict=True):
                    theirs.copy_((1 - settings.sync_mix) * theirs + settings.sync_mix * ours)
            known.clear()


@dataclasses.dataclass
class _Measured:
    """Loss terms and metrics of a pair after its forward pass."""

    dpo: Tensor
    bco: Tensor
    chosen_nll: Tensor  # [chosen tokens]
    logp: tuple[float, float]
    rewards: tuple[float, float]
    tokens: tuple[int, int]
    entropy: float  # summed over the tokens of both responses
    top1: int


def _micro_batch(
    model: nn.Module,
    reference: nn.Module | None,
    pairs: Sequence[Pair],
    settings: Settings,
    delta: Delta,
    known: dict[tuple[Any, ...], float],
) -> list[_Measured]:
    """Returns the loss terms of each pair of a micro-batch.

    ``delta`` computes the reward shift of the micro-batch. ``known`` caches the reference log-probs.
    """
    found = []
    for pair in pairs:
        responses = (pair.chosen, pair.rejected) if reference is not None else (pair.chosen,)
        rows = [row_logp(model, pair, response) for response in responses]
        tokens = [taken(one, response) for one, response in zip(rows, responses, strict=True)]
        rewards = []
        for response, one in zip(responses, tokens, strict=True):
            if reference is None:
                continue
            if (id(pair), response) not in known:
                with torch.no_grad():
                    known[id(pair), response] = float(taken(row_logp(reference, pair, response), response).sum())
            rewards.append(settings.beta * (one.sum() - known[id(pair), response]))
        found.append((responses, rows, tokens, rewards))
    shift = 0.0
    if reference is not None:
        shift = delta.of_micro_batch([reward.item() for *_, rewards in found for reward in rewards])
    result = []
    for responses, rows, tokens, rewards in found:
        dpo = bco = torch.zeros((), dtype=torch.float64)
        if rewards:
            chosen, rejected = rewards
            smoothing = settings.label_smoothing
            dpo = -(1 - smoothing) * F.logsigmoid(chosen - rejected) - smoothing * F.logsigmoid(rejected - chosen)
            bco = -F.logsigmoid(chosen - shift) - F.logsigmoid(-(rejected - shift))
        both = torch.cat(rows).detach()
        words = torch.tensor([token for response in responses for token in response])
        result.append(
            _Measured(
                dpo=dpo,
                bco=bco,
                chosen_nll=-tokens[0],
                logp=(tokens[0].sum().item(), tokens[-1].sum().item()),
                rewards=(rewards[0].item(), rewards[1].item()) if rewards else (0.0, 0.0),
                tokens=(len(tokens[0]), len(tokens[1]) if rewards else 0),
                entropy=-float((both.exp() * both).sum()),
                top1=int((both.argmax(-1) == words).sum()),
            )
        )
    return result


def _ntp(pairs: Sequence[_Measured], settings: Settings) -> Tensor:
    if settings.ntp_average == "token":
        return torch.cat([pair.chosen_nll for pair in pairs]).mean()
    return torch.stack([pair.chosen_nll.mean() for pair in pairs]).mean()


def _average(pairs: Sequence[_Measured], settings: Settings) -> Tensor:
    """Returns the MPO loss: the weighted DPO and BCO losses, averaged over the pairs, plus the weighted NTP loss."""
    preference = [settings.dpo_weight * pair.dpo + settings.bco_weight * pair.bco for pair in pairs]
    return torch.stack(preference).mean() + settings.ntp_weight * _ntp(pairs, settings)


def _line(pairs: Sequence[_Measured], settings: Settings, has_reference: bool) -> dict[str, float]:
    """Returns the metrics of a step. They are means over the pairs or tokens of the step, or counts."""
    tokens = sum(sum(pair.tokens) for pair in pairs)
    line = {
        "ntp_loss": _ntp(pairs, settings).item(),
        "chosen_logp": sum(pair.logp[0] for pair in pairs) / len(pairs),
        "entropy": sum(pair.entropy for pair in pairs) / tokens,
        "top1": sum(pair.top1 for pair in pairs) / tokens,
        "pairs": len(pairs),
        "chosen_tokens": sum(pair.tokens[0] for pair in pairs),
    }
    if not has_reference:
        return line
    margins = [pair.rewards[0] - pair.rewards[1] for pair in pairs]
    line |= {
        "dpo_loss": sum(pair.dpo.item() for pair in pairs) / len(pairs),
        "bco_loss": sum(pair.bco.item() for pair in pairs) / len(pairs),
        "chosen_reward": sum(pair.rewards[0] for pair in pairs) / len(pairs),
        "rejected_reward": sum(pair.rewards[1] for pair in pairs) / len(pairs),
        "rejected_logp": sum(pair.logp[1] for pair in pairs) / len(pairs),
        "reward_margin": sum(margins) / len(pairs),
        "rejected_tokens": sum(pair.tokens[1] for pair in pairs),
        # Policy and reference that agree leave the sign of a margin to rounding.
        "reward_accuracy": sum(margin > 0 for margin in margins) / len(pairs)
        if min(map(abs, margins)) > 1e-5
        else math.nan,
    }
    return line

"""Speed, memory and losses of a training step against TRL's DPOTrainer: ``python -m benchmarks.train_step``.

Both trainers run whole, from pairs on the disk to the optimizer, each in a process of its own, on one model, one file
of pairs and one order. They take turns: one makes a step while the others wait. TRL 1.16 has MPO's loss without a
reward shift (``sigmoid``, ``bco_pair``, ``sft``), so ours is fixed at 0 here.

The model is a real InternVL, tiny but for its vocabulary: pairs of four images of 256 tokens each, and responses of
128 tokens. ``--prompt text`` has 1,024 tokens of text in place of the images, since TRL refuses a precomputed
reference for images. A case that refuses or fails is listed with what it said.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.measure import Timing, _resident, environment, write_json
from mpo_ext.data.jsonl import write_pairs
from mpo_ext.data.records import Pair
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.recipe import Recipe, load_recipe
from mpo_ext.train.sampler import StepSampler, micro_batches

LEARNING_RATE = 1e-3  # so that ten steps of so small a model change its loss


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Model and pairs.

    Attributes:
        vocab: V, at least that of the tokenizer, whose words the pairs are made of.
        hidden: Of the decoder; heads have 64.
        layers: Of the decoder.
        images: Of each pair; 0 has text in their place.
        image_tokens: Of each image, a square number: each stands for 2 x 2 patches of 14 x 14 pixels.
        vision_hidden: Of the vision tower, which has two layers; heads have 64.
        response: Most tokens of a response, its end included.
        least_response: Fewest.
        text: Words of text in the prompt, besides its question.
        batch: Pairs of an optimizer step.
        micro_batch: Pairs that go through the model at a time.
    """

    vocab: int = 151936
    hidden: int = 256
    layers: int = 2
    images: int = 4
    image_tokens: int = 256
    vision_hidden: int = 128
    response: int = 128
    least_response: int = 128
    text: int = 0
    batch: int = 1
    micro_batch: int = 1

    @property
    def pixels(self) -> int:
        """Height and width of an image."""
        return 28 * round(self.image_tokens**0.5)


@dataclasses.dataclass(frozen=True)
class Case:
    """A trainer with its settings: of ``load_recipe`` for ours, of ``DPOConfig`` for TRL."""

    is_trl: bool
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "TRL": Case(True),
    "TRL, precomputed": Case(True, {"precompute_ref_log_probs": True}),
    "TRL, torch_compile": Case(True, {"torch_compile": True}),
    "mpo_ext": Case(False),
    "mpo_ext, precomputed": Case(False, {"reference.kind": "precomputed"}),
    "mpo_ext, recompute=False": Case(False, {"loss.recompute": False}),
    "mpo_ext, separate rows": Case(False, {"loss.shared_prefix": False}),
    "mpo_ext, from logits": Case(False, {"loss.from_logits": True}),
    "mpo_ext, separate rows, from logits": Case(False, {"loss.shared_prefix": False, "loss.from_logits": True}),
}
DEFAULT_CASES = ("TRL", "TRL, precomputed", "mpo_ext", "mpo_ext, precomputed")


def build(sizes: Sizes) -> tuple[Any, Any]:
    """The untrained model and its processor; equal weights each time."""
    from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration

    from mpo_ext.demo.model import CHAT_TEMPLATE, DigitsProcessor, build_tokenizer

    tokenizer = build_tokenizer()
    if sizes.vocab < len(tokenizer):
        raise ValueError(f"vocab must be at least {len(tokenizer)}, the words of the tokenizer, got {sizes.vocab}")
    size = {"height": sizes.pixels, "width": sizes.pixels}
    processor = DigitsProcessor(
        GotOcr2ImageProcessorPil(size=size, crop_to_patches=False),
        tokenizer,
        image_seq_length=sizes.image_tokens,
        chat_template=CHAT_TEMPLATE,
    )
    config = InternVLConfig(
        vision_config={
            "hidden_size": sizes.vision_hidden,
            "intermediate_size": 4 * sizes.vision_hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": max(1, sizes.vision_hidden // 64),
            "image_size": [sizes.pixels] * 2,
            "patch_size": [14, 14],
            "num_channels": 3,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "intermediate_size": 3 * sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": max(1, sizes.hidden // 64),
            "num_key_value_heads": max(1, sizes.hidden // 64),
            "max_position_embeddings": 8192,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=sizes.image_tokens,
        downsample_ratio=0.5,
    )
    torch.manual_seed(0)
    return InternVLForConditionalGeneration(config), processor


def make_pairs(folder: Path, sizes: Sizes, count: int) -> Path:
    """Writes pairs of random words about random images. Returns their file."""
    from mpo_ext.demo import digits

    rng = np.random.default_rng(0)
    words = sorted(digits.vocabulary())

    def text(count: int) -> str:
        return " ".join(rng.choice(words, count))

    def response() -> str:
        return text(
            int(rng.integers(sizes.least_response, sizes.response + 1)) - 1
        )  # the end of the turn comes behind

    pairs = []
    for number in range(count):
        paths = []
        for place in range(sizes.images):
            coarse = rng.integers(256, size=(sizes.pixels // 14, sizes.pixels // 14, 3), dtype=np.uint8)
            path = folder / f"{number}-{place}.png"
            Image.fromarray(coarse).resize((sizes.pixels, sizes.pixels), Image.Resampling.NEAREST).save(path)
            paths.append(str(path))
        question = "<image>" * sizes.images + text(8 + sizes.text)
        pairs.append(Pair(question, response(), response(), tuple(paths)))
    path = folder / "pairs.jsonl"
    write_pairs(path, pairs)
    return path


def make_recipe(folder: Path, pairs: Path, sizes: Sizes, steps: int, settings: Mapping[str, Any]) -> Recipe:
    """Our side's recipe: what TRL's trainer does, unless ``settings`` say otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    sections = {"model": {"path": "unused"}, "data": {"train": [str(pairs)]}, "output": {"dir": str(folder / "run")}}
    path.write_text(json.dumps(sections))
    wanted = {
        "data.max_length": None,
        "loss.average_over": "micro_batch",
        "reward_shift.mode": "fixed",
        "optim.learning_rate": LEARNING_RATE,
        "optim.batch_size": sizes.batch,
        "optim.micro_batch_size": sizes.micro_batch,
        "optim.max_steps": steps,
        "optim.schedule": "constant",
        "optim.warmup_ratio": 0.0,
        "optim.weight_decay": 0.0,
        "output.save_every": 0,
        **settings,
    }
    return load_recipe(path, [f"{name}={json.dumps(value)}" for name, value in wanted.items()])


def order_of(recipe: Recipe, sizes: Sizes) -> list[int]:
    """Numbers of the pairs in the order in which our trainer's micro-batches take them."""
    mixture = Mixture(recipe.data.train, seed=recipe.optim.seed)
    sampler = StepSampler(mixture.epoch, batch_size=recipe.optim.batch_size, seed=recipe.optim.seed)
    order: list[int] = []
    for step in range(sampler.steps_per_epoch):
        indices = [int(index) for index in sampler.step(step)]
        lengths = []
        for index in indices:
            pair = mixture[index]
            assert isinstance(pair, Pair)
            lengths.append(len(pair.question.split()) + max(len(pair.chosen.split()), len(pair.rejected.split())))
        parts = micro_batches(lengths, sizes.micro_batch)
        order += [indices[position] for part in parts for position in part]
    return order


@dataclasses.dataclass
class Step:
    """What a side reports of a step.

    Attributes:
        loss: Mean of its micro-batches.
        seconds: Of the clock on the wall.
        cpu_seconds: Of all threads.
        peak: Resident bytes, beyond those before the model was built, at the highest since the last report.
        parts: Seconds by part, where they are asked for.
    """

    loss: float
    seconds: float
    cpu_seconds: float
    peak: int
    parts: dict[str, float]


class Gate:
    """Where a side waits for its turn. The clock runs from a turn's beginning to the end of the step.

    Args:
        connection: To the process that gives the turns; None never waits, and keeps the steps in ``steps``.
        parts: Where the step's parts are collected.
    """

    def __init__(self, connection: Any = None, parts: Parts | None = None) -> None:
        self.connection, self.parts = connection, parts
        self.steps: list[Step] = []
        self.before = _resident("VmRSS")
        self._start()

    def _start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        if self.parts is not None:
            self.parts.seconds.clear()
        self.begin_s, self.begin_cpu_s = time.perf_counter(), time.process_time()

    def __call__(self, loss: float) -> None:
        """Reports a step and waits for the next turn."""
        elapsed, cpu = time.perf_counter() - self.begin_s, time.process_time() - self.begin_cpu_s
        parts = {} if self.parts is None else dict(self.parts.seconds)
        step = Step(loss, elapsed, cpu, _resident("VmHWM") - self.before, parts)
        if self.connection is None:
            self.steps.append(step)
        else:
            self.connection.send(step)
            self.connection.recv()
        self._start()


class Parts:
    """Seconds of the parts of a step, by hooks on the policy and on what trains it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._marks: dict[str, float] = {}

    def wrap(self, call: Callable[..., Any], name: str, *, of_policy: bool = False) -> Callable[..., Any]:
        """The call, timed; with ``of_policy`` only where gradients are recorded."""

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if of_policy and not torch.is_grad_enabled():
                return call(*args, **kwargs)
            begin_s = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin_s

        return timed

    def watch(self, model: Any, accelerator: Any) -> None:
        """Times the policy's forward and backward, the gradient's norm and the optimizer."""
        from torch.optim import optimizer

        tower, decoder = model.model.vision_tower, model.model.language_model
        for module, name in ((tower, "vision"), (decoder, "decoder")):
            module.forward = self.wrap(module.forward, f"{name}, forward", of_policy=True)
            module.register_forward_hook(functools.partial(self._mark_backward, name))
        backward = accelerator.backward

        def marked(*args: Any, **kwargs: Any) -> None:
            self._marks = {"begin": time.perf_counter()}
            backward(*args, **kwargs)
            end_s = time.perf_counter()
            at_decoder = self._marks.get("decoder", end_s)
            at_vision = self._marks.get("vision", end_s)
            self.seconds["head, backward"] += at_decoder - self._marks["begin"]
            self.seconds["decoder, backward"] += at_vision - at_decoder
            self.seconds["vision, backward"] += end_s - at_vision

        accelerator.backward = marked
        accelerator.clip_grad_norm_ = self.wrap(accelerator.clip_grad_norm_, "gradient norm")
        begun: list[float] = []
        optimizer.register_optimizer_step_pre_hook(lambda *_: begun.append(time.perf_counter()))
        optimizer.register_optimizer_step_post_hook(
            lambda *_: self.seconds.__setitem__("optimizer", time.perf_counter() - begun[-1])
        )

    def _mark_backward(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        hidden = output.last_hidden_state
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._marks.__setitem__(name, time.perf_counter()))


class _DoneError(Exception):
    """Ends a run behind its last step, before a model is written."""


def run_ours(gate: Gate, pairs: Path, sizes: Sizes, steps: int, settings: Mapping[str, Any]) -> None:
    """Trains with ``mpo_ext.train``; the gate is called after each step."""
    from mpo_ext.train import loop
    from mpo_ext.train import reference_model as references

    def on_step(step: int, line: Mapping[str, float]) -> None:
        gate(line["loss"])
        if step == steps:
            raise _DoneError

    with tempfile.TemporaryDirectory(prefix="mpo_ext-benchmark-") as folder:
        recipe = make_recipe(Path(folder), pairs, sizes, steps, settings)
        model, processor = build(sizes)
        trainer = loop.Trainer(recipe, model=model, processor=processor, on_step=on_step)
        with contextlib.ExitStack() as stack:
            if gate.parts is not None:
                wrap = gate.parts.wrap
                gate.parts.watch(model, trainer.accelerator)
                for owner, name, part in (
                    (loop, "linear_mpo_loss", "head, forward"),
                    (loop, "mpo_loss", "head, forward"),
                    (references.CopyReference, "logp", "reference"),
                    (loop.Shares, "__getitem__", "data"),
                ):
                    stack.callback(setattr, owner, name, getattr(owner, name))
                    setattr(owner, name, wrap(getattr(owner, name), part))
            with contextlib.suppress(_DoneError):
                trainer.run()


def run_trl(gate: Gate, pairs: Path, sizes: Sizes, steps: int, settings: Mapping[str, Any]) -> None:
    """Trains with TRL's DPOTrainer; the gate is called after each step.

    Its defaults, but for: float32 and no gradient checkpointing, as on our side; no limit of length, which is 1,024
    by default; no log. Its optimizer is the fused AdamW, its default.
    """
    from datasets import Dataset
    from datasets import Image as ImageFeature
    from datasets import List as ListFeature
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    losses: list[float] = []

    class Recorded(DPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    class Turns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = statistics.fmean(losses)
            losses.clear()
            gate(loss)

    with tempfile.TemporaryDirectory(prefix="mpo_ext-benchmark-") as folder:
        recipe = make_recipe(Path(folder), pairs, sizes, steps, {})
        mixture = Mixture(recipe.data.train, seed=recipe.optim.seed)
        rows = []
        for index in order_of(recipe, sizes):
            pair = mixture[index]
            assert isinstance(pair, Pair)
            row: dict[str, Any] = {
                "prompt": [{"role": "user", "content": pair.question.replace("<image>", "")}],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            rows.append({**row, "images": list(pair.images)} if sizes.images else row)
        dataset = Dataset.from_list(rows)
        if sizes.images:
            dataset = dataset.cast_column("images", ListFeature(ImageFeature()))
        options = {
            "output_dir": folder,
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [recipe.loss.dpo_weight, recipe.loss.bco_weight, recipe.loss.ntp_weight],
            "beta": recipe.loss.beta,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": recipe.optim.max_grad_norm,
            "max_steps": steps,
            "per_device_train_batch_size": sizes.micro_batch,
            "gradient_accumulation_steps": sizes.batch // sizes.micro_batch,
            "train_sampling_strategy": "sequential",
            "max_length": None,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **settings,
        }
        model, processor = build(sizes)
        trainer = Recorded(
            model=model,
            ref_model=None if options.get("precompute_ref_log_probs") else copy.deepcopy(model),
            args=DPOConfig(**options),
            train_dataset=dataset,
            processing_class=processor,
            callbacks=[Turns()],
        )
        trainer.remove_callback(PrinterCallback)
        with contextlib.ExitStack() as stack:
            if gate.parts is not None:
                from trl.trainer import utils

                wrap = gate.parts.wrap
                gate.parts.watch(model, trainer.accelerator)
                stack.callback(setattr, utils, "_ChunkedLogProbFunction", utils._ChunkedLogProbFunction)
                apply = wrap(utils._ChunkedLogProbFunction.apply, "head, forward", of_policy=True)
                utils._ChunkedLogProbFunction = argparse.Namespace(apply=apply)
                if trainer.ref_model is not None:
                    trainer.ref_model.forward = wrap(trainer.ref_model.forward, "reference")
                trainer.data_collator = wrap(trainer.data_collator, "data")
            trainer.train()


def _side(connection: Any, case: Case, pairs: Path, sizes: Sizes, steps: int, threads: int, with_parts: bool) -> None:
    """A process: a case from its beginning to its end."""
    torch.set_num_threads(threads)
    torch.set_num_interop_threads(1)
    try:
        import transformers  # noqa: F401

        import mpo_ext.train.loop  # noqa: F401 - what is imported is not what is measured

        if case.is_trl:
            import trl.trainer.dpo_trainer  # noqa: F401
        gate = Gate(connection, Parts() if with_parts else None)
        (run_trl if case.is_trl else run_ours)(gate, pairs, sizes, steps, case.settings)
    except EOFError:  # the other end is gone
        return
    except Exception as error:  # a refusal of any kind is a result
        text = " ".join(str(error).split())
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {text[:300]}")


def run_cases(
    cases: Mapping[str, Case], sizes: Sizes, steps: int, *, threads: int, with_parts: bool = False
) -> tuple[dict[str, list[Step]], dict[str, str]]:
    """Runs all cases in turn, step by step.

    Args:
        cases: By name.
        sizes: Of model and pairs.
        steps: Of each case, the first of which includes everything before it.
        threads: Of each process.
        with_parts: Whether the parts of each step are timed.

    Returns:
        The steps of each case that ran, and for the others why they did not.
    """
    context = multiprocessing.get_context("spawn")
    done: dict[str, list[Step]] = {name: [] for name in cases}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mpo_ext-benchmark-") as folder:
        pairs = make_pairs(Path(folder), sizes, steps * sizes.batch)
        sides: dict[str, tuple[Any, Any]] = {}
        try:
            for step in range(steps):
                for name, case in cases.items():
                    if name in failed:
                        continue
                    if step == 0:  # one after the other, so that none is set up while another is timed
                        ours, theirs = context.Pipe()
                        arguments = (theirs, case, pairs, sizes, steps, threads, with_parts)
                        process = context.Process(target=_side, args=arguments)
                        process.start()
                        theirs.close()
                        sides[name] = process, ours
                    else:
                        sides[name][1].send("go")
                    try:
                        result = sides[name][1].recv()
                    except EOFError:
                        sides[name][0].join()
                        result = f"the process ended with code {sides[name][0].exitcode}"
                    if isinstance(result, str):
                        failed[name] = result
                    else:
                        done[name].append(result)
        finally:
            for process, connection in sides.values():
                connection.close()
                process.join()
    return {name: steps for name, steps in done.items() if name not in failed}, failed


def summary(steps: Sequence[Step]) -> dict[str, Any]:
    """Medians over all steps but the first; the peak over all of them."""
    counted = steps[1:]
    timing = Timing([step.seconds for step in counted])
    parts = {name: statistics.median(step.parts.get(name, 0.0) for step in counted) for name in counted[-1].parts}
    return {
        "median_s": timing.median_s,
        "spread_s": timing.spread_s,
        "median_cpu_s": statistics.median(step.cpu_seconds for step in counted),
        "peak": max(step.peak for step in steps),
        "peak_of_steps": max(step.peak for step in counted),
        "parts_s": parts,
        "losses": [step.loss for step in steps],
    }


def loss_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference between two runs' losses of a step."""
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def table(results: Mapping[str, dict[str, Any]], failed: Mapping[str, str], base: str) -> Iterator[str]:
    """Yields the lines of the table; ratios are those of the figures of the case and of the base."""
    yield (
        f"{'case':<36}{'step':>9}{'p20 .. p80':>18}{'times faster':>14}{'CPU s':>9}{'times less':>12}"
        f"{'peak MiB':>10}{'of ' + base:>8}{'loss gap':>10}"
    )
    first = results.get(base)
    for name, one in results.items():
        low, high = one["spread_s"]
        line = f"{name:<36}{one['median_s']:>7.2f} s{f'{low:.2f} .. {high:.2f} s':>18}"
        if first is None:
            yield f"{line}{'':>14}{one['median_cpu_s']:>9.2f}{'':>12}{one['peak'] / 2**20:>10.0f}"
            continue
        yield (
            f"{line}{first['median_s'] / one['median_s']:>14.2f}{one['median_cpu_s']:>9.2f}"
            f"{first['median_cpu_s'] / one['median_cpu_s']:>12.2f}{one['peak'] / 2**20:>10.0f}"
            f"{one['peak'] / first['peak']:>8.2f}{loss_gap(one['losses'], first['losses']):>10.1e}"
        )
    for name, reason in failed.items():
        yield f"{name:<36}not run: {reason}"


def parts_table(results: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the lines of the table of parts, in seconds."""
    names = dict.fromkeys(name for one in results.values() for name in one["parts_s"])
    yield f"{'part':<22}" + "".join(f"{case:>28}" for case in results)
    for name in names:
        yield f"{name:<22}" + "".join(f"{one['parts_s'].get(name, 0.0):>28.3f}" for one in results.values())
    rest = (one["median_s"] - sum(one["parts_s"].values()) for one in results.values())
    yield f"{'rest':<22}" + "".join(f"{value:>28.3f}" for value in rest)
    yield f"{'step':<22}" + "".join(f"{one['median_s']:>28.3f}" for one in results.values())


def main() -> None:
    """Prints the tables, and writes the figures as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Sizes):
        if field.name != "text":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--prompt", choices=("images", "text"), default="images")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each case, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(DEFAULT_CASES))
    parser.add_argument("--parts", action="store_true", help="times the parts of a step too")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Sizes) if field.name != "text"}
    sizes = Sizes(**fields)
    if args.prompt == "text":
        sizes = dataclasses.replace(sizes, images=0, text=sizes.images * sizes.image_tokens)

    print(", ".join(f"{key} {value}" for key, value in environment().items()))
    print(", ".join(f"{key} {value}" for key, value in dataclasses.asdict(sizes).items()))
    cases = {name: CASES[name] for name in args.cases}
    steps, failed = run_cases(cases, sizes, args.steps + 1, threads=args.threads, with_parts=args.parts)
    results = {name: summary(one) for name, one in steps.items()}
    print("\n".join(table(results, failed, "TRL")))
    if args.parts and results:
        print("\nmedian seconds by part")
        print("\n".join(parts_table(results)))
    if args.json:
        write_json(args.json, {"sizes": dataclasses.asdict(sizes), "results": results, "failed": failed})


if __name__ == "__main__":
    main()

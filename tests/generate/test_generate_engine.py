"""Tests TransformersEngine with the demo's InternVL, and VLLMEngine with a fake ``vllm`` module."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import dataclasses
import math
import multiprocessing
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("transformers", "sklearn", "PIL"):
    pytest.importorskip(package)

import torch
from PIL import Image

from mpo_ext.chat import chat_messages
from mpo_ext.demo import digits
from mpo_ext.demo.model import build_model, build_processor, build_tokenizer
from mpo_ext.generate.choices import choice_tokens
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.drawing import sample_token
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig, derive_seed, rank_and_world_size
from mpo_ext.generate.runner import run as run_pipeline
from mpo_ext.generate.transformers_engine import TransformersEngine, make_generation
from mpo_ext.generate.vllm_engine import VLLMEngine, devices_of_rank

SAMPLING = SamplingConfig(max_new_tokens=12, top_k=0, temperature=1.0)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    torch.manual_seed(0)
    processor = build_processor()
    return TransformersEngine(build_model(processor.tokenizer, hidden_size=32, layers=1), processor)


def requests_of(count: int, *, seed: int = 0, **options: Any) -> list[Request]:
    """Returns requests with and without an image, and with prefixes of several lengths."""
    tasks = digits.sample_tasks(digits.load_digits()["train"], count, np.random.default_rng(seed))
    requests = []
    for number, task in enumerate(tasks):
        requests.append(
            Request(
                key=str(number),
                question=task.question,
                images=(task.picture,) if number % 3 else (),
                prefix_ids=tuple(range(9, 9 + number % 5)),
                seed=derive_seed(seed, number),
                sampling=SAMPLING,
            )
        )
    return [dataclasses.replace(request, **options) for request in requests]


def with_batch(engine: TransformersEngine, size: int) -> TransformersEngine:
    return TransformersEngine(engine.model, engine.processor, batch_size=size)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_result_does_not_depend_on_the_batch_or_the_order(engine: TransformersEngine, temperature: float) -> None:
    requests = requests_of(24, sampling=dataclasses.replace(SAMPLING, temperature=temperature))
    alone = with_batch(engine, 1).generate(requests)
    assert len({generation.token_ids for generation in alone}) > 1
    assert with_batch(engine, 8).generate(requests) == alone
    order = random.Random(0).sample(range(24), 24)
    shuffled = with_batch(engine, 5).generate([requests[row] for row in order])
    assert shuffled == [alone[row] for row in order]


def test_padding_on_the_left_changes_no_logits(engine: TransformersEngine) -> None:
    requests = [request for request in requests_of(12) if request.images]
    prompts = [engine.chat.prompt(request) for request in requests]
    batch = engine._inputs(requests, prompts)
    assert (batch["attention_mask"] == 0).any()
    logits = engine.model(**batch).logits[:, -1]
    for row, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
        alone = engine.model(**engine._inputs([request], [prompt])).logits[:, -1]
        torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_what_the_turn_begins_with(engine: TransformersEngine) -> None:
    """Checks that a greedy response can be cut at any token: the model then continues it with the same tokens."""
    (request,) = requests_of(2, sampling=dataclasses.replace(SAMPLING, temperature=0.0), prefix_ids=())[1:]
    (whole,) = engine.generate([request])
    for cut in range(1, len(whole.token_ids)):
        (rest,) = engine.generate([dataclasses.replace(request, prefix_ids=whole.token_ids[:cut])])
        assert (*whole.token_ids[:cut], *rest.token_ids)[: len(whole.token_ids)] == whole.token_ids


def test_the_image_is_seen(engine: TransformersEngine) -> None:
    requests = [request for request in requests_of(6, prefix_ids=()) if request.images]
    seen = [engine._inputs([request], [engine.chat.prompt(request)]) for request in requests]
    assert all("pixel_values" in inputs for inputs in seen)
    blind = [dataclasses.replace(request, images=()) for request in requests]
    assert "pixel_values" not in engine._inputs(blind, [engine.chat.prompt(request) for request in blind])
    assert "<IMG_CONTEXT>" not in engine.chat.prompt_text(blind[0])


def test_the_reason_to_finish_and_the_end_token(engine: TransformersEngine) -> None:
    (request, *_) = requests_of(1)
    request = dataclasses.replace(request, prefix_ids=())
    for end in engine.chat.stop_ids:
        stopped = make_generation(engine.chat, request, [9, 10, end, 11])
        assert (stopped.token_ids, stopped.finish_reason) == ((9, 10), "stop")
    assert make_generation(engine.chat, request, [9, 10]).finish_reason == "length"
    assert len(engine.generate([request])[0].token_ids) <= SAMPLING.max_new_tokens


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    rows = logits.expand(20_000, -1)

    def shares(**options: Any) -> torch.Tensor:
        return torch.bincount(sample_token(rows, uniforms, SamplingConfig(**options)), minlength=5) / 20_000

    def close(left: torch.Tensor, right: torch.Tensor) -> None:
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)

    close(shares(temperature=1.0, top_k=0), torch.softmax(logits[0], -1))
    close(shares(temperature=0.5, top_k=0), torch.softmax(logits[0] / 0.5, -1))
    close(shares(temperature=1.0, top_k=2)[:2], torch.softmax(logits[0, :2], -1))
    close(shares(temperature=1.0, top_k=0, top_p=0.7)[:2], torch.softmax(logits[0, :2], -1))
    close(shares(temperature=1.0, top_k=0, top_p=1e-6), torch.eye(5)[0])
    close(shares(temperature=0), torch.eye(5)[0])


def test_a_row_of_nan_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="logits must have a finite maximum and no NaN"):
        sample_token(torch.full((1, 5), torch.nan), torch.zeros(1, dtype=torch.float64), SamplingConfig())


def test_images_stand_where_the_question_has_them() -> None:
    parts = chat_messages(Request(question="Is <image>\nlike <image>?", images=(1, 2)), as_parts=True)[0]["content"]
    image = {"type": "image"}
    assert parts == [{"type": "text", "text": "Is "}, image, {"type": "text", "text": "like "}, image,
                     {"type": "text", "text": "?"}]  # fmt: skip
    first = chat_messages(Request(question="Why?", images=(1,)), as_parts=True)[0]["content"]
    assert first == [image, {"type": "text", "text": "Why?"}]
    assert chat_messages(Request(question="Why?"), as_parts=False) == [{"role": "user", "content": "Why?"}]
    with pytest.raises(ValueError, match=r"question must have one <image> for each of the 2 images, got 1"):
        chat_messages(Request(question="<image>", images=(1, 2)), as_parts=True)


def test_a_tokenizer_without_a_template_gets_a_plain_prompt(engine: TransformersEngine) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    plain = TransformersEngine(engine.model, tokenizer)
    assert plain.chat.prompt_text(Request(question="What is the sum ?")) == "What is the sum ?\n"
    request = Request(question="What is the sum ?", sampling=SAMPLING)
    (generation,) = plain.generate([request])
    assert generation.text == plain.decode_response(request, generation.token_ids)


def test_ranks_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    launchers = [("SLURM_PROCID", "SLURM_NTASKS"), ("PMI_RANK", "PMI_SIZE"),
                 ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("RANK", "WORLD_SIZE")]  # fmt: skip
    for name in (name for launcher in launchers for name in launcher):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_world_size() == (0, 1)
    for number, (rank, world) in enumerate(launchers):  # each goes before those above it
        monkeypatch.setenv(rank, str(number))
        monkeypatch.setenv(world, "9")
        assert rank_and_world_size() == (number, 9)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank_and_world_size() == (2, 4)


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    """Writes questions about grids of digits to a file, and returns its folder."""
    import json

    lines = []
    tasks = digits.sample_tasks(digits.load_digits()["train"], 16, np.random.default_rng(1), "cot")
    for number, task in enumerate(tasks):
        task.picture.save(tmp_path / f"{number}.png")
        item = {"image": f"{number}.png", "question": f"<image>\n{task.question}", "chosen": task.response}
        lines.append(json.dumps({**item, "answer_gt": str(task.answer)}))
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", ["dropout_ntp", "correctness"])
def test_a_killed_run_of_the_model_ends_with_the_same_bytes(
    engine: TransformersEngine, grids: Path, name: str
) -> None:
    options = {"sampling": SAMPLING, "matcher": {"kind": "number"}}
    pipeline: Any = DropoutNTP(DropoutNTPConfig(samples=2, allow_truncated=True, **options))
    if name == "correctness":
        pipeline = Correctness(CorrectnessConfig(samples=4, allow_truncated=True, **options))

    def run(out: str) -> Any:
        per_block = {"block_size": 8, "image_root": str(grids)}
        return run_pipeline(pipeline, engine, grids / "items.jsonl", grids / out, stream=None, **per_block)

    def files(out: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (grids / out).glob("*.jsonl")}

    summary = run("whole")
    assert summary.items == 16
    assert sum(summary.lines.values()) > 0
    rng = random.Random(0)
    for _ in range(4):
        process = multiprocessing.get_context("fork").Process(target=run, args=("killed",))
        process.start()
        process.join(rng.uniform(0.05, 0.4))
        process.kill()
        process.join()
    run("killed")
    assert files("killed") == files("whole")


class FakeVLLM(types.ModuleType):
    """A fake ``vllm`` module with the functions that the engine calls."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.prompts: list[Any] = []
        self.params: list[Any] = []
        self.options: list[Any] = []
        self.most_running = 0
        self.logprobs: dict[int, float] = {}
        outer = self

        class SamplingParams:
            def __init__(self, **options: Any) -> None:
                self.options = options

        class Engine:
            """A fake vLLM engine: each step finishes the newest request, and prompts above 400 tokens are refused."""

            def __init__(self) -> None:
                self.waiting: list[tuple[str, Any]] = []

            def add_request(self, request_id: str, prompt: Any, params: Any, **options: Any) -> None:
                outer.options.append(options)
                if len(prompt["prompt_token_ids"]) > 400:
                    raise self.ValidationError("the prompt is longer than the maximum model length of 400")
                outer.prompts.append(prompt)
                outer.params.append(params)
                end = build_tokenizer().eos_token_id
                stopped = types.SimpleNamespace(token_ids=[9, 10, end], finish_reason="stop", stop_reason=None)
                cut = types.SimpleNamespace(token_ids=[9, 10], finish_reason="length", stop_reason=None)
                completion = [stopped, cut][len(self.waiting) % 2]
                entries = {token: types.SimpleNamespace(logprob=value) for token, value in outer.logprobs.items()}
                completion.logprobs = [entries] if params.options.get("logprobs") else None
                self.waiting.append((request_id, completion))

            def step(self) -> Any:
                outer.most_running = max(outer.most_running, len(self.waiting))
                request_id, completion = self.waiting.pop()
                unfinished = [types.SimpleNamespace(request_id=name, finished=False) for name, _ in self.waiting]
                done = types.SimpleNamespace(request_id=request_id, finished=True, outputs=[completion])
                return [*unfinished, done]

            def abort_request(self, request_ids: list[str]) -> None:
                self.waiting = [each for each in self.waiting if each[0] not in request_ids]

            class ValidationError(Exception):
                """Stands for vLLM's exception, which is not a subclass of ValueError."""

        class LLM:
            def __init__(self, model: str, **options: Any) -> None:
                self.options = options
                self.llm_engine = Engine()

        self.SamplingParams, self.LLM = SamplingParams, LLM
        self.exceptions = types.SimpleNamespace(VLLMValidationError=Engine.ValidationError)


def test_vllm_gets_ids_images_and_a_seed_for_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    processor = build_processor()
    engine = VLLMEngine("some/model", processor=processor, dtype="bfloat16")
    image = Image.new("RGB", (4, 4))
    first = Request(question="What is the sum", images=(image,), prefix_ids=(11, 12), seed=5, sampling=SAMPLING)
    second = Request(question="What is the sum", seed=6)
    stopped, cut = engine.generate([first, second])
    assert (stopped.token_ids, stopped.finish_reason) == ((9, 10), "stop")
    assert (cut.token_ids, cut.finish_reason) == ((9, 10), "length")
    assert engine.decode_response(first, (11, 12)) + stopped.text == engine.decode_response(first, (11, 12, 9, 10))
    assert cut.text == engine.decode_response(second, (9, 10))
    prompts, params = fake.prompts, fake.params
    assert prompts[0]["prompt_token_ids"][-2:] == [11, 12]
    torch.manual_seed(0)
    twin = TransformersEngine(build_model(processor.tokenizer, hidden_size=32, layers=1), processor)
    assert prompts[0]["prompt_token_ids"][:-2] == twin.chat.prompt_ids(first)
    assert prompts[1]["prompt_token_ids"] == twin.chat.prompt_ids(second)
    assert params[0].options["stop_token_ids"] == sorted(twin.chat.stop_ids)
    assert prompts[0]["multi_modal_data"] == {"image": [image]}
    (refused,) = engine.generate([Request(question="What is the sum", videos=("a.mp4",))])
    assert refused.refusal == "videos must be none for the engine vllm, got 1: use --engine transformers"
    assert "multi_modal_data" not in prompts[1]
    assert [each.options["seed"] for each in params] == [5, 6]
    assert params[0].options["top_k"] == -1
    assert params[0].options["max_tokens"] == 12
    settings = engine.settings()
    assert settings.pop("processor") == twin.settings()["processor"]
    assert settings == {"engine": "vllm", "model": "some/model", "dtype": "bfloat16"}


CHOICES = (("sum", "top-left"), ("top-right",))


def test_probabilities_of_choices_are_those_of_the_logits(engine: TransformersEngine) -> None:
    requests = requests_of(7, choices=CHOICES)
    generations = with_batch(engine, 3).generate([*requests, *requests_of(2)])
    assert [generation.choice_probs for generation in generations[7:]] == [None, None]
    vocabulary = engine.chat.tokenizer.get_vocab()
    suppressed = engine.model.generation_config.suppress_tokens
    for request, generation in zip(requests, generations, strict=False):
        inputs = engine._inputs([request], [engine.chat.prompt(request)])
        with torch.no_grad():
            logits = engine.model(**inputs).logits[0, -1].float()
        logits[suppressed] = -torch.inf
        probs = logits.softmax(dim=-1)
        expected = [sum(float(probs[vocabulary[word]]) for word in words) for words in CHOICES]
        assert generation.choice_probs == pytest.approx(expected, rel=1e-4)
        assert len(generation.token_ids) <= 1


def test_choices_that_begin_with_the_same_token_are_generated(engine: TransformersEngine) -> None:
    (request,) = requests_of(1, choices=(("unknown",), ("other", "sum")))  # both words are unknown to the tokenizer
    assert choice_tokens(engine.chat, request) is None
    (plain,) = requests_of(1)
    assert engine.generate([request]) == engine.generate([plain])
    clear = dataclasses.replace(request, choices=(("unknown", "top-left"), ("top-left", "sum", "top-right")))
    assert choice_tokens(engine.chat, clear) is None  # both spellings of the first choice are excluded
    vocabulary = engine.chat.tokenizer.get_vocab()
    shared = dataclasses.replace(request, choices=(("sum", "top-left"), ("top-left", "top-right")))
    assert choice_tokens(engine.chat, shared) == [[vocabulary["sum"]], [vocabulary["top-right"]]]


def test_vllm_measures_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = VLLMEngine("some/model", processor=build_processor())
    vocabulary = engine.chat.tokenizer.get_vocab()
    fake.logprobs = {vocabulary["sum"]: -1.0, vocabulary["top-right"]: -2.0, 3: -0.1}
    measured, plain = engine.generate([Request(question="What", choices=CHOICES), Request(question="What")])
    assert measured.choice_probs == pytest.approx((math.exp(-1), math.exp(-2)))
    assert plain.choice_probs is None
    options = [params.options for params in fake.params]
    assert (options[0]["max_tokens"], options[0]["logprobs"]) == (1, 20)
    assert (options[1]["max_tokens"], "logprobs" in options[1]) == (2048, False)
    fake.logprobs = {3: -0.1}
    assert engine.generate([Request(question="What", choices=CHOICES)])[0].choice_probs is None


def test_a_missing_vllm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match="VLLMEngine needs vllm: install the extra 'vllm'"):
        VLLMEngine("some/model")


def test_vllm_ends_a_refused_request_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", fake.exceptions)
    engine = VLLMEngine("some/model", processor=build_processor())
    requests = requests_of(3, images=(), prefix_ids=())
    requests[1] = dataclasses.replace(requests[1], prefix_ids=(9,) * 500)
    first, refused, last = engine.generate(requests)
    assert refused.refusal == "ValidationError: the prompt is longer than the maximum model length of 400"
    assert (first.refusal, last.refusal) == (None, None)
    assert first.token_ids[:2] == last.token_ids[:2] == (9, 10)


def test_vllm_gets_the_requests_of_several_blocks(monkeypatch: pytest.MonkeyPatch, grids: Path) -> None:
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = VLLMEngine("some/model", processor=build_processor(), concurrency=24)
    pipeline = Correctness(CorrectnessConfig(samples=4, sampling=SAMPLING, matcher={"kind": "number"}))
    run_pipeline(pipeline, engine, grids / "items.jsonl", grids / "out", image_root=str(grids), block_size=8)
    assert len(fake.prompts) == 64
    assert 24 <= fake.most_running < 24 + 8


def test_vllm_requests_that_end_otherwise_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", FakeVLLM())
    engine = VLLMEngine("some/model", processor=build_processor())
    (request,) = requests_of(1)
    completion = types.SimpleNamespace(token_ids=[9], finish_reason="abort")
    with pytest.raises(RuntimeError, match="vLLM must end request '0' with 'stop' or 'length', got 'abort'"):
        engine._generation(request, completion)


@pytest.mark.parametrize(
    ("environment", "count", "devices"),
    [
        ({}, 2, None),
        ({"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2, "6,7"),
        ({"SLURM_LOCALID": "3", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 1, "3"),
        ({"SLURM_LOCALID": "3", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "CUDA_VISIBLE_DEVICES": "3"}, 1, None),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, 1, None),
    ],
)
def test_each_process_of_vllm_gets_its_gpus(
    environment: dict[str, str], count: int, devices: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert devices_of_rank(count) == devices


def test_too_few_gpus_for_the_processes_of_vllm_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1,2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"processes must have 2 GPU\(s\) each .* got 3 GPU\(s\) for process 1"):
        devices_of_rank(2)


def save_model(folder: Path, **generation: Any) -> str:
    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor.tokenizer, hidden_size=32, layers=1)
    model.generation_config.update(**generation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_vllm_suppresses_the_tokens_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeVLLM()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    path = save_model(tmp_path / "one", suppress_tokens=[9, 12], bad_words_ids=[[10]])
    engine = VLLMEngine(path, trust_remote_code=True)
    engine.generate([Request(question="What is the sum", sampling=SAMPLING)])
    assert fake.params[0].options["logit_bias"] == {9: -100.0, 10: -100.0, 12: -100.0}
    assert engine.settings()["suppressed"] == [9, 10, 12]
    path = save_model(tmp_path / "two", bad_words_ids=[[10, 11]])
    with pytest.raises(
        ValueError, match=r"bad_words_ids in generation_config.json must be single tokens for vLLM, got \["
    ):
        VLLMEngine(path, trust_remote_code=True)


def write_adapter(folder: Path, **settings: Any) -> str:
    import json

    from safetensors.torch import save_file

    name = settings.pop("name", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight")
    folder.mkdir(parents=True)
    save_file({name: torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 12, "bias": "none", **settings}))
    return str(folder)


def test_vllm_gets_the_adapters_with_each_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeVLLM()
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, fake)
    request = types.SimpleNamespace(LoRARequest=lambda *arguments: arguments)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    adapter = write_adapter(tmp_path / "adapter")
    engine = VLLMEngine("some/model", processor=build_processor(), adapter=adapter)
    assert (engine.llm.options["enable_lora"], engine.llm.options["max_lora_rank"]) == (True, 16)
    engine.generate(requests_of(2))
    assert fake.options == [{"lora_request": ("adapter", 1, adapter)}] * 2
    assert (engine.name, engine.settings()["adapter"]) == (adapter, adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "adapter must be without use_dora for vLLM, got True"),
        ({"modules_to_save": ["lm_head"]}, r"adapter must be without modules_to_save for vLLM, got \['lm_head'\]"),
        ({"peft_type": "IA3"}, "adapter must be of type LORA without biases for vLLM, got IA3"),
        ({"r": 600}, "adapter must have a rank of at most 512 for vLLM, got 600: merge the adapters"),
        ({"name": "model.vision_tower.q.lora_A.weight"}, "adapter must change the language model only for vLLM"),
    ],
)
def test_adapters_that_vllm_cannot_run_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        VLLMEngine("some/model", adapter=write_adapter(tmp_path / "adapter", **settings))


def test_settings_of_the_checkpoint_that_change_the_distribution_are_ignored(engine: TransformersEngine) -> None:
    requests = requests_of(6)
    expected = engine.generate(requests)
    assert "ignored" not in engine.settings()
    model = build_model(engine.chat.tokenizer, hidden_size=32, layers=1)
    model.load_state_dict(engine.model.state_dict())
    penalties = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 11}
    model.generation_config.update(**penalties)
    with pytest.warns(UserWarning, match=r"generation_config.json asks for repetition_penalty=9.0, which") as warned:
        other = TransformersEngine(model, engine.processor)
    assert len(warned) == 3
    assert other.generate(requests) == expected
    assert other.settings()["ignored"] == penalties
    assert model.generation_config.repetition_penalty == 9.0


def test_a_response_stays_within_the_context(engine: TransformersEngine) -> None:
    """Tests that a prompt beyond the context is refused, also by a model whose positions are a table (GPT-2)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    gpt2 = TransformersEngine(GPT2LMHeadModel(config), tokenizer)
    sampling = SamplingConfig(max_new_tokens=200, temperature=0.0)
    requests = [Request(key=str(n), question=" ".join(["Read"] * n), sampling=sampling) for n in (1, 30, 200)]
    requests.append(dataclasses.replace(requests[0], key="prefix", prefix_ids=(9,) * 60))
    sizes = [len(gpt2.chat.prompt(request).ids) + len(request.prefix_ids) for request in requests]
    results = gpt2.generate(requests)
    for size, result in zip(sizes, results, strict=True):
        if size >= 64:
            assert "the prompt must be shorter than the model's context of 64 tokens" in str(result.refusal)
        else:
            assert result.refusal is None
            assert len(result.token_ids) <= 64 - size
    assert [result.refusal is None for result in results][:3] == [True, True, False]
    alone = [gpt2.generate([request])[0] for request in requests]
    assert results == alone
    limit = engine.model.config.get_text_config().max_position_embeddings
    long = Request(question="Read " * limit, sampling=sampling)
    assert "context" in str(engine.generate([long])[0].refusal)


def test_yarn_extends_the_context() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, rope_scaling=yarn,
    )  # fmt: skip
    engine = TransformersEngine(LlamaForCausalLM(config), tokenizer)
    sampling = SamplingConfig(max_new_tokens=1, temperature=0.0)
    requests = [Request(question=" ".join(["Read"] * n), sampling=sampling) for n in (90, 200)]
    results = engine.generate(requests)
    assert results[0].refusal is None
    assert "context of 128 tokens" in str(results[1].refusal)

"""Tests OpenAIEngine against a local fake server that answers, fails, and drops connections."""

# ruff: noqa: E402 - these packages come with an extra, and without them there is nothing to test here
import argparse
import base64
import dataclasses
import io
import json
import logging
import multiprocessing
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("transformers", "openai", "PIL"):
    pytest.importorskip(package, reason=f"needs {package}, which dev installs")

import tiny_processors
from openai_server import Server, running
from PIL import Image

from mpo_ext.cli import sample as cli
from mpo_ext.generate import openai_client
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
from mpo_ext.generate.engine import Request, SamplingConfig
from mpo_ext.generate.openai_client import ServerError, ServerOptions, retry_after_s
from mpo_ext.generate.openai_engine import OpenAIEngine
from mpo_ext.generate.runner import run

SAMPLING = SamplingConfig(max_new_tokens=200, temperature=1.0)
CORRECTNESS = CorrectnessConfig(samples=8, sampling=SAMPLING, matcher={"kind": "number"})
TOKENIZER = tiny_processors.with_template(
    tiny_processors.build_tokenizer(tiny_processors.SPECIAL[tiny_processors.QWEN]), tiny_processors.QWEN
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(openai_client, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with running(Server(TOKENIZER)) as server:
        yield server


def engine_of(server: Server, **options: Any) -> OpenAIEngine:
    engine = OpenAIEngine("stub", base_url=server.url, **{"processor": TOKENIZER, **options})
    server.bodies.clear()
    return engine


def write_items(folder: Path, count: int) -> Path:
    lines = [
        {"question": f"Question {n}?", "chosen": f"It is {n}, as one sees.", "answer_gt": "7"} for n in range(count)
    ]
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sample(engine: OpenAIEngine, source: Path, out: Path, pipeline: Any = None) -> Any:
    return run(pipeline or Correctness(CORRECTNESS), engine, source, out, block_size=64)


def files(out: Path) -> dict[str, bytes]:
    """Returns the contents of a run's output files by name.

    Leaves out the first line of the journal (the file of sampled responses), which has the settings.
    """
    contents = {path.name: path.read_bytes() for path in out.glob("*.json*")}
    journal = "journal-00000-of-00001.jsonl"
    return contents | {journal: contents[journal].partition(b"\n")[2]}


def test_prompts_are_token_ids_with_the_prefix(server: Server) -> None:
    engine = engine_of(server)
    assert engine.features.takes_ids
    assert engine.features.returns_ids
    first = Request(question="Why?", prefix_ids=(5, 6, 7), seed=2**63 - 1, sampling=SAMPLING)
    second = dataclasses.replace(first, prefix_ids=(), seed=5, sampling=SamplingConfig(top_k=0, max_new_tokens=3))
    whole, cut = engine.generate([first, second])
    bodies = {body["seed"]: body for body in server.bodies}
    body = bodies[2**63 - 1]
    assert body["prompt"] == [*engine.chat.prompt_ids(first), 5, 6, 7]
    assert (body["temperature"], body["top_k"], body["top_p"], body["max_tokens"]) == (1.0, 50, 1.0, 200)
    assert (body["repetition_penalty"], body["min_p"], body["stop_token_ids"]) == (
        1.0,
        0.0,
        sorted(engine.chat.stop_ids),
    )
    assert bodies[5]["top_k"] == -1
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert len(cut.token_ids) == 3
    assert whole.text == TOKENIZER.decode(whole.token_ids)
    assert not set(whole.token_ids) & engine.chat.stop_ids


@pytest.mark.parametrize("pipeline", ["correctness", "dropout_ntp"])
def test_the_forms_of_requests_give_the_same_pairs(server: Server, tmp_path: Path, pipeline: str) -> None:
    """Tests that three forms of requests give the same pairs.

    - The engine sends and receives token ids.
    - The engine sends token ids and receives text.
    - The engine sends chat messages and receives text. The server continues an assistant message.

    Also tests a server that accepts only seeds below 2**31. The engine sends it other seeds, so the pairs differ.
    """
    config = DropoutNTPConfig(samples=2, sampling=SAMPLING, matcher={"kind": "number"})
    made: Any = Correctness(CORRECTNESS) if pipeline == "correctness" else DropoutNTP(config)
    source, results = write_items(tmp_path, 12), []
    for number, features in enumerate(({}, {"returns_ids": False}, {"takes_ids": False}, {"seed_bits": 31})):
        vars(server).update({"returns_ids": True, "takes_ids": True, "seed_bits": 63, **features})
        engine = engine_of(server)
        assert engine.features.takes_ids == server.takes_ids
        assert engine.features.seed_bits == server.seed_bits
        summary = sample(engine, source, tmp_path / str(number), made)
        assert summary.pairs > 5
        results.append(files(tmp_path / str(number)))
    assert results[0] == results[1] == results[2]
    assert results[3] != results[0]  # other seeds


TOOLS = [{"type": "function", "function": {"name": "age", "parameters": {"type": "object"}}}]
CALL = {"id": "call-1", "type": "function", "function": {"name": "age", "arguments": {"of": "Z\u00fcrich"}}}
CALLED = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How old?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call-1", "content": "7"},
    {"role": "assistant", "content": "7."},
    {"role": "user", "content": "Sure?"},
)
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("takes_ids", [True, False])
def test_conversations_and_tools_reach_the_server_whole(server: Server, takes_ids: bool) -> None:
    """Checks that requests to the server contain all messages, tools and tool calls, as token ids or as JSON."""
    server.takes_ids, server.template = takes_ids, TOOL_TEMPLATE
    engine = engine_of(server, chat_options={"chat_template": TOOL_TEMPLATE})
    prefix = tuple(TOKENIZER.encode("As one sees", add_special_tokens=False))
    asked = Request(messages=CALLED, tools=tuple(TOOLS), prefix_ids=prefix, sampling=SAMPLING)
    unknown = Request(messages=CALLED[:4], sampling=SAMPLING, key="turns")
    answers = engine.generate([asked, unknown])
    assert [answer.refusal for answer in answers] == [None, None]
    own = [*TOKENIZER.apply_chat_template(
        list(CALLED), tools=TOOLS, chat_template=TOOL_TEMPLATE, add_generation_prompt=True, return_dict=False
    ), *prefix]  # fmt: skip
    if takes_ids:
        assert server.bodies[0]["prompt"] == own
        return
    body = next(body for body in server.bodies if "tools" in body)
    assert (body["tools"], body["tool_choice"]) == (TOOLS, "none")
    sent = body["messages"][2]["tool_calls"][0]
    assert sent == {**CALL, "function": {"name": "age", "arguments": json.dumps(CALL["function"]["arguments"])}}
    assert body["messages"][3]["tool_call_id"] == "call-1"
    assert [body["messages"][place]["role"] for place in (0, 1, -1)] == ["system", "user", "assistant"]


def test_a_conversation_that_the_template_leaves_out_is_refused(server: Server) -> None:
    server.takes_ids = server.takes_extensions = False
    engine = engine_of(server)  # its template has no tools
    sampling = dataclasses.replace(SAMPLING, top_k=0)
    asked = Request(messages=CALLED, tools=tuple(TOOLS), sampling=sampling)
    plain = Request(messages=CALLED[:2], sampling=sampling)
    refused, answered = engine.generate([asked, plain])
    assert "must write the tool" in (refused.refusal or "")
    assert answered.refusal is None
    assert len(server.bodies) == 1


def test_images_are_urls_with_every_pixel(server: Server) -> None:
    processor = tiny_processors.qwen()
    server.tokenizer = processor.tokenizer
    server.tokenizer.chat_template = tiny_processors.QWEN
    engine = engine_of(server, processor=processor)
    noise = bytes(random.Random(0).randrange(256) for _ in range(3 * 20 * 12))
    image = Image.frombytes("RGB", (20, 12), noise)
    prefix = tuple(engine.chat.tokenizer.encode("As one sees", add_special_tokens=False))
    request = Request(
        question="See <image> and\n<image>?", images=(image, image), prefix_ids=prefix, sampling=SAMPLING
    )
    plain = Request(question="Why?", sampling=SAMPLING)
    seen, blind = engine.generate([request, plain])
    assert seen.text
    assert blind.text
    (body,) = [body for body in server.bodies if "messages" in body]
    user, assistant = body["messages"]
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    for part in user["content"][1::2]:
        head, _, data = part["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == noise
    assert assistant == {"role": "assistant", "content": "As one sees"}
    assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)
    assert [body["prompt"] for body in server.bodies if "prompt" in body] == [engine.chat.prompt_ids(plain)]
    (broken,) = engine.generate([dataclasses.replace(request, images=("missing.png", image))])
    assert broken.refusal is not None
    assert "missing.png" in broken.refusal


def test_an_open_turn_that_the_server_would_close_is_refused(server: Server) -> None:
    server.takes_ids = server.continues = False
    engine = engine_of(server)
    assert engine.generate([Request(question="Why?", sampling=SAMPLING)])[0].text
    with pytest.raises(
        ValueError, match="must continue an open turn of the assistant, got a server for stub that takes no"
    ):
        engine.generate([Request(question="Why?", prefix_ids=(5,), sampling=SAMPLING)])


def test_a_server_with_another_template_is_refused(server: Server) -> None:
    server.takes_ids, server.template = False, tiny_processors.ZEPHYR
    engine = engine_of(server)
    with pytest.raises(ServerError, match="must write the prompt as the model's processor does"):
        engine.generate([Request(question="Why?", sampling=SAMPLING)])


def test_a_server_that_takes_only_the_fields_of_openai(server: Server) -> None:
    server.takes_extensions, server.limit, server.takes_ids = False, "max_completion_tokens", False
    engine = engine_of(server)
    plain = dataclasses.replace(SAMPLING, top_k=0)
    (generation,) = engine.generate([Request(question="Why?", seed=3, sampling=plain)])
    assert generation.finish_reason == "stop"
    expected = {"model", "messages", "temperature", "top_p", "max_completion_tokens", "seed"}
    assert [set(body) for body in server.bodies] == [expected]
    with pytest.raises(
        ValueError, match=r"top_k must be 0 \(all tokens\) for stub, got 50: the server does not apply"
    ):
        engine.generate([Request(question="Why?", sampling=SAMPLING)])


def test_a_server_that_ignores_top_k_is_noticed(server: Server) -> None:
    server.applies_top_k = False
    engine = engine_of(server)
    with pytest.raises(ValueError, match="top_k must be 0"):
        engine.generate([Request(question="Why?", sampling=SAMPLING)])
    assert engine.generate([Request(question="Why?", sampling=dataclasses.replace(SAMPLING, temperature=0.0))])


def test_a_model_without_a_tokenizer_answers_questions_only(server: Server, tmp_path: Path) -> None:
    engine = engine_of(server, processor=None, tokenizer="none")
    source = write_items(tmp_path, 6)
    summary = sample(engine, source, tmp_path / "out")
    assert summary.pairs > 0
    assert summary.generated_tokens > 100
    assert all("messages" in body for body in server.bodies)
    for options in ({"chat_template_kwargs": {"enable_thinking": False}}, {"chat_template": "{{ messages }}"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be left out with tokenizer=none, got "):
            engine_of(server, processor=None, tokenizer="none", chat_options=options)
    with pytest.raises(ValueError, match="tokenizer must be the tokenizer of stub to cut responses"):
        sample(engine, source, tmp_path / "cut", DropoutNTP(DropoutNTPConfig(sampling=SAMPLING)))


def test_nothing_is_lost_or_doubled_among_a_thousand_requests_with_faults(server: Server, tmp_path: Path) -> None:
    source = write_items(tmp_path, 125)
    expected = sample(engine_of(server), source, tmp_path / "expected")
    rng, counts = random.Random(0), Counter()
    kinds = [(429, {"Retry_After": "0.01"}), (500, {}), (503, {}), "cut", "half", "text", "empty"]

    def fault(body: dict[str, Any]) -> Any:
        if rng.random() >= 0.05:
            return None
        kind = rng.choice(kinds)
        counts[str(kind)] += 1
        return kind

    engine = engine_of(server)
    server.fault = fault
    summary = sample(engine, source, tmp_path / "out")
    assert summary == expected
    assert files(tmp_path / "out") == files(tmp_path / "expected")
    assert len(counts) == len(kinds)
    assert counts.total() > 30
    assert len(server.bodies) == 1000
    assert len({body["seed"] for body in server.bodies}) == 1000


def test_only_so_many_requests_run_at_the_same_time(server: Server) -> None:
    engine = engine_of(server, concurrency=3)
    limit = time.monotonic() + 20

    def fault(body: dict[str, Any]) -> None:
        while server.most_running < 3 and time.monotonic() < limit:  # a busy machine starts the requests slowly
            time.sleep(0.01)
        time.sleep(0.05)

    server.fault, server.most_running = fault, 0
    assert len(engine.generate([Request(question="Why?", seed=seed, sampling=SAMPLING) for seed in range(12)])) == 12
    assert server.most_running == 3


def test_a_killed_run_resumes_with_the_same_bytes(server: Server, tmp_path: Path) -> None:
    source = write_items(tmp_path, 40)
    server.fault = lambda body: time.sleep(0.002)
    sample(engine_of(server), source, tmp_path / "whole")
    journal = tmp_path / "killed" / "journal-00000-of-00001.jsonl"

    def n_lines() -> int:
        return len(journal.read_bytes().splitlines()) if journal.exists() else 0

    for least in (2, 100, 200):
        work = multiprocessing.get_context("fork").Process(
            target=lambda: sample(engine_of(server, concurrency=8), source, tmp_path / "killed")
        )
        work.start()
        while n_lines() < least:
            assert work.is_alive()
            time.sleep(0.002)
        work.kill()
        work.join()
        assert n_lines() < 321, "the run was not killed in its middle"
    sample(engine_of(server), source, tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_what_the_server_refuses_or_withholds_is_counted(server: Server, tmp_path: Path) -> None:
    source = write_items(tmp_path, 4)
    with source.open("a") as file:
        file.write(json.dumps({"question": "long " * 300, "answer_gt": "7"}) + "\n")
    summary = sample(engine_of(server), source, tmp_path / "out")
    assert summary.skipped["prompt refused by the engine"] == 1
    journal = (tmp_path / "out" / "journal-00000-of-00001.jsonl").read_text()
    assert "status 400: Error code: 400" in journal
    assert "maximum context length is 900 tokens" in journal
    server.finish = "content_filter"
    (generation,) = engine_of(server).generate([Request(question="Why?", sampling=SAMPLING)])
    assert generation.refusal == "the server ended with the reason 'content_filter'"
    server.finish, server.message, server.returns_ids, server.takes_ids = (
        None,
        {"reasoning_content": "Hm."},
        False,
        False,
    )
    with pytest.raises(ServerError, match="must leave thoughts in the text, got them apart"):
        engine_of(server).generate([Request(question="Why?", sampling=SAMPLING)])


def test_a_request_that_always_fails_ends_alone_and_a_dead_server_ends_the_run(server: Server) -> None:
    engine = engine_of(server, max_retries=3)
    server.fault = lambda body: (500, {}) if body["seed"] == 1 else None
    requests = [Request(question="Why?", seed=seed, sampling=SAMPLING) for seed in range(8)]
    generations = engine.generate(requests)
    assert [generation.refusal is not None for generation in generations] == [seed == 1 for seed in range(8)]
    assert "status 500" in str(generations[1].refusal)
    assert "(4 attempts)" in str(generations[1].refusal)
    server.fault = lambda body: (500, {})
    with pytest.raises(ServerError, match=r"\(4 attempts\): the same command resumes the run"):
        engine.generate(requests)
    server.fault = lambda body: (429, {"Retry_After": "7200"})
    with pytest.raises(ServerError, match="the server asks to wait 7200 s"):
        engine_of(server)


def test_the_server_says_how_long_to_wait(server: Server) -> None:
    engine = engine_of(server)
    times: list[float] = []

    def fault(body: dict[str, Any]) -> Any:
        times.append(time.monotonic())
        return (429, {"Retry_After": "0.4"}) if len(times) == 1 else None

    server.fault = fault
    engine.generate([Request(question="Why?", sampling=SAMPLING)])
    assert times[1] - times[0] >= 0.4
    assert retry_after_s({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after_s({"retry-after": "soon"}) == retry_after_s({}) == 0
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 28 < retry_after_s({"retry-after": date}) <= 30
    # The clock of this machine may be wrong by years.
    now, later = "Fri, 02 Jan 2099 10:00:00 GMT", "Fri, 02 Jan 2099 10:00:20 GMT"
    assert retry_after_s({"retry-after": later, "date": now}) == 20


def test_canceled_requests_do_not_come_back(server: Server) -> None:
    engine = engine_of(server)
    server.fault = lambda body: time.sleep(0.3 if body["seed"] == 1 else 0.01)
    slow, fast = (engine.submit(Request(question="Why?", seed=seed, sampling=SAMPLING)) for seed in (1, 2))
    engine.cancel([slow])
    assert [name for name, _ in engine.finished()] == [fast]
    assert engine.finished() == []
    engine.close()


def test_the_key_is_sent_and_written_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    key = "sk-3b1946ca5e8f"
    monkeypatch.setenv("JUDGE_KEY", f" {key}\n")  # as a shell may read it from a file
    server.key = key
    calls = iter(range(10**6))
    kinds = [None, None, (500, {}), None, "cut", "text"]
    server.fault = lambda body: kinds[next(calls) % len(kinds)]
    caplog.set_level(logging.DEBUG)
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))

    def command(*options: str) -> int:
        source = write_items(tmp_path, 6)
        words = ["sample", "correctness", str(source), str(tmp_path / "out"), "--model", "stub", "--samples", "4"]
        words += [
            "--matcher",
            "number",
            "--engine",
            "openai",
            "--base-url",
            server.url,
            "--engine-option",
            "tokenizer=none",
        ]
        args = parser.parse_args([*words, *options])
        return args.run(args)

    assert command("--api-key-env", "JUDGE_KEY") == 0
    server.key = "other"
    assert command("--api-key-env", "JUDGE_KEY") == 1
    assert command() == 1
    told = capfd.readouterr()
    assert "Incorrect key: Bearer ***" in told.err
    for text in (told.out, told.err, caplog.text, *(str(vars(record)) for record in caplog.records)):
        assert key not in text
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert not any(key.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url must begin with http:// or https://, got 'localhost:8000/v1'"),
        ({"base_url": "http://user:secret@host/v1"}, "base_url must not hold a user, a password"),
        ({"base_url": "http://host/v1?key=secret"}, "base_url must not hold a user, a password"),
        ({"base_url": "http://host/v1", "concurrency": 0}, "concurrency must be at least 1, got 0"),
    ],
)
def test_bad_options_of_the_server_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        ServerOptions(**options)
    assert "secret" not in str(error.value)


def test_keys_that_cannot_be_sent_are_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(base_url="http://host/v1", api_key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="must name an environment variable with a key, got 'JUDGE_KEY'"):
        options.key()
    for key in ("sk-\u00e9", "sk-one\nsk-two"):
        monkeypatch.setenv("JUDGE_KEY", key)
        with pytest.raises(ValueError, match="the key in JUDGE_KEY must have printable ASCII") as error:
            options.key()
        assert "sk-" not in str(error.value)


def test_a_server_that_does_not_answer_is_named(server: Server) -> None:
    threads = threading.active_count()
    with pytest.raises(ServerError, match=r"http://127.0.0.1:9/v1/completions: Connection error"):
        OpenAIEngine("stub", base_url="http://127.0.0.1:9/v1", processor=TOKENIZER)
    server.takes_ids = False
    with pytest.raises(ValueError, match=r"the server must answer /chat/completions or /completions, got .*no /v2"):
        OpenAIEngine("stub", base_url=server.url.replace("v1", "v2"), processor=TOKENIZER)
    assert threading.active_count() <= threads + 2


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("It is 7.", "It is 7."), (None, ""), ([], ""), ([{"type": "text", "text": "It is 7."}], "It is 7."),
        ([{"type": "text", "text": "It "}, {"type": "text", "text": "is 7."}], "It is 7."),
        ([{"type": "image_url", "image_url": {}}], None), ({"text": "It is 7."}, None), (7, None),
        (["It is 7."], None), ([{"type": "text", "text": 7}], None),
    ],
)  # fmt: skip
def test_the_content_of_a_message_is_a_text(server: Server, content: Any, text: str | None) -> None:
    vars(server).update(takes_ids=False, returns_ids=False)
    engine = engine_of(server, max_retries=0)
    server.message = {"content": content}
    request = Request(question="Why?", seed=1, sampling=SAMPLING)
    if text is not None:
        assert engine.generate([request])[0].text == text
    else:
        with pytest.raises(ServerError, match="the answer must have one choice with a text"):
            engine.generate([request])


@pytest.mark.parametrize(
    ("fields", "is_refused"),
    [
        ({"seed": 1}, True), ({"max_tokens": 5}, True), ({"top_k": 5}, True), ({"messages": []}, True),
        ({"chat_template_kwargs": {}}, True), ({"user": "me"}, False), ({}, False), (None, False),
    ],
)  # fmt: skip
def test_further_fields_replace_no_field_of_the_engine(server: Server, fields: Any, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(ValueError, match=f"extra_body must have only .* not set, got {next(iter(fields))}"):
            engine_of(server, extra_body=fields)
        return
    engine_of(server, extra_body=fields).generate([Request(question="Why?", seed=1, sampling=SAMPLING)])
    assert server.bodies[-1].get("user") == (fields or {}).get("user")
    # Without a tokenizer, the engine does not know the template.
    engine_of(server, processor=None, tokenizer="none", extra_body={"chat_template_kwargs": {}})

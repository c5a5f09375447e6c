"""A fake server with OpenAI's HTTP interface; each test chooses its capabilities and faults."""

import dataclasses
import http.server
import json
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EXTENSIONS = {
    "top_k", "min_p", "repetition_penalty", "skip_special_tokens", "return_token_ids", "stop_token_ids",
    "add_special_tokens", "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
}  # fmt: skip


@dataclasses.dataclass
class Server:
    """The configuration of a fake server, and a record of its requests.

    The text of an answer depends only on the prompt and the seed.

    Attributes:
        tokenizer: The model's tokenizer, with a chat template.
        takes_ids: Whether ``/completions`` accepts token ids.
        returns_ids: Whether answers have token ids.
        takes_extensions: Whether the server accepts request fields that OpenAI does not have.
        continues: Whether the server continues an unfinished assistant message.
        applies_top_k: Whether ``top_k`` has an effect.
        seed_bits: Seeds must be below ``2**seed_bits``.
        limit: Name of the request field with the maximum number of tokens.
        image: Text that stands for an image in the prompt.
        template: Chat template to use instead of the tokenizer's template.
        key: API key that requests must have; None: requests need no key.
        fault: Function that takes a request body and returns None or one of these faults:

            - (status, headers): The answer is an HTTP error.
            - "cut": The connection closes before the answer.
            - "half": The connection closes after half of the answer.
            - "text": The answer is not JSON.
            - "empty": The answer has no choices.
        finish: Finish reason that all answers report; None: the actual finish reason.
        message: Additional fields of each chat message that the server writes.
        bodies: Bodies of the requests that were answered.
        n_running: Number of requests in progress.
        most_running: Largest number of requests that were in progress at the same time.
        url: Base URL, which ``running`` sets.
    """

    tokenizer: Any
    takes_ids: bool = True
    returns_ids: bool = True
    takes_extensions: bool = True
    continues: bool = True
    applies_top_k: bool = True
    seed_bits: int = 63
    limit: str = "max_tokens"
    image: str = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    template: str | None = None
    key: str | None = None
    fault: Callable[[dict[str, Any]], Any] = lambda body: None
    finish: str | None = None
    message: dict[str, Any] = dataclasses.field(default_factory=dict)
    bodies: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    n_running: int = 0
    most_running: int = 0
    url: str = ""

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request.

        Raises:
            LookupError: If the server does not have the path (404).
            ValueError: If the server refuses the request (400).
        """
        if path not in ("/v1/chat/completions", *(["/v1/completions"] if self.takes_ids else [])):
            raise LookupError(f"no {path} here")
        if not self.takes_extensions and (unknown := EXTENSIONS & body.keys()):
            raise ValueError(f"Unrecognized request arguments: {sorted(unknown)}")
        if body["seed"] >= 2**self.seed_bits or self.limit not in body:
            raise ValueError("seed or max_tokens are out of range")
        if "messages" in body:
            is_open = self.continues and body.get("continue_final_message", False)
            text = self.tokenizer.apply_chat_template(
                [{**parsed(turn), "content": flat(turn["content"], self.image)} for turn in body["messages"]],
                tools=body.get("tools"),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=not is_open,
                continue_final_message=is_open,
            )
            prompt = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            prompt = body["prompt"]
        if len(prompt) > 900:
            raise ValueError("This model's maximum context length is 900 tokens")
        text = response(
            self.tokenizer.decode(prompt), 0 if self.applies_top_k and body.get("top_k") == 1 else body["seed"]
        )
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        ids = [*self.tokenizer.encode(text, add_special_tokens=False), end]
        reason = "stop" if len(ids) <= body[self.limit] else "length"
        ids = ids[: body[self.limit]]
        written = [token for token in ids if token != end]
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish or reason, "stop_reason": None}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": self.tokenizer.decode(written), **self.message}
        else:
            choice["text"] = self.tokenizer.decode(written)
        if self.returns_ids and body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}}


def parsed(turn: dict[str, Any]) -> dict[str, Any]:
    """Returns a message after parsing the arguments of its tool calls from JSON. vLLM's server also parses them."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in turn.get("tool_calls", ())
    ]
    return {**turn, **({"tool_calls": calls} if calls else {})}


def flat(content: Any, image: str) -> str:
    """Returns the content of a message as text. Each image is replaced by the text ``image``."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", image) for part in content)


def response(prompt: str, seed: int) -> str:
    """Returns random words, with or without a final answer. The answer is 7 (right), 8 (wrong) or 9 (wrong)."""
    rng = random.Random(f"{prompt} {seed}")
    words = " ".join(rng.choice(["one", "two", "\u4e09", "four"]) for _ in range(rng.randrange(1, 9)))
    return words + rng.choice(["\nFinal answer: 7", "\nFinal answer: 8", "\nFinal answer: 9", ""])


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Runs the server on a free local port for the duration of a ``with`` block."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.n_running += 1
                server.most_running = max(server.most_running, server.n_running)
            try:
                self.reply(body, server.fault(body))  # without the lock: a fault may wait for other requests
            finally:
                with lock:
                    server.n_running -= 1

        def reply(self, body: dict[str, Any], fault: Any) -> None:
            if server.key is not None and self.headers["Authorization"] != f"Bearer {server.key}":
                return self.send(401, {"error": {"message": f"Incorrect key: {self.headers['Authorization']}"}})
            if isinstance(fault, tuple):
                status, headers = fault
                return self.send(status, {"error": {"message": f"status {status} for {server.key}"}}, **headers)
            if fault == "cut":
                return self.connection.shutdown(socket.SHUT_RDWR)
            try:
                answer = server.answer(self.path, body)
            except (LookupError, ValueError) as error:
                status = 400 if isinstance(error, ValueError) else 404
                return self.send(status, {"error": {"message": str(error), "code": status}})
            if fault == "half":
                return self.send(200, answer, cut=True)
            if fault == "text":
                return self.send(200, "this is not JSON")
            if fault == "empty":
                return self.send(200, {"choices": []})
            with lock:
                server.bodies.append(body)
            return self.send(200, answer)

        def send(self, status: int, content: Any, *, cut: bool = False, **headers: str) -> None:
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, *arguments: object) -> None:
            pass

    class Threads(http.server.ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """Ignores exceptions, because clients may close their connections."""

    listener = Threads(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_port}/v1"
    thread = threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()

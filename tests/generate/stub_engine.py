"""An engine without a model, which draws random words with the seed of each request."""

import random
import time
from collections.abc import Sequence
from typing import Any

from mpo_ext.chat import Conversation
from mpo_ext.generate.engine import Generation, Request


class StubEngine:
    """Draws random responses; the request's seed decides whether the answer is right, wrong or missing.

    Every character is a token.
    """

    name = "stub"

    def __init__(self, *, delay_s: float = 0.0, script: dict[str, Generation] | None = None) -> None:
        self.delay_s = delay_s
        self.script = script or {}
        self.requests: list[Request] = []
        self.keep_requests = True

    def settings(self) -> dict[str, Any]:
        return {"engine": "stub"}

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        return self.encode(response)

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        return self.decode(token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        if self.keep_requests:
            self.requests += requests
        time.sleep(self.delay_s * len(requests))
        return [self.script.get(request.key) or self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Generation:
        if request.role == "judge":
            return self._judge(request)
        rng = random.Random(request.seed)
        words = " ".join(rng.choice(["one", "two", "\u4e09", "four"]) for _ in range(rng.randrange(1, 9)))
        answer = rng.choice(["\nFinal answer: 7", "\nFinal answer: 8", "\nFinal answer: 9", ""])
        text = f"{words}{answer}"
        finish = "length" if rng.random() < 0.1 else "stop"
        return Generation(tuple(self.encode(text)), text, finish)

    def _judge(self, request: Request) -> Generation:
        """Imitates a judge. Splits an answer into claims, turns claims into questions, or makes a random choice."""
        rng = random.Random(request.seed)
        if request.choices:
            probs = tuple(rng.random() / len(request.choices) for _ in request.choices)
            best = request.choices[probs.index(max(probs))][0]
            return Generation(tuple(self.encode(best[:1])), best[:1], "length", choice_probs=probs)
        _, is_answer, answer = request.question.rpartition("\nAnswer: ")
        if is_answer:
            text = "".join(f"- It says {word}.\n" for word in answer.split())
        else:
            claims = request.question.partition("Statements:\n")[2].splitlines()
            text = "".join(f"- Is it true: {claim.removeprefix('- ')}?\n" for claim in claims)
        return Generation(tuple(self.encode(text)), text, "stop")

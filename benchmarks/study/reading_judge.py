"""An engine that judges the claims in a response, for the RLAIF-V pairs of the task "language-prior".

As in RLAIF-V, each claim becomes a question about the image. The model is tiny, so two steps are simpler than in the
paper:

- A program splits a response into claims. In the paper, a model splits the response.
- The question asks for a digit, such as "Which digit is top-left ?". In the paper, the answer is yes or no. Here, the
  verdict is yes if the model's direct answer equals the claimed digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpo_ext.answers import extract_answer
from mpo_ext.demo import digits
from mpo_ext.demo.pairs import MAX_NEW_TOKENS
from mpo_ext.demo.reading import CELLS, read_digits
from mpo_ext.generate.choices import fill
from mpo_ext.generate.claims import STATEMENT
from mpo_ext.generate.engine import Engine, Generation, Request, SamplingConfig
from mpo_ext.generate.rlaif_v import RlaifVConfig

_CLAIMS, _ANSWER, _VERDICT = "claims of:", "\nanswer:", "verdict on:"
_VERDICT_START = f"{_VERDICT} {fill(STATEMENT, claim='')}"


def config(*, samples: int, temperature: float, seed: int, pairs_per_question: int) -> RlaifVConfig:
    """Returns the RLAIF-V settings that fit ``ReadingJudge``, such as its prompts."""
    sampling = SamplingConfig(temperature=temperature, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
    return RlaifVConfig(
        samples=samples, sampling=sampling, seed=seed, pairs_per_question=pairs_per_question,
        questions="statement", judge="direct answers of the same model",
        claims_prompt=f"{_CLAIMS} {{question}}{_ANSWER} {{answer}}",
        verdict_prompt=f"{_VERDICT} {{question}}",
    )  # fmt: skip


class ReadingJudge:
    """An engine that lists the claims of a response, and judges each claim.

    To judge a claim, the engine compares the claim with a direct answer of the starting model.

    Args:
        engine: Engine that runs the starting model.
        side: Number of rows and columns of a grid.

    Attributes:
        claim_tokens: Number of tokens in all lists of claims so far. Each word counts as one token.
    """

    name = "direct answers"

    def __init__(self, engine: Engine, side: int) -> None:
        self.engine, self.cells = engine, CELLS[side]
        self.claim_tokens = 0

    def settings(self) -> dict[str, Any]:
        return {**self.engine.settings(), "judge": self.name}

    def encode_response(self, conversation: Any, response: str) -> list[int]:
        return self.engine.encode_response(conversation, response)

    def decode_response(self, conversation: Any, token_ids: Sequence[int]) -> str:
        return self.engine.decode_response(conversation, token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answers each request. The answer is a list of claims, or "yes" or "no" as the verdict on a claim."""
        generations: dict[int, Generation] = {}
        asked: dict[int, tuple[str, Request]] = {}
        for place, request in enumerate(requests):
            if request.question.startswith(_CLAIMS):
                asking, _, response = request.question.removeprefix(_CLAIMS).strip().partition(_ANSWER)
                text = "".join(f"- {claim}\n" for claim in claims_of(asking, response.strip(), self.cells))
                self.claim_tokens += len(text.split())
                generations[place] = Generation((), text, "stop", tokens=0)
            else:
                subject, _, value = request.question.removeprefix(_VERDICT_START).rpartition(" is ")
                question = f"Which digit is {subject} ? {digits.INSTRUCTIONS['direct']}"
                sampling = SamplingConfig(temperature=0.0, top_k=0, max_new_tokens=2)
                asked[place] = value, Request(question=question, images=request.images, sampling=sampling)
        answers = self.engine.generate([request for _, request in asked.values()]) if asked else []
        for (place, (value, _)), answer in zip(asked.items(), answers, strict=True):
            verdict = "yes" if answer.text.strip() == value else "no"
            generations[place] = Generation(answer.token_ids, verdict, "stop")
        return [generations[place] for place in range(len(requests))]


def claims_of(question: str, response: str, cells: Sequence[str]) -> list[str]:
    """Returns the distinct claims of a step-by-step response, such as "top-left is 5", with the final answer last."""
    read = zip(cells, read_digits(response, cells), strict=True)
    claims = [f"{cell} is {value}" for cell, value in read if value is not None]
    answer = extract_answer(response, digits.STYLES["cot"])
    asked = question.removeprefix("Which digit is ").partition(" ? ")[0]
    return list(dict.fromkeys([*claims, *([f"{asked} is {answer}"] if answer is not None else [])]))

"""Asks the questions and scores what comes back.

The journal holds what a model said and nothing of what was made of it: answers are read and compared when the journal
is read, so another style or matcher scores a run anew without the model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.answers import is_same_answer
from mpo_ext.checks import check_integer, check_json, check_number
from mpo_ext.evaluate.statistics import majority
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.items import Item
from mpo_ext.generate.prompts import PromptTemplate, get_template
from mpo_ext.generate.questions import AnswerScorer, QuestionSampler

PLAIN = "none"
_LONGEST = {"direct": 100}  # new tokens, by the style of the template; the authors' numbers
_LONGEST_ELSE = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """How questions are put and answers compared.

    Attributes:
        prompts: Names of the templates that questions are put in (``mpo_ext.generate.prompts``), each a column of the
            results; "none" puts them as they are.
        samples: Responses per question.
        temperature: 0 takes the likeliest token; then one sample is all there is.
        top_p: As in ``SamplingConfig``.
        top_k: As in ``SamplingConfig``.
        max_new_tokens: Longest response; None takes 100 for templates that want nothing but the answer, else 4096.
        seed: Source of every draw.
        style: How the answer stands in a response, as in ``extract_answer``; None takes that of each template.
        matcher: Kind of the matcher that compares it with the truth, and its options.
    """

    prompts: tuple[str, ...] = ("direct",)
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int | None = None
    seed: int = 0
    style: str | None = None
    matcher: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "vqa"})

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise ValueError(f"prompts must be different names of templates, got {self.prompts!r}")
        check_integer("samples", self.samples, least=1)
        check_integer("seed", self.seed, least=0)
        check_number("temperature", self.temperature)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples must be 1 at temperature 0, where all are the same, got {self.samples}")
        if not isinstance(self.matcher, Mapping) or "kind" not in self.matcher:
            raise TypeError(f"matcher must be a mapping with a kind, got {self.matcher!r}")
        check_json("matcher", dict(self.matcher))
        for prompt in self.prompts:
            Evaluation(self, prompt)

    def sampling(self, template: PromptTemplate | None) -> SamplingConfig:
        """How the tokens of a response to a template are drawn."""
        longest = self.max_new_tokens
        if longest is None:
            longest = _LONGEST.get(template.answer_style if template else "", _LONGEST_ELSE)
        return SamplingConfig(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_new_tokens=longest)


@dataclasses.dataclass(frozen=True, slots=True)
class Response:
    """One response and what it is worth.

    Attributes:
        text: What the model wrote.
        answer: What was read out of it; None where nothing could be.
        correct: Whether that is right.
        rule: The rule by which it is, or is not; None where there is no answer.
        tokens: Generated ones.
        finish: "stop", or "length" where it was cut off.
    """

    text: str
    answer: str | None
    correct: bool
    rule: str | None
    tokens: int
    finish: str


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """What is kept of a question for the numbers.

    Attributes:
        problem: Why it could not be asked; then all else is empty.
        right: For each sample whether it is right.
        unreadable: Samples without an answer that could be read.
        cut_off: Samples cut off at the longest length.
        tokens: Generated ones, of all samples.
        majority: Whether the answer that most samples give is right.
    """

    problem: str | None = None
    right: tuple[bool, ...] = ()
    unreadable: int = 0
    cut_off: int = 0
    tokens: int = 0
    majority: bool = False

    @property
    def share(self) -> float:
        """Share of right samples."""
        return sum(self.right) / len(self.right)


class Evaluation:
    """Asks the questions under a prompt and scores the responses: a ``Pipeline`` of ``mpo_ext.generate.sampler``.

    Args:
        config: Settings of the evaluation.
        prompt: Name of a prompt in the settings.
    """

    name = "evaluation"

    def __init__(self, config: EvaluationConfig, prompt: str) -> None:
        self.prompt = prompt
        self.template = None if prompt == PLAIN else get_template(prompt)
        self.questions = QuestionSampler(
            name=self.name,
            samples=config.samples,
            sampling=config.sampling(self.template),
            seed=config.seed,
            template=self.template,
        )
        self.scorer = AnswerScorer(config.matcher, style=config.style, template=self.template)
        self.keys, self.sample = self.questions.keys, self.questions.sample

    def settings(self) -> dict[str, Any]:
        """Returns all settings that the responses depend on, as JSON values."""
        return {
            "prompt": self.prompt,
            "template": self.template.text if self.template else None,
            "samples": self.questions.samples,
            "sampling": dataclasses.asdict(self.questions.sampling),
            "seed": self.questions.seed,
        }

    def score(self, item: Item, records: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[Response]]:
        """Returns the problem of a question, or None, and its scored responses."""
        problem = next((record["problem"] for record in records if "problem" in record), None)
        if problem is not None:
            return problem, []
        responses = []
        for record in records:
            answer, verdict = self.scorer.score(record["text"], item.truths)
            correct, rule = (verdict.correct, verdict.rule) if verdict else (False, None)
            responses.append(Response(record["text"], answer, correct, rule, record["tokens"], record["finish"]))
        return None, responses

    def question(self, problem: str | None, responses: Sequence[Response]) -> Question:
        """Returns the numbers of a question."""
        if problem is not None:
            return Question(problem)
        first = majority(
            [response.answer for response in responses],
            lambda first, second: is_same_answer(first, second, self.scorer.matcher),
        )
        return Question(
            right=tuple(response.correct for response in responses),
            unreadable=sum(response.answer is None for response in responses),
            cut_off=sum(response.finish == "length" for response in responses),
            tokens=sum(response.tokens for response in responses),
            majority=first is not None and responses[first].correct,
        )

"""The settings of an evaluation, and the scores of responses.

Only responses are stored. Answers are extracted and compared when the responses are read. Therefore the same responses
can be scored again with another answer style or matcher, without the model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.answers.base import Matcher
from mpo_ext.checks import check_integer, check_json, check_number
from mpo_ext.evaluate.statistics import majority
from mpo_ext.generate.engine import SamplingConfig
from mpo_ext.generate.items import Item
from mpo_ext.generate.prompts import PromptTemplate, get_template
from mpo_ext.generate.questions import AnswerScorer, QuestionSampler

PLAIN = "none"
WITHOUT_IMAGE = "-without-image"  #: Suffix in the name of a prompt whose questions are asked without their images.
_MAX_NEW_TOKENS = {"direct": 100}  # by the style of the template; the authors of MPO use these numbers
_DEFAULT_MAX_NEW_TOKENS = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation: prompts, sampling and matcher.

    Attributes:
        prompts: Names of prompt templates (``mpo_ext.generate.prompts``); "none" asks the question without a template.
        samples: Number of responses per question.
        temperature: Temperature of sampling; 0 is greedy decoding, which allows only a single sample.
        top_p: A token is drawn from the smallest set of most probable tokens whose probabilities sum to at least this
            value, in (0, 1].
        top_k: A token is drawn from this number of most probable tokens; 0: from all tokens.
        max_new_tokens: Maximum number of tokens per response. None: 100 for templates that ask only for the answer,
            4096 for all other prompts.
        seed: Seed of the sampling of responses.
        style: Form of the answer in a response, as in ``extract_answer``; None: the style of each template.
        matcher: Kind and options of the matcher that compares answers with the truth, such as ``{"kind": "vqa"}``.
        without_image: Whether questions with an image are also asked without it. If so, the results show how
            many answers do not depend on the image.
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
    without_image: bool = False

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

    def evaluations(self) -> "list[Evaluation]":
        """Returns an ``Evaluation`` for each prompt.

        If ``without_image`` is True, a second ``Evaluation`` for each prompt follows. The second leaves the images
        out.
        """
        sides = (True, False) if self.without_image else (True,)
        return [Evaluation(self, prompt, with_image=side) for side in sides for prompt in self.prompts]

    def sampling(self, template: PromptTemplate | None) -> SamplingConfig:
        """Returns the sampling settings for a prompt template. None stands for questions without a template."""
        max_new_tokens = self.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = _MAX_NEW_TOKENS.get(template.answer_style if template else "", _DEFAULT_MAX_NEW_TOKENS)
        return SamplingConfig(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_new_tokens=max_new_tokens
        )


@dataclasses.dataclass(frozen=True, slots=True)
class ScoredResponse:
    """A response and its score.

    Attributes:
        text: The whole response.
        answer: Extracted answer; None if the response has no answer.
        correct: Whether the answer is correct; False for an unreadable answer.
        rule: Comparison that decided, such as "number:value"; None if there is no answer.
        tokens: Number of generated tokens.
        finish: "stop", or "length" if ``max_new_tokens`` truncated the response.
        unreadable: Whether the response has no answer, or the matcher cannot tell whether the answer is correct.
    """

    text: str
    answer: str | None
    correct: bool
    rule: str | None
    tokens: int
    finish: str
    unreadable: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class QuestionScore:
    """The score of a model on a question, over all sampled responses.

    Attributes:
        problem: Reason why the question could not be asked, or None. With a problem, the other attributes keep their
            defaults.
        right: For each sampled response, whether its answer is correct.
        unreadable: Number of unreadable responses; they count as not correct.
        cut_off: Number of responses that ``max_new_tokens`` truncated.
        tokens: Number of generated tokens in all responses.
        majority: Whether the most frequent answer is correct.
        answer: The most frequent answer, or None if no answer could be extracted.
    """

    problem: str | None = None
    right: tuple[bool, ...] = ()
    unreadable: int = 0
    cut_off: int = 0
    tokens: int = 0
    majority: bool = False
    answer: str | None = None

    @property
    def accuracy(self) -> float:
        """Returns the fraction of correct responses."""
        return sum(self.right) / len(self.right)


class Evaluation:
    """Asks questions with one prompt and scores the responses; implements ``sampler.Pipeline``.

    Args:
        config: Settings of the evaluation.
        prompt: Name of a prompt template, or "none".
        with_image: Whether the model sees the images.

    Attributes:
        prompt: Name of the prompt in the results; it ends in ``WITHOUT_IMAGE`` if the model does not see the images.
    """

    name = "evaluation"

    def __init__(self, config: EvaluationConfig, prompt: str, *, with_image: bool = True) -> None:
        self.prompt = prompt if with_image else f"{prompt}{WITHOUT_IMAGE}"
        self.template = None if prompt == PLAIN else get_template(prompt)
        sampling = config.sampling(self.template)
        self.questions = QuestionSampler(
            self.name, config.samples, sampling, config.seed, self.template, with_image=with_image
        )
        self.scorer = AnswerScorer(config.matcher, style=config.style, template=self.template)
        self.keys, self.steps = self.questions.keys, self.questions.steps

    def settings(self) -> dict[str, Any]:
        """Returns all settings that determine the responses, as JSON values."""
        settings = {
            "prompt": self.prompt,
            "template": self.template.text if self.template else None,
            "samples": self.questions.samples,
            "sampling": dataclasses.asdict(self.questions.sampling),
            "seed": self.questions.seed,
        }
        return settings if self.questions.with_image else {**settings, "with_image": False}

    def score(self, item: Item, records: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[ScoredResponse]]:
        """Scores the responses to a question.

        ``records`` are the stored responses, as dicts. If the question could not be asked, at least one dict has the
        reason under the key "problem".

        Returns:
            (problem, responses). ``problem`` is the reason why the question could not be asked, or None.
        """
        problem = next((record["problem"] for record in records if "problem" in record), None)
        if problem is not None:
            return problem, []
        responses = []
        for record in records:
            answer, verdict = self.scorer.score(record["text"], item)
            correct, rule = (verdict.correct, verdict.rule) if verdict else (None, None)
            responses.append(
                ScoredResponse(
                    text=record["text"],
                    answer=answer,
                    correct=correct is True,
                    rule=rule,
                    tokens=record["tokens"],
                    finish=record["finish"],
                    unreadable=correct is None,
                )
            )
        return None, responses

    def question_score(self, item: Item, problem: str | None, responses: Sequence[ScoredResponse]) -> QuestionScore:
        if problem is not None:
            return QuestionScore(problem)
        matcher = self.scorer.matcher_for(item)
        first = majority(
            [response.answer for response in responses],
            lambda first, second: _is_same(first, second, matcher),
        )
        return QuestionScore(
            right=tuple(response.correct for response in responses),
            unreadable=sum(response.unreadable for response in responses),
            cut_off=sum(response.finish == "length" for response in responses),
            tokens=sum(response.tokens for response in responses),
            majority=first is not None and responses[first].correct,
            answer=None if first is None else responses[first].answer,
        )

    def is_same(self, item: Item, first: QuestionScore, second: QuestionScore) -> bool:
        """Returns whether two scores of a question have the same answer.

        The answer of a score is the most frequent answer of its responses. If a score has no answer, returns False.
        """
        if first.answer is None or second.answer is None:
            return False
        return _is_same(first.answer, second.answer, self.scorer.matcher_for(item))


def _is_same(first: str, second: str, matcher: Matcher) -> bool:
    """Returns whether two answers have equal texts, or are equal for the matcher.

    Unlike ``is_same_answer``, case counts if it counts for the matcher: "5 MW" and "5 mW" are different answers.
    """
    return first.split() == second.split() or bool(matcher(first, second).correct or matcher(second, first).correct)

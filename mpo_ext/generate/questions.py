"""Samples several responses to each question and scores the answers, for the pipelines and the evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.answers import VERDICT_VERSION, Matcher, Verdict, extract_answer, matcher
from mpo_ext.answers.choices import ChoiceMatcher
from mpo_ext.answers.matchers import CustomMatcher
from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo_ext.generate.engine import Engine, Request, SamplingConfig, derive_seed
from mpo_ext.generate.feeding import Steps, run_steps
from mpo_ext.generate.items import Item, media_problem
from mpo_ext.generate.prompts import PromptTemplate, render
from mpo_ext.images import ImageError

_MARKS = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
_MAX_KNOWN_VERDICTS = 1 << 16


def refusal_fields(refusal: str) -> dict[str, str]:
    """Returns the fields that are stored if the engine refused the request. They replace the response."""
    return {"problem": "prompt refused by the engine", "refusal": refusal}


def item_fields(item: Item) -> dict[str, str]:
    """Returns the fields that are stored instead of a response if an item has a ``problem``."""
    detail = {} if item.detail is None else {"detail": item.detail}
    return {"problem": str(item.problem), **detail}


def media_fields(error: Exception) -> dict[str, str]:
    """Returns the fields that are stored instead of a response if an image or a video cannot be loaded."""
    hint = ": relative paths start at image_root (--image-root)" if isinstance(error, FileNotFoundError) else ""
    return {"problem": media_problem(error), "detail": f"{error}{hint}"}


def without_placeholders(question: str) -> str:
    """Returns a question without the placeholders ``<image>`` and ``<video>``.

    A line break right after a placeholder is removed, too. So is white space at both ends of the question.
    """
    for mark in _MARKS:
        question = question.replace(f"{mark}\n", "").replace(mark, "")
    return question.strip()


def prompt_fields(item: Item, question: str, *, with_image: bool) -> dict[str, Any]:
    """Returns the prompt of an item as the fields ``question``, ``messages`` and ``tools`` of a ``Conversation``.

    Args:
        item: The item.
        question: Text of the last user turn.
        with_image: Whether to keep the placeholders ``<image>`` and ``<video>``.
    """
    turns = item.turns(question)
    if not with_image:
        question = without_placeholders(question)
        turns = tuple(
            {**turn, "content": without_placeholders(turn["content"])}
            if any(mark in turn["content"] for mark in _MARKS)
            else turn
            for turn in turns
        )
    return {"question": question, "messages": turns, "tools": item.tools}


@dataclasses.dataclass(frozen=True, slots=True)
class QuestionSampler:
    """Samples several responses to each question.

    Attributes:
        name: Name of the pipeline; the seeds of the requests depend on it.
        samples: Number of responses per question.
        sampling: Settings for drawing tokens.
        seed: Seed of all draws.
        template: Template of the prompts; None: the question with its options.
        needs_truths: Whether to skip questions without a true answer.
        with_image: Whether the model sees the images and videos. If False, items without images and videos are
            skipped, because nothing can be hidden from the model.
    """

    name: str
    samples: int
    sampling: SamplingConfig
    seed: int
    template: PromptTemplate | None = None
    needs_truths: bool = True
    with_image: bool = True

    def keys(self, item: Item) -> list[str]:
        return [f"{item.digest}-{sample}" for sample in range(self.samples)]

    def prompt(self, item: Item) -> str:
        """Returns the text of the last user turn: the question in the template, or the question with its options.

        A question that already shows its options is not followed by them.

        If ``with_image`` is False, the placeholders ``<image>`` and ``<video>`` are removed.

        Raises:
            ValueError: If the template cannot show the options of the item.
        """
        prompt = item.question_with_options
        if self.template is not None:
            is_shown = prompt == item.question  # a question that shows its options, or has none
            prompt = render(self.template, item.question, None if is_shown else item.extra.get("options"))
        return prompt if self.with_image else without_placeholders(prompt)

    def _prompt_problem(self, item: Item) -> str | None:
        """Returns the reason why no valid prompt can be made of an item, or None."""
        try:
            prompt = self.prompt(item)
        except ValueError:
            return "options cannot be shown by this template"
        texts = [turn["content"] for turn in item.turns(prompt)] or [prompt]
        for mark, kind, count in (
            (IMAGE_PLACEHOLDER, "images", len(item.images)),
            (VIDEO_PLACEHOLDER, "videos", len(item.videos)),
        ):
            if self.with_image and sum(text.count(mark) for text in texts) not in {0, count}:
                return f"number of {mark} in the prompt is not that of the {kind}"
        in_options = any(mark in text for _, text in item.options or () for mark in _MARKS)
        if (
            in_options
            and self.template
            and not self.template.text.find("{question}") < self.template.text.find("{options}")
        ):
            return f"{IMAGE_PLACEHOLDER} in options needs a template that shows them after the question"
        return None

    def sample(self, items: Sequence[Item], engine: Engine) -> list[list[dict[str, Any]]]:
        """Samples responses to the questions, and returns one list of records per item.

        A record is a JSON object with a response, or with the reason why the item cannot be used.
        """
        return run_steps(self.steps(items, engine), engine)

    def steps(self, items: Sequence[Item], engine: Engine) -> Steps:
        """Yields a list with the requests for all items. The caller passes the generations to ``send``.

        The generator returns a list of records (JSON objects) for each item. A record has ``key``, ``text``,
        ``finish`` and ``tokens``. If the item cannot be used, or the engine refuses the request, the record has
        ``key`` and ``problem`` instead.
        """
        problems: dict[int, dict[str, str]] = {}
        requests: list[Request] = []
        for row, item in enumerate(items):
            if item.problem or (self.needs_truths and not item.truths):
                problems[row] = item_fields(item) if item.problem else {"problem": "no true answer"}
                continue
            if not self.with_image and not item.images and not item.videos:
                problems[row] = {"problem": "no image that could be left out"}
                continue
            try:
                media: dict[str, Any] = item.load_media() if self.with_image else {}
            except (OSError, ImageError) as error:
                problems[row] = media_fields(error)
                continue
            problem = self._prompt_problem(item)
            if problem is not None:
                problems[row] = {"problem": problem}
                continue
            prompt = prompt_fields(item, self.prompt(item), with_image=self.with_image)
            requests += [
                Request(
                    key=key,
                    **prompt,
                    **media,
                    seed=derive_seed(self.seed, self.name, key),
                    sampling=self.sampling,
                )
                for key in self.keys(item)
            ]
        generations = iter((yield requests))
        records: list[list[dict[str, Any]]] = []
        for row, item in enumerate(items):
            if row in problems:
                records.append([{"key": key, **problems[row]} for key in self.keys(item)])
                continue
            records.append([])
            for key, generation in zip(self.keys(item), generations, strict=False):
                if generation.refusal is not None:
                    records[-1].append({"key": key, **refusal_fields(generation.refusal)})
                    continue
                record = {"key": key, "text": generation.text, "finish": generation.finish_reason}
                records[-1].append({**record, "tokens": generation.n_tokens})
        return records


class AnswerScorer:
    """Extracts the answer from a response, and compares it with the true answers.

    Args:
        matcher_options: Kind and options of the matcher, the function that compares answers.
        style: How to find the answer in a response, such as "boxed"; see ``extract_answer``. None: the style of the
            template, or "final_answer" without a template.
        template: Template of the prompts, or None.
    """

    def __init__(
        self, matcher_options: Mapping[str, Any], *, style: str | None = None, template: PromptTemplate | None = None
    ) -> None:
        self.matcher = matcher(**matcher_options)
        self.style = style or (template.answer_style if template else "final_answer")
        extract_answer("", self.style)  # raises for an unknown style before a model is loaded
        self._verdicts: dict[tuple[tuple[str, ...], Any, str], Verdict] = {}

    def matcher_for(self, item: Item) -> Matcher:
        """Returns the matcher for answers to an item's question.

        If the item has options, the matcher gets the options. A matcher that does not use options is replaced by
        ``ChoiceMatcher``, because it would call "Paris" wrong if the true answer is "B" and option B is Paris.
        ``CustomMatcher`` is kept.
        """
        if item.options is None:
            return self.matcher
        options = dict(item.options)
        with_options = self.matcher.with_options(options)
        uses_options = with_options is not self.matcher or isinstance(self.matcher, (ChoiceMatcher, CustomMatcher))
        return with_options if uses_options else ChoiceMatcher(options=options)

    def score(self, text: str, item: Item) -> tuple[str | None, Verdict | None]:
        """Returns the answer in a response, and the matcher's verdict on the answer.

        Both are None if the response has no answer.
        """
        answer = extract_answer(text, self.style)
        if answer is None:
            return None, None
        # Verdicts are cached: samples often agree, journals are read more than once, and some matchers are slow.
        key = (item.truths, item.options, answer)
        verdict = self._verdicts.get(key)
        if verdict is None:
            if len(self._verdicts) >= _MAX_KNOWN_VERDICTS:
                self._verdicts.clear()
            verdict = self._verdicts[key] = self.matcher_for(item)(answer, item.truths)
        return answer, verdict

    def score_fields(self, text: str, item: Item) -> dict[str, Any]:
        """Returns a dict with the ``answer`` in a response, and the result of comparing the answer with the truths.

        ``correct`` is True for a right answer and False for a wrong answer. It is None if there is no answer, or if
        the matcher cannot tell. If there is an answer, the dict also has ``score`` and ``rule`` from the matcher's
        ``Verdict``. ``verdicts`` is ``VERDICT_VERSION``.
        """
        answer, verdict = self.score(text, item)
        fields: dict[str, Any] = {"answer": answer, "correct": None if verdict is None else verdict.correct}
        if verdict is not None:
            fields |= {"score": verdict.score, "rule": verdict.rule}
        return {**fields, "verdicts": VERDICT_VERSION}

    def stored_fields(self, record: Mapping[str, Any], item: Item) -> dict[str, Any]:
        """Returns ``answer``, ``correct``, ``score`` and ``rule`` of a stored JSON object.

        If the object has another ``VERDICT_VERSION``, its scores are outdated. The response is then scored again.
        """
        if record.get("verdicts") == VERDICT_VERSION:
            return {name: record[name] for name in ("answer", "correct", "score", "rule") if name in record}
        return self.score_fields(record["text"], item)

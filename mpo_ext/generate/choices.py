"""Measures the probabilities of the choices of a request, and reads verdicts of yes or no."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, ChatEncoder, ChatError
from mpo_ext.generate.engine import Generation, Request, SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor

YES_OR_NO = (("Yes", "yes"), ("No", "no"))
#: Settings for the text from which a verdict is read if the engine measures no probabilities.
VERDICT_SAMPLING = SamplingConfig(temperature=0.0, top_k=0, max_new_tokens=8)
_FIRST_WORD = re.compile(r"\W*(\w+)")


def choice_tokens(chat: ChatEncoder, request: Request) -> list[list[int]] | None:
    """Returns, for each choice of a request, the first token ids of its spellings.

    A token that begins spellings of two choices, or that stands for unknown text, belongs to no choice.

    Returns:
        The ids, in the order of ``request.choices``; None if the request has no choices, or if a choice has no token,
        so that its probability cannot be measured.
    """
    starts: list[set[int]] = []
    for spellings in request.choices:
        ids = set()
        for text in spellings:
            try:
                ids.add(chat.response_ids(request, text)[0])
            except ChatError:
                continue
        starts.append(ids - {chat.tokenizer.unk_token_id, chat.end_id})
    ids_of = [
        sorted(ids.difference(*(other for place, other in enumerate(starts) if place != number)))
        for number, ids in enumerate(starts)
    ]
    return ids_of if ids_of and all(ids_of) else None


def measured(ids_of: Sequence[Sequence[int]], probs: Mapping[int, float]) -> tuple[float, ...] | None:
    """Returns the probability of each choice from the probabilities of its tokens.

    Returns None if no token of a choice has a probability, for example because an engine only reports the most
    probable tokens.
    """
    choice_probs = tuple(sum(probs.get(token, 0.0) for token in ids) for ids in ids_of)
    return choice_probs if any(choice_probs) else None


@dataclasses.dataclass(slots=True)
class FirstTokenProbs:
    """A logits processor of transformers that keeps the probabilities of the first token of each row.

    Attributes:
        probs: ``[B, V]`` float32 probabilities; None before the first token.
    """

    probs: "Tensor | None" = None

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        if self.probs is None:
            self.probs = scores.float().softmax(dim=-1)
        return scores


def yes_and_no(generation: Generation) -> tuple[float, float]:
    """Returns the probabilities of yes and of no, the verdict of a request with the choices ``YES_OR_NO``.

    An engine that measures no probabilities gives a text. A text that begins with yes gives (1, 0), a text that begins
    with no gives (0, 1), and all other texts give (0, 0).
    """
    if generation.choice_probs is not None:
        yes, no = generation.choice_probs
        return round(yes, 6), round(no, 6)
    word = _FIRST_WORD.match(generation.text)
    first = word[1].lower() if word else ""
    return float(first == "yes"), float(first == "no")


def quoted(text: str) -> str:
    """Returns a text without the placeholder of images, so that a prompt can quote the text."""
    return text.replace(IMAGE_PLACEHOLDER, " ")


def check_prompt(name: str, prompt: Any, fields: Sequence[str]) -> None:
    """Raises unless ``prompt`` is a text that holds each field, such as ``{question}``, exactly once."""
    if not isinstance(prompt, str):
        raise TypeError(f"{name} must be a string, got {prompt!r}")
    for field in fields:
        if prompt.count(field) != 1:
            raise ValueError(f"{name} must hold {field} once, got {prompt.count(field)} of them")


def fill(prompt: str, **values: str) -> str:
    """Returns a prompt with its fields replaced; a value may hold braces."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match[0][1:-1]], prompt)

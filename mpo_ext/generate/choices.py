"""Reads the probabilities of possible answers, such as Yes and No, from the first token that a model generates."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpo_ext.chat import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, ChatEncoder, ChatError
from mpo_ext.generate.engine import Generation, Request, SamplingConfig

if TYPE_CHECKING:
    from torch import Tensor

YES_OR_NO = (("Yes", "yes"), ("No", "no"))
#: Settings for the text from which a verdict is read if the engine measures no probabilities.
VERDICT_SAMPLING = SamplingConfig(temperature=0.0, top_k=0, max_new_tokens=8)
_FIRST_WORD = re.compile(r"\W*(\w+)")


def choice_tokens(chat: ChatEncoder, request: Request) -> list[list[int]] | None:
    """Returns the tokens with which each choice of a request can begin: the first token of each spelling.

    For the choice ``("Yes", "yes")``, these are the first token of "Yes" and the first token of "yes". The unknown
    token and the end-of-turn token are removed. A token is also removed if two choices can begin with it.

    Returns:
        A list of token ids for each choice, in the order of ``request.choices``. None if the request has no choices,
        or if one of the choices has no token left.
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
    """Returns the probability of each choice: the sum of the probabilities of its possible first tokens.

    Args:
        ids_of: For each choice, the ids of its possible first tokens, from ``choice_tokens``.
        probs: Probability of each token id as the first token of the response. Missing tokens count as 0.

    Returns:
        The probabilities in the order of ``ids_of``, or None if all of them are 0.
    """
    choice_probs = tuple(sum(probs.get(token, 0.0) for token in ids) for ids in ids_of)
    return choice_probs if any(choice_probs) else None


@dataclasses.dataclass(slots=True)
class FirstTokenProbs:
    """A logits processor of transformers that stores the distribution of the first generated token.

    Attributes:
        probs: ``[B, V]`` float32 probabilities; None before the first token.
    """

    probs: "Tensor | None" = None

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":
        if self.probs is None:
            self.probs = scores.float().softmax(dim=-1)
        return scores


def yes_and_no(generation: Generation) -> tuple[float, float]:
    """Returns P(yes) and P(no) from the generation of a yes-or-no question.

    The request must have the choices ``YES_OR_NO``. If the engine has measured no probabilities, the result depends on
    the first word of the text: (1, 0) for "yes", (0, 1) for "no", otherwise (0, 0).
    """
    if generation.choice_probs is not None:
        yes, no = generation.choice_probs
        return round(yes, 6), round(no, 6)
    word = _FIRST_WORD.match(generation.text)
    first = word[1].lower() if word else ""
    return float(first == "yes"), float(first == "no")


def quoted(text: str) -> str:
    """Returns a text that another prompt can quote: with a space in place of each ``<image>`` and ``<video>``."""
    return text.replace(IMAGE_PLACEHOLDER, " ").replace(VIDEO_PLACEHOLDER, " ")


def check_prompt(name: str, prompt: Any, fields: Sequence[str]) -> None:
    """Checks that a prompt template holds each field, such as ``{question}``, exactly once.

    Args:
        name: Name of the template in error messages.
        prompt: The template.
        fields: The fields, with braces.

    Raises:
        TypeError: If ``prompt`` is not a string.
        ValueError: If a field is missing or occurs several times.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{name} must be a string, got {prompt!r}")
    for field in fields:
        if prompt.count(field) != 1:
            raise ValueError(f"{name} must hold {field} once, got {prompt.count(field)} of them")


def fill(prompt: str, **values: str) -> str:
    """Returns a prompt template with each ``{name}`` replaced by its value. Braces in values are kept."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match[0][1:-1]], prompt)

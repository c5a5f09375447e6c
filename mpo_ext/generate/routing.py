"""An engine that combines two engines: one for the model that answers, one for the model that judges the answers."""

from collections.abc import Sequence
from typing import Any

from mpo_ext.chat import Conversation
from mpo_ext.chat.encoder import with_date
from mpo_ext.generate.engine import Engine, Generation, Request


class RoutedEngine:
    """Sends each request to one of two engines, depending on the request's ``role``.

    Args:
        answer: Engine of the model that answers the questions.
        judge: Engine of the model that judges the answers.
    """

    def __init__(self, answer: Engine, judge: Engine) -> None:
        self.answer, self.judge = answer, judge
        self.name = answer.name

    @property
    def chat(self) -> Any:
        """The chat encoder of the answering model.

        Setting this property also sets the date of the judge's chat encoder to the date of the new encoder.
        """
        return self.answer.chat  # type: ignore[attr-defined]

    @chat.setter
    def chat(self, chat: Any) -> None:
        self.answer.chat = chat  # type: ignore[attr-defined]
        if hasattr(self.judge, "chat"):
            self.judge.chat = with_date(self.judge.chat, chat.date)

    def settings(self) -> dict[str, Any]:
        return {**self.answer.settings(), "judge": self.judge.settings()}

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        return self.answer.encode_response(conversation, response)

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        return self.answer.decode_response(conversation, token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        generations: dict[int, Generation] = {}
        for role, engine in (("answer", self.answer), ("judge", self.judge)):
            places = [place for place, request in enumerate(requests) if request.role == role]
            if places:
                outputs = engine.generate([requests[place] for place in places])
                generations.update(zip(places, outputs, strict=True))
        return [generations[place] for place in range(len(requests))]

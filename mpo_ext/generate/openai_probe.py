"""Sends short test requests to find out what a server with OpenAI's HTTP interface supports."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpo_ext.chat import ChatEncoder, Conversation
from mpo_ext.generate.openai_client import OpenAIClient, Reply, RequestRefusedError, ServerError

COMPLETIONS, CHAT = "/completions", "/chat/completions"
#: Fields beyond OpenAI's interface, which vLLM, SGLang and others take. They turn off the sampling settings of the
#: checkpoint's ``generation_config``, which the other engines ignore, too.
EXTENSIONS: dict[str, Any] = {
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}
OPEN_TURN = {"add_generation_prompt": False, "continue_final_message": True}
_QUESTION, _PREFIX = "Count to nine.", "One, two, three, four,"
_MISSING = (404, 405, 501)  # statuses of a server that does not have the path
_FIRST_RETRIES = 4  # retries of a test request, which take about 5 seconds in all
_N_DRAWS = 6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerFeatures:
    """The features that a server supports.

    Attributes:
        takes_ids: Whether ``/completions`` accepts a prompt as token ids.
        returns_ids: Whether answers hold the token ids of the prompt and of the continuation.
        has_chat: Whether ``/chat/completions`` is available.
        continues: Whether ``/chat/completions`` continues an unfinished turn of the assistant.
        extensions: Whether the server accepts the fields in ``EXTENSIONS``, such as ``top_k``.
        draws_top_k: Whether ``top_k`` has an effect.
        seed_bits: Maximum number of bits of a seed.
        limit: Name of the request field for the maximum number of new tokens.
    """

    takes_ids: bool = False
    returns_ids: bool = False
    has_chat: bool = False
    continues: bool = False
    extensions: bool = False
    draws_top_k: bool = False
    seed_bits: int = 63
    limit: str = "max_tokens"


def probe(client: OpenAIClient, model: str, chat: ChatEncoder | None, extra_body: Mapping[str, Any]) -> ServerFeatures:
    """Sends test requests to a server, and returns the features that it supports.

    Args:
        client: Client of the server.
        model: Name of the model on the server.
        chat: Encoder of prompts. None: there is no tokenizer; the server then gets only messages.
        extra_body: Further fields of all requests.

    Raises:
        ServerError: If the server does not answer or refuses the key.
        ValueError: If the server refuses all test requests, for example because it does not know the model.
    """
    prober = _Prober(client, model, extra_body)
    completion = None
    if chat is not None:
        ids = chat.prompt_ids(Conversation(question=_QUESTION))
        completion = prober.find_form(COMPLETIONS, {"prompt": ids})
        if completion is not None and _prompt_tokens(completion) != len(ids):
            completion = None  # the server did not read the ids as one prompt
    messages: list[dict[str, Any]] = [{"role": "user", "content": _QUESTION}]
    answer = prober.find_form(CHAT, {"messages": messages})
    if completion is None and answer is None:
        raise ValueError(f"the server must answer {CHAT} or {COMPLETIONS}, got {'; '.join(prober.refusals)}")
    continues = answer is not None and chat is not None and prober.continues(messages, chat, answer)
    path, body = (COMPLETIONS, {"prompt": ids}) if completion is not None else (CHAT, {"messages": messages})
    reply = completion or answer or {}
    return ServerFeatures(
        takes_ids=completion is not None,
        returns_ids=isinstance(reply["choices"][0].get("token_ids"), list),
        has_chat=answer is not None,
        continues=continues,
        extensions=prober.form.extensions,
        draws_top_k=prober.form.extensions and prober.draws_top_k(path, body),
        seed_bits=prober.form.seed_bits,
        limit=prober.form.limit,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """A set of optional request fields. ``_Prober`` tries several sets, because servers accept different fields.

    The attributes have the same meaning as in ``ServerFeatures``.
    """

    extensions: bool
    seed_bits: int
    limit: str = "max_tokens"


_FORMS = [
    _Form(True, 63),
    _Form(True, 31),
    _Form(False, 63),
    _Form(False, 31),
    _Form(False, 63, "max_completion_tokens"),
]


class _Prober:
    """Sends test requests to a server, and finds the optional request fields that it accepts."""

    def __init__(self, client: OpenAIClient, model: str, extra_body: Mapping[str, Any]) -> None:
        self.client = client
        self.base = {"model": model, "temperature": 0.0, **extra_body}
        self.forms = _FORMS
        self.refusals: list[str] = []

    @property
    def form(self) -> _Form:
        return self.forms[0]

    def find_form(self, path: str, body: Mapping[str, Any]) -> Reply | None:
        """Tries one set of optional request fields after the other, and keeps the first set that the server accepts.

        Returns the answer, or None if the server refuses all sets.
        """
        for form in self.forms:
            reply = self.ask(path, body, form)
            if reply is not None:
                self.forms = [form]
                return reply
        return None

    def ask(
        self, path: str, body: Mapping[str, Any], form: _Form, *, max_new_tokens: int = 1, **changes: Any
    ) -> Reply | None:
        """Sends a request with the optional fields of ``form``, and returns the server's answer.

        Returns None if the server refuses the request or lacks the path. The fields in ``changes`` are added to
        ``body``, and replace fields with the same name.
        """
        fields = {**self.base, **(EXTENSIONS if form.extensions else {}), form.limit: max_new_tokens}
        fields |= {"seed": 2**form.seed_bits - 1, **body, **changes}
        try:
            return self.client.post(path, fields, max_retries=_FIRST_RETRIES)
        except RequestRefusedError as error:
            self.refusals.append(str(error))
        except ServerError as error:
            if error.status not in _MISSING:
                raise
            self.refusals.append(str(error))
        return None

    def continues(self, messages: list[dict[str, Any]], chat: ChatEncoder, answer: Reply) -> bool:
        """Returns whether the server continues an unfinished turn of the assistant.

        Sends ``messages`` again, followed by an unfinished turn with a known text. If the server continues the turn,
        it counts more prompt tokens than before. The difference is the number of tokens of the known text.

        Args:
            messages: Messages of an earlier request.
            chat: Encoder that counts the tokens of the known text.
            answer: The server's answer to the earlier request.
        """
        conversation = Conversation(question=_QUESTION)
        n_prefix = len(chat.response_ids(conversation, _PREFIX)) - 1
        turns = [*messages, {"role": "assistant", "content": _PREFIX}]
        reply = self.ask(CHAT, {"messages": turns}, self.form, **OPEN_TURN)
        before, after = _prompt_tokens(answer), None if reply is None else _prompt_tokens(reply)
        return before is not None and after is not None and after == before + n_prefix

    def draws_top_k(self, path: str, body: Mapping[str, Any]) -> bool:
        """Returns whether the server applies ``top_k``.

        The method samples several times with ``top_k=1`` at a high temperature. The server passes if all samples are
        equal.
        """
        changes: dict[str, Any] = {"temperature": 2.0, "top_k": 1, "max_new_tokens": 4}
        texts = set()
        for seed in range(_N_DRAWS):
            reply = self.ask(path, body, self.form, **changes, seed=seed)
            if reply is None:
                return False
            choice = reply["choices"][0]
            texts.add(choice.get("text") or str((choice.get("message") or {}).get("content")))
        return len(texts) == 1


def _prompt_tokens(reply: Reply) -> int | None:
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) else None

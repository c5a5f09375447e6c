"""An engine that sends requests to a server with OpenAI's HTTP interface, such as vLLM, SGLang or llama.cpp."""

import base64
import dataclasses
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpo_ext.chat import ChatEncoder, ChatError, Conversation, chat_messages
from mpo_ext.checks import shorten
from mpo_ext.generate.engine import Generation, Request, refused, refused_videos
from mpo_ext.generate.openai_client import (
    OpenAIClient,
    Reply,
    RequestRefusedError,
    ServerError,
    ServerOptions,
    content_text,
)
from mpo_ext.generate.openai_probe import CHAT, COMPLETIONS, EXTENSIONS, OPEN_TURN, probe
from mpo_ext.generate.transformers_engine import make_generation
from mpo_ext.images import ImageError, load_image
from mpo_ext.processors import HUB_OPTIONS, load_without_weights
from mpo_ext.provenance import processor_parts

NO_TOKENIZER = "none"
#: Fields of the requests that the engine sets, or that change the form of the answers.
_RESERVED = {
    "model", "prompt", "messages", "tools", "tool_choice", "temperature", "top_p", "max_tokens",
    "max_completion_tokens", "seed", "stop_token_ids", "logit_bias", "n", "stream", *EXTENSIONS,
}  # fmt: skip
_TEMPLATE_FIELDS = {"chat_template", "chat_template_kwargs", "add_special_tokens", *OPEN_TURN}
_NEVER = -100.0  # the lowest value of ``logit_bias``
_TAIL = 16  # number of tokens at a prompt's end that an error message shows


class OpenAIEngine:
    """Sends prompts to a server with OpenAI's HTTP interface, and returns the continuations.

    At the start, short test requests find out what the server supports (``features``).

    - If the server accepts token ids, a prompt without images goes to ``/v1/completions`` as token ids.
    - All other prompts go to ``/v1/chat/completions`` as messages, with images as ``data:`` URLs. A prefix of the
      response is sent as an unfinished turn of the assistant (``continue_final_message``).
    - If the server returns the token ids of its prompts, they must match those of the model's processor.
    - Each request has a separate seed, which some servers ignore.
    - A request that the server cannot answer, such as a request with videos, is refused.

    Args:
        model: Name of the model on the server.
        base_url: Address of the interface, such as ``http://localhost:8000/v1``.
        tokenizer: Folder or hub name of the model's tokenizer or processor. The empty string stands for ``model``.
            "none": no tokenizer. The server then gets only messages, and DropoutNTP cannot split responses into
            tokens.
        processor: Processor of the model, or the tokenizer of a text model. It replaces ``tokenizer``.
        chat_options: Options of ``ChatEncoder``: ``chat_template``, ``chat_template_kwargs`` and ``date``.
        api_key_env: Name of the environment variable that holds the API key. The key is stored nowhere.
        concurrency: Maximum number of requests at the same time.
        timeout_s: Seconds to wait for the answer to a request.
        max_retries: Maximum number of retries after a temporary failure (``ServerOptions``).
        extra_body: Further fields of all requests. Fields that the engine sets, such as ``temperature``, are refused.
        **options: Options with which the tokenizer is loaded, such as ``revision``.

    Attributes:
        features: Features that the server supports.

    Raises:
        ChatError: If the chat template cannot be used.
        ImportError: If the package openai is missing.
        OSError: If the tokenizer cannot be loaded.
        ServerError: If the server does not answer or refuses the key.
        TypeError: If ``options`` has an unknown option.
        ValueError: If an argument is out of range, or the server refuses all test requests, for example because it
            does not know the model.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        tokenizer: str = "",
        processor: Any = None,
        chat_options: Mapping[str, Any] | None = None,
        api_key_env: str = ServerOptions.api_key_env,
        concurrency: int = ServerOptions.concurrency,
        timeout_s: float = ServerOptions.timeout_s,
        max_retries: int = ServerOptions.max_retries,
        extra_body: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if unknown := sorted(set(options) - set(HUB_OPTIONS)):
            raise TypeError(
                f"options must be arguments of OpenAIEngine or among {', '.join(HUB_OPTIONS)}, got {unknown}"
            )
        server = ServerOptions(
            base_url=base_url.rstrip("/"),
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            max_retries=max_retries,
        )
        self.name, self.concurrency = model, concurrency
        self.extra_body = _further_fields(extra_body, has_tokenizer=processor is not None or tokenizer != NO_TOKENIZER)
        self.suppressed: list[int] = []
        self.chat: ChatEncoder | None = None
        if processor is not None:
            self.chat = ChatEncoder(processor, **(chat_options or {}))
        elif tokenizer != NO_TOKENIZER:
            self.chat = self._load(tokenizer or model, chat_options or {}, options)
        elif given := [entry for entry in (chat_options or {}).items() if entry[1]]:
            raise ValueError(
                f"{given[0][0]} must be left out with tokenizer={NO_TOKENIZER}, got {shorten(given[0][1])}: the "
                "server writes the prompts, and takes such fields in extra_body"
            )
        self._chat_options = dict(chat_options or {})
        self._client = OpenAIClient(server)
        try:
            self.features = probe(self._client, model, self.chat, self.extra_body)
        except BaseException:
            self._client.close()
            raise
        self._names = itertools.count()
        self._running: dict[str, Request] = {}
        self._refused: list[tuple[str, Generation]] = []

    def settings(self) -> dict[str, Any]:
        settings = {"engine": "openai", "model": self.name, "server": dataclasses.asdict(self.features)}
        if self.chat is not None:
            settings["processor"] = processor_parts(self.chat, self.chat.stop_ids)
        optional = {"suppressed": self.suppressed, "extra_body": self.extra_body}
        return {**settings, **{name: value for name, value in optional.items() if value}}

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        return self._encoder().response_ids(conversation, response)[:-1]

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        return self._encoder().response_text(conversation, token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        names = [self.submit(request) for request in requests]
        results: dict[str, Generation] = {}
        while len(results) < len(names):
            results.update(self.finished())
        return [results[name] for name in names]

    def submit(self, request: Request) -> str:
        """Starts a request, and returns a name that identifies it.

        If a request cannot be sent, ``finished`` returns a refusal. For example, a request with videos cannot be sent.

        Raises:
            ValueError: If the request has a ``top_k`` or a prefix, and the server does not support it.
        """
        name = str(next(self._names))
        if request.videos:
            self._refused.append((name, refused_videos("openai", request)))
            return name
        sampling, features = request.sampling, self.features
        if sampling.top_k and sampling.temperature > 0 and not features.draws_top_k:
            raise ValueError(
                f"top_k must be 0 (all tokens) for {self.name}, got {sampling.top_k}: the server does not apply it"
            )
        uses_ids = features.takes_ids and not request.images
        if request.prefix_ids and not uses_ids and not features.continues:
            raise ValueError(
                f"the server must continue an open turn of the assistant, got a server for {self.name} that takes "
                f"{'no images with token ids' if features.takes_ids else 'no token ids'} and closes the last turn of "
                "the messages: DropoutNTP needs a server such as vLLM or SGLang"
            )
        try:
            fields = self._prompt_ids(request) if uses_ids else self._messages(request)
        except ValueError as error:
            self._refuse(name, error)
            return name
        fields |= self._sampling(request)
        images = () if uses_ids else request.images
        self._running[name] = request
        self._client.submit(name, COMPLETIONS if uses_ids else CHAT, lambda: _with_images(fields, images))
        return name

    def finished(self) -> list[tuple[str, Generation]]:
        """Returns the name and the generation of each request that has ended since the last call.

        If requests are running, waits until at least one of them has ended.

        Raises:
            ServerError: If the server cannot be used, or its prompts differ from those of the model's processor.
        """
        ended, self._refused = self._refused, []
        if ended:
            return ended
        for name, reply in self._client.finished():
            request = self._running.pop(name)
            if isinstance(reply, (RequestRefusedError, ImageError, OSError)):
                self._refuse(name, reply)
            elif isinstance(reply, Exception):
                raise reply
            else:
                ended.append((name, self._generation(request, reply)))
        ended += self._refused
        self._refused = []
        return ended

    def cancel(self, names: Sequence[str]) -> None:
        """Stops the requests with these names."""
        self._client.cancel(names)
        for name in names:
            self._running.pop(name, None)

    def close(self) -> None:
        """Stops all requests, and closes the connections."""
        self._client.close()

    def _load(self, path: str, chat_options: Mapping[str, Any], options: Mapping[str, Any]) -> ChatEncoder:
        try:
            loaded = load_without_weights(path, **options)
        except OSError as error:
            raise OSError(
                f"{error}: give --engine-option tokenizer=FOLDER with the model's tokenizer, or "
                f"tokenizer={NO_TOKENIZER} to send only messages"
            ) from error
        if any(len(ids) != 1 for ids in loaded.suppressed):
            raise ValueError(f"bad_words_ids in generation_config.json must be single tokens, got {loaded.suppressed}")
        self.suppressed = sorted({token for ids in loaded.suppressed for token in ids})
        checks: dict[str, Any] = {"stop_ids": loaded.stop_ids, "embedding_rows": loaded.embedding_rows}
        return ChatEncoder(loaded.processor, **checks, **chat_options)

    def _encoder(self) -> ChatEncoder:
        if self.chat is None:
            raise ValueError(
                f"tokenizer must be the tokenizer of {self.name} to cut responses into tokens, got {NO_TOKENIZER}"
            )
        return self.chat

    def _refuse(self, name: str, error: Exception) -> None:
        self._refused.append((name, refused(error)))

    def _sampling(self, request: Request) -> dict[str, Any]:
        """Returns the sampling fields of a request to the server, such as ``temperature``."""
        sampling, features = request.sampling, self.features
        fields: dict[str, Any] = {
            "model": self.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            features.limit: sampling.max_new_tokens,
            "seed": request.seed >> (63 - features.seed_bits),
        }
        if features.extensions:
            fields |= {**EXTENSIONS, "top_k": sampling.top_k or -1}
            if self.chat is not None:
                fields["stop_token_ids"] = sorted(self.chat.stop_ids)
        if self.suppressed:
            fields["logit_bias"] = {str(token): _NEVER for token in self.suppressed}
        return {**fields, **self.extra_body}

    def _prompt_ids(self, request: Request) -> dict[str, Any]:
        return {"prompt": [*self._encoder().prompt_ids(request), *request.prefix_ids]}

    def _messages(self, request: Request) -> dict[str, Any]:
        """Returns the messages and further fields of a request to ``/chat/completions``.

        Images are left as placeholders, which ``_with_images`` replaces.
        """
        chat = self.chat
        as_parts = bool(request.images) or (chat is not None and chat.is_multimodal)
        messages = chat_messages(request, as_parts=as_parts)
        fields: dict[str, Any] = {"messages": [_with_json_arguments(message) for message in messages]}
        messages = fields["messages"]
        if request.tools:
            # Calls stay in the text of the response, as in the other engines.
            fields |= {"tools": list(request.tools), "tool_choice": "none"}
        if chat is None:
            return fields
        chat.prompt(request)  # raises if the template does not write a turn
        if chat.chat_template_kwargs:
            fields["chat_template_kwargs"] = chat.chat_template_kwargs
        if self._chat_options.get("chat_template") and not self.features.returns_ids:
            raise ChatError(
                "the server must return the ids of its prompts to be used with another chat template, got a server "
                "that does not: start it with this template, and leave the option out"
            )
        if self.features.extensions and chat.adds_special_tokens(chat.prompt_text(request)):
            fields["add_special_tokens"] = True
        if request.prefix_ids:
            messages.append({"role": "assistant", "content": chat.response_text(request, request.prefix_ids)})
            fields |= OPEN_TURN
        return fields

    def _generation(self, request: Request, reply: Reply) -> Generation:
        """Converts the server's answer to a request into a ``Generation``.

        Raises:
            ServerError: If the server and the model's processor made different prompts. Also raised if the server has
                removed the reasoning from the text.
        """
        (choice,) = reply["choices"]
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):
            return refused(f"the server ended with the reason {reason!r}")
        message = choice.get("message") or {}
        text = choice["text"] if isinstance(choice.get("text"), str) else content_text(message.get("content")) or ""
        ids = choice.get("token_ids")
        if self.chat is None or not isinstance(ids, list):
            if message.get("reasoning_content") or message.get("reasoning"):
                raise ServerError("the server must leave thoughts in the text, got them apart: start it without a "
                                  "reasoning parser")  # fmt: skip
            return self._text_generation(request, text, reason, reply)
        prompt_ids = choice.get("prompt_token_ids") or reply.get("prompt_token_ids")
        if isinstance(prompt_ids, list):
            check_prompt(self.chat, request, prompt_ids)
        if reason == "stop" and ids and ids[-1] == choice.get("stop_reason"):
            ids = ids[:-1]
        generation = make_generation(self.chat, request, ids)
        return Generation(generation.token_ids, generation.text, reason)

    def _text_generation(self, request: Request, text: str, reason: Any, reply: Reply) -> Generation:
        """Converts an answer without token ids to a ``Generation``. The tokenizer encodes the text to get the ids.

        Without a tokenizer, the generation has no ids. The server's ``usage`` then gives the number of tokens.
        """
        if self.chat is None:
            usage = reply.get("usage") or {}
            count = usage.get("completion_tokens")
            return Generation((), text, reason, tokens=count if isinstance(count, int) else None)
        for end in self.chat.stop_ids:
            text = text.removesuffix(self.chat.decode([end]))
        prefix = self.chat.response_text(request, request.prefix_ids) if request.prefix_ids else ""
        size = len(request.prefix_ids)
        try:
            ids = self.chat.response_ids(request, prefix + text)[:-1]
        except ChatError:
            ids = []
        if not ids or tuple(ids[:size]) != request.prefix_ids:
            ids = [*request.prefix_ids, *self.chat.tokenizer.encode(text, add_special_tokens=False)]
        return Generation(tuple(ids[size:]), text, reason)


def _further_fields(extra_body: Any, *, has_tokenizer: bool) -> dict[str, Any]:
    """Returns ``extra_body`` as a dict.

    ``has_tokenizer`` says whether the engine has the model's chat template, and therefore sets its variables.

    Raises:
        TypeError: If ``extra_body`` is not a mapping.
        ValueError: If it has a field that the engine sets, or that changes the form of the answers.
    """
    if extra_body is None:
        return {}
    if not isinstance(extra_body, Mapping):
        raise TypeError(f"extra_body must map names of fields to values, got {extra_body!r}")
    reserved = _RESERVED | (_TEMPLATE_FIELDS if has_tokenizer else set())
    if known := sorted(set(extra_body) & reserved):
        raise ValueError(f"extra_body must have only fields that the engine does not set, got {', '.join(known)}")
    return dict(extra_body)


def check_prompt(chat: ChatEncoder, request: Request, ids: Sequence[int]) -> None:
    """Checks that the server has used the same prompt as the model's processor.

    The prompts match if their token ids or their texts are equal. With images, only the parts before the first image
    and after the last image are compared.

    Args:
        chat: Encoder with the model's processor.
        request: The request.
        ids: Token ids of the server's prompt.

    Raises:
        ServerError: If the prompts differ.
    """
    expected = [*chat.prompt_ids(request), *request.prefix_ids]
    head, tail = expected, expected
    if request.images:
        image = chat.tokenizer.convert_tokens_to_ids(getattr(chat.processor, "image_token", None) or "<image>")
        places = [place for place, token in enumerate(expected) if token == image]
        if not places:
            return
        head, tail = expected[: places[0]], expected[places[-1] + 1 :]
    if list(ids[: len(head)]) == head and list(ids[len(ids) - len(tail) :]) == tail:
        return
    written = chat.decode(ids)
    if request.images:
        matches = written.startswith(chat.decode(head)) and written.endswith(chat.decode(tail))
    else:
        matches = written == chat.decode(expected)
    if not matches:
        raise ServerError(
            f"the server must write the prompt as the model's processor does, got {written[-80:]!r} instead of "
            f"{chat.decode(tail[-_TAIL:])!r} at the end of {request.key!r}: start the server with the same chat "
            "template, and use the tokenizer of its model"
        )


def _with_json_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a message with the arguments of its tool calls as JSON texts, as OpenAI's interface requires."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}


def _with_images(fields: Mapping[str, Any], images: Sequence[Any]) -> dict[str, Any]:
    """Returns the request fields with a ``data:`` URL in place of each image part of a message."""
    if not images:
        return dict(fields)
    urls = iter([_data_url(image) for image in images])
    messages = []
    for message in fields["messages"]:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": next(urls)}} if part["type"] == "image" else part
                for part in content
            ]
        messages.append({**message, "content": content})
    return {**fields, "messages": messages}


def _data_url(image: Any) -> str:
    """Returns an image as a ``data:`` URL of a PNG, which keeps all pixels exactly."""
    file = io.BytesIO()
    load_image(image).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

"""Sends concurrent requests to a server with OpenAI's HTTP interface, and retries after temporary failures.

The requests run in an event loop in a background thread. The API key is read from the environment and sent in the
request header. It is removed from all error messages.
"""

import asyncio
import concurrent.futures
import dataclasses
import email.utils
import os
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpo_ext.checks import check_integer, check_number, install_hint

DEFAULT_KEY_ENV = "OPENAI_API_KEY"
_MAX_TEXT = 300  # maximum number of characters of a server's message
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 60.0
_MAX_RETRY_AFTER_S = 3600.0
_CONNECT_S = 10.0
_REFUSED = (400, 413, 422)  # statuses of a request that the server refuses
_PASSING = (408, 409, 425, 429)  # statuses of temporary failures, as are all statuses from 500
_BUSY = (429, 503)

Reply = dict[str, Any]


class ServerError(RuntimeError):
    """Raised if a server cannot be used, for example because it does not answer or does not know the model.

    Attributes:
        status: HTTP status with which the server reported an error; None for other failures.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        self.status = status
        super().__init__(message)


class RequestRefusedError(Exception):
    """Raised if a server refuses a request, for example because its prompt is too long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Address of the server, and settings of the requests.

    Attributes:
        base_url: Address of the interface, such as ``http://localhost:8000/v1``.
        api_key_env: Name of the environment variable that holds the API key. The default variable, ``OPENAI_API_KEY``,
            need not be set. Any other variable must be set.
        concurrency: Maximum number of requests at the same time.
        timeout_s: Seconds to wait for the answer to a request.
        max_retries: Maximum number of retries after a temporary failure. Temporary failures are: a status 408, 409,
            425, 429 or >= 500; a broken connection; no answer in time; an answer that is not the expected JSON.
    """

    base_url: str
    api_key_env: str = DEFAULT_KEY_ENV
    concurrency: int = 64
    timeout_s: float = 1800.0
    max_retries: int = 10

    def __post_init__(self) -> None:
        check_integer("concurrency", self.concurrency, least=1)
        check_number("timeout_s", self.timeout_s, "(0, inf)")
        check_integer("max_retries", self.max_retries, least=0)
        url = urllib.parse.urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"base_url must begin with http:// or https://, got {self.base_url!r}")
        try:
            url.port  # noqa: B018 - raises for an invalid port
        except ValueError as error:
            raise ValueError(f"base_url must have a valid port, got {self.base_url!r}: {error}") from None
        if url.username or url.password or url.query or url.fragment:
            # The address appears in errors and logs, so it is not shown here.
            raise ValueError("base_url must not hold a user, a password, or a part after '?' or '#': keys go into "
                             "an environment variable (api_key_env)")  # fmt: skip

    def key(self) -> str:
        """Returns the API key: the value of the environment variable ``api_key_env``.

        The default variable is ``OPENAI_API_KEY``. If this variable is not set, returns "none".

        Raises:
            ValueError: If any other variable is not set. Also raised if the key cannot be sent in a header.
        """
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.api_key_env != DEFAULT_KEY_ENV:
            raise ValueError(f"api_key_env must name an environment variable with a key, got {self.api_key_env!r}")
        if not (key.isascii() and (key + "x").isprintable()):
            raise ValueError(f"the key in {self.api_key_env} must have printable ASCII characters only")
        return key or "none"


class OpenAIClient:
    """Sends requests to a server from a background thread.

    The methods are not thread-safe: the caller must call all of them from one thread.

    Raises:
        ImportError: If the package openai is missing.
        ValueError: If the API key is missing or cannot be sent in a header (``ServerOptions.key``).
    """

    def __init__(self, options: ServerOptions) -> None:
        try:
            import openai
        except ImportError as error:
            raise ImportError(f"OpenAIEngine needs openai: {install_hint('openai')} ({error})") from error
        self.options = options
        self._openai = openai
        self._key = options.key()
        self._http = openai.AsyncOpenAI(
            base_url=options.base_url,
            api_key=self._key,
            timeout=openai.Timeout(options.timeout_s, connect=_CONNECT_S),
            max_retries=0,  # ``_ask`` repeats requests, also those with a broken answer
        )
        self._slots = asyncio.Semaphore(options.concurrency)
        self._accepted: tuple[str, Mapping[str, Any]] | None = None  # the latest request that ``post`` has sent
        self._running: dict[str, concurrent.futures.Future[Reply]] = {}
        self._ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="mpo_ext.openai").start()

    def post(self, path: str, body: Mapping[str, Any], *, max_retries: int) -> Reply:
        """Sends a request, and returns the answer.

        Raises:
            RequestRefusedError: If the server refuses the request.
            ServerError: If the server cannot be used.
        """
        reply = asyncio.run_coroutine_threadsafe(self._ask(path, body, max_retries), self._loop).result()
        self._accepted = (path, body)
        return reply

    def submit(self, name: str, path: str, make_body: Callable[[], Mapping[str, Any]]) -> None:
        """Starts a request without waiting for the answer.

        Args:
            name: Name of the request. ``finished`` returns the answer with this name.
            path: Path of the request below ``base_url``.
            make_body: Function that returns the JSON body. A worker thread calls it when the request is sent.
        """
        future = asyncio.run_coroutine_threadsafe(self._take_turn(path, make_body), self._loop)
        self._running[name] = future
        future.add_done_callback(lambda _: self._ended.put(name))

    def finished(self) -> list[tuple[str, Reply | Exception]]:
        """Returns the name and the answer or error of each request that has ended since the last call.

        If requests are running, waits until at least one of them has ended.
        """
        ended: list[tuple[str, Reply | Exception]] = []
        while self._running and not (ended and self._ended.empty()):
            name = self._ended.get()
            future = self._running.pop(name, None)
            if future is not None:  # otherwise it was canceled
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                ended.append((name, future.result() if error is None else error))
        return ended

    def cancel(self, names: Sequence[str]) -> None:
        """Stops the requests with these names."""
        for name in names:
            if (future := self._running.pop(name, None)) is not None:
                future.cancel()

    def close(self) -> None:
        """Stops all requests, and closes the connections."""
        self.cancel(list(self._running))
        asyncio.run_coroutine_threadsafe(self._http.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _take_turn(self, path: str, make_body: Callable[[], Mapping[str, Any]]) -> Reply:
        async with self._slots:
            body = await asyncio.to_thread(make_body)
            return await self._ask(path, body, self.options.max_retries)

    async def _ask(self, path: str, body: Mapping[str, Any], max_retries: int) -> Reply:
        """Sends a request. After a temporary failure, retries up to ``max_retries`` times, with growing pauses.

        A pause is at least as long as the server requests. If all attempts fail, a test follows: the latest successful
        request of ``post`` is sent again. After status 429 or 503, there is no test.

        Raises:
            RequestRefusedError: If the server refuses the request, or if all attempts fail and the test succeeds.
            ServerError: If the server cannot be used.
        """
        attempt = 0
        while True:
            failure = await self._attempt(path, body)
            if isinstance(failure, dict):
                return failure
            if attempt >= max_retries:
                break
            pause_s = min(_MAX_PAUSE_S, _FIRST_PAUSE_S * 2**attempt) * random.uniform(0.5, 1.0)
            if failure.wait_s > _MAX_RETRY_AFTER_S:
                raise ServerError(f"{failure.text}: the server asks to wait {failure.wait_s:.0f} s", failure.status)
            await asyncio.sleep(max(pause_s, failure.wait_s))
            attempt += 1
        text = f"{failure.text} ({attempt + 1} attempts)"
        # If the server still answers another request, this request is refused: it must not end every resumed run.
        is_busy = failure.status in _BUSY
        if not is_busy and self._accepted is not None and isinstance(await self._attempt(*self._accepted), dict):
            raise RequestRefusedError(text)
        raise ServerError(f"{text}: the same command resumes the run when the server works again", failure.status)

    async def _attempt(self, path: str, body: Mapping[str, Any]) -> "Reply | _Failure":
        """Sends a request once, and returns the answer, or a failure that may be temporary.

        Raises RequestRefusedError or ServerError for a failure that is not temporary.
        """
        openai, place = self._openai, f"{self.options.base_url}{path}"
        try:
            reply: Any = await self._http.post(path, body=body, cast_to=object)
        except openai.APIStatusError as error:
            status, text = error.status_code, f"{place}: status {error.status_code}: {self._clean(error.message)}"
            if status in _REFUSED:
                raise RequestRefusedError(text) from None
            if status not in _PASSING and status < 500:
                raise ServerError(text, status) from None
            return _Failure(text, status, retry_after_s(error.response.headers))
        except openai.APIConnectionError as error:
            return _Failure(f"{place}: {self._clean(f'{error} {error.__cause__ or str()}')}")
        except (ValueError, openai.APIResponseValidationError) as error:
            return _Failure(f"{place}: the answer must be JSON, got {self._clean(str(error))}")
        if problem := _problem(reply):
            return _Failure(f"{place}: the answer must have one choice with a text, got {self._clean(problem)}")
        return dict(reply)

    def _clean(self, text: str) -> str:
        """Puts a text on one line, masks the API key, and truncates the text to a maximum length."""
        text = text if self._key == "none" else text.replace(self._key, "***")
        return " ".join(text.split())[:_MAX_TEXT]


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    """A failure that may be temporary.

    Attributes:
        text: Description, without the API key.
        status: HTTP status with which the server reported an error; None for other failures.
        wait_s: Seconds for which the server asks to wait.
    """

    text: str
    status: int | None = None
    wait_s: float = 0.0


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Returns how many seconds the response headers ask the client to wait; 0 without such a header.

    ``Retry-After`` may be a date. The seconds are then counted from the date in the header ``Date``. Without this
    header, they are counted from now.
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        try:
            return max(0.0, float(text) * scale)
        except ValueError:
            pass
        try:
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - _now(headers))
        except (TypeError, ValueError):
            continue
    return 0.0


def _now(headers: Mapping[str, str]) -> float:
    """Returns the Unix time from the header ``Date``, or this machine's time if the header is missing or invalid."""
    try:
        return email.utils.parsedate_to_datetime(headers.get("date", "")).timestamp()
    except (TypeError, ValueError):
        return time.time()


def _problem(reply: Any) -> str | None:
    """Returns a description of an invalid answer, or None for a valid answer.

    A valid answer has exactly one choice, with a text or message and a finish reason.
    """
    choices = reply.get("choices") if isinstance(reply, Mapping) else None
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], Mapping):
        (choice,) = choices
        message = choice.get("message")
        has_content = isinstance(choice.get("text"), str) or (
            isinstance(message, Mapping) and content_text(message.get("content")) is not None
        )
        if has_content and isinstance(choice.get("finish_reason"), str):
            return None
    return repr(reply)


def content_text(content: Any) -> str | None:
    """Returns the text of a message's content, or None if the content is not a text.

    The content is a text, a list of text parts, or None, which stands for "".
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)

"""The interface of inference engines, which continue prompts with transformers, vLLM or a server.

A continuation depends only on the request's prompt, seed and sampling settings. Apart from rounding, the other
requests and their order have no effect.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from mpo_ext.chat import Conversation
from mpo_ext.checks import check_integer, check_number, environment_integer

_MAX_REFUSAL = 300  # maximum number of characters


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Settings for drawing tokens. The defaults are those in the scripts of MPO's authors.

    Attributes:
        temperature: Softmax temperature; 0 takes the most probable token.
        top_p: A token is drawn from the smallest set of tokens with a total probability of at least ``top_p`` (nucleus
            sampling).
        top_k: A token is drawn from the ``top_k`` most probable tokens; 0: from all tokens.
        max_new_tokens: Maximum number of tokens in a continuation.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "[0, inf)")
        check_number("top_p", self.top_p, "(0, 1]")
        check_integer("top_k", self.top_k, least=0)
        check_integer("max_new_tokens", self.max_new_tokens, least=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request(Conversation):
    """A prompt to continue, with all attributes of a ``Conversation``.

    Attributes:
        prefix_ids: Token ids at the beginning of the assistant's turn. The model continues this turn.
        seed: Seed of all draws.
        sampling: Settings for drawing tokens.
        choices: Possible answers, each as a tuple of spellings, such as ``(("Yes", "yes"), ("No", "no"))``. An engine
            that can measure their probabilities generates only one token, and returns ``Generation.choice_probs``.
            Other engines ignore the choices.
        role: "answer" for the model that answers questions, "judge" for the model that judges the answers.
    """

    prefix_ids: tuple[int, ...] = ()
    seed: int = 0
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    choices: tuple[tuple[str, ...], ...] = ()
    role: Literal["answer", "judge"] = "answer"


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """The continuation of a request.

    Attributes:
        token_ids: Generated token ids, without the prefix and the end-of-turn token.
        text: Text of ``token_ids``.
        finish_reason: "stop": the model ended its turn. "length": the continuation reached ``max_new_tokens``, or the
            engine refused the request.
        refusal: Reason why the engine refused the request, for example a prompt that is too long. None: the request
            was not refused.
        tokens: Number of generated tokens, from an engine that does not know the token ids. None: the number is
            ``len(token_ids)``.
        choice_probs: Probability of each choice of the request, measured at the first generated token. None: the
            request has no choices, or the engine cannot measure them.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]
    refusal: str | None = None
    tokens: int | None = None
    choice_probs: tuple[float, ...] | None = None

    @property
    def n_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids) if self.tokens is None else self.tokens


def refused(reason: object) -> Generation:
    """Returns a ``Generation`` that reports a refused request; ``reason`` is an exception or a text."""
    text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)
    return Generation((), "", "length", refusal=text[:_MAX_REFUSAL])


def refused_videos(engine: str, request: Request) -> Generation:
    """Returns a ``Generation`` that reports a refused request, because the engine does not support videos.

    ``engine`` is the engine's name as in ``--engine``.
    """
    return refused(
        f"videos must be none for the engine {engine}, got {len(request.videos)}: use --engine transformers"
    )


class Engine(Protocol):
    """The interface of an engine that samples responses.

    Attributes:
        name: Name of the model, which is stored with each pair.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the generations, as JSON values."""

    def encode_response(self, conversation: Conversation, response: str) -> list[int]:
        """Returns the token ids of a response. The end-of-turn token is not included."""

    def decode_response(self, conversation: Conversation, token_ids: Sequence[int]) -> str:
        """Returns the text of a response to a conversation from its token ids. The text includes special tokens."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Returns the continuation of each request, in the order of the requests."""


def derive_seed(*parts: object) -> int:
    """Returns a 63-bit seed from a hash of ``parts``. Equal parts give equal seeds."""
    digest = hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rank_and_world_size() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes; (0, 1) without a launcher.

    Reads the environment variables of ``accelerate launch``, torchrun, srun and mpirun. Creates no process group.
    """
    for rank, world_size in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ):
        if rank in os.environ and world_size in os.environ:
            return environment_integer(rank, 0), environment_integer(world_size, 1)
    return 0, 1

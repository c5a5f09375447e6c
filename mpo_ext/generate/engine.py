"""Engines that continue prompts: one interface over transformers and vLLM, called by the pipelines of this package.

What a request gets depends on its prompt, its seed and its sampling settings; not on the requests beside it, nor on
their order, but for the rounding of the model's own arithmetic.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from mpo_ext.chat import Conversation
from mpo_ext.checks import check_integer, check_number


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn. The defaults are those of the authors' scripts.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Share of the probability that the likeliest tokens must reach together; the others are left out.
        top_k: Number of the likeliest tokens to draw from; 0 draws from all.
        max_new_tokens: Longest continuation.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 50
    max_new_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            check_number(name, getattr(self, name))
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and not negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        check_integer("top_k", self.top_k, least=0)
        check_integer("max_new_tokens", self.max_new_tokens, least=1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request(Conversation):
    """One prompt to continue.

    Attributes:
        prefix_ids: Token ids that the assistant's turn begins with; the turn stays open, and the continuation follows.
        seed: Source of every draw.
        sampling: How tokens are drawn.
    """

    prefix_ids: tuple[int, ...] = ()
    seed: int = 0
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """What came of a request.

    Attributes:
        token_ids: The continuation, without the prefix and without the end token.
        text: The same as text.
        finish_reason: "stop" where the model ended its turn, "length" where ``max_new_tokens`` cut it off.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length"]


class Engine(Protocol):
    """What the pipelines ask of an engine."""

    name: str

    def settings(self) -> dict[str, Any]:
        """What the generations depend on, as JSON can hold it."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without any that the tokenizer would add around it."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Continues every request; the results have the order of the requests."""


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on all parts and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rank_and_world_size() -> tuple[int, int]:
    """Number of this process and of all, as ``accelerate launch``, torchrun, srun and mpirun say; (0, 1) without.

    The processes of a run never talk to one another, so no process group is made.
    """
    for rank, world_size in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ):
        if rank in os.environ and world_size in os.environ:
            return int(os.environ[rank]), int(os.environ[world_size])
    return 0, 1

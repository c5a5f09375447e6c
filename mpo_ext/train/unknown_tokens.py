"""Finds text that a tokenizer can only encode as the unknown token, such as ``<unk>``."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from mpo_ext.chat import ChatEncoder
from mpo_ext.checks import shorten
from mpo_ext.data.records import Pair
from mpo_ext.train.encode import conversation_of


@dataclasses.dataclass(slots=True)
class UnknownTokens:
    """Counts of unknown tokens in the prompts and responses of pairs. ``str`` returns a message for the user.

    Attributes:
        token: Text of the unknown token, such as ``<unk>``.
        pairs_read: Number of pairs whose texts were encoded.
        pairs: Number of pairs with an unknown token.
        tokens: Number of unknown tokens; with a slow tokenizer, number of words with unknown tokens.
        first: Description of the first unknown token: its text, its field and the name of its pair.
    """

    token: str
    pairs_read: int = 0
    pairs: int = 0
    tokens: int = 0
    first: str = ""

    def __str__(self) -> str:
        return (
            f"the tokenizer does not know all characters: {self.tokens:,} x {self.token} in {self.pairs:,} of "
            f"{self.pairs_read:,} pairs, such as {self.first}"
        )


def find_unknown(chat: ChatEncoder, pairs: Iterable[tuple[Pair, str]]) -> UnknownTokens | None:
    """Counts the unknown tokens in the texts of pairs. Returns None if there are no unknown tokens.

    Args:
        chat: Encoder with the tokenizer and the chat template. Images are not opened.
        pairs: Tuples (pair, name). The message refers to the pair by ``name``.
    """
    if getattr(chat.tokenizer, "unk_token_id", None) is None:
        return None
    unknown = UnknownTokens(str(chat.tokenizer.unk_token))
    for pair, name in pairs:
        unknown.pairs_read += 1
        tokens = 0
        for field, text in _texts(chat, pair, name):
            pieces = _unknown_pieces(chat.tokenizer, text)
            if pieces and not unknown.first:
                unknown.first = f"{shorten(pieces[0], 40)} in the {field} of {name}"
            tokens += len(pieces)
        unknown.pairs += tokens > 0
        unknown.tokens += tokens
    return unknown if unknown.tokens else None


def _texts(chat: ChatEncoder, pair: Pair, name: str) -> Iterator[tuple[str, str]]:
    """Yields ``(field, text)`` for the prompt, the chosen response and the rejected response."""
    prompt = pair.question
    if not pair.videos:  # some processors open the video to write its frames into the prompt
        with contextlib.suppress(ValueError):  # ``prove`` reports the pairs that do not fit the template
            prompt = chat.prompt_text(conversation_of(pair, name))
    yield from (("prompt", prompt), ("chosen response", pair.chosen), ("rejected response", pair.rejected))


def _unknown_pieces(tokenizer: Any, text: str) -> list[str]:
    """Returns the parts of a text that become unknown tokens.

    A slow tokenizer does not report the positions of tokens. With a slow tokenizer, the parts are therefore whole
    words.
    """
    unknown, token = tokenizer.unk_token_id, tokenizer.unk_token
    if unknown not in tokenizer.encode(text, add_special_tokens=False, verbose=False):
        return []
    if not getattr(tokenizer, "is_fast", False):
        words = [word for word in text.split() if word != token]
        return [word for word in words if unknown in tokenizer.encode(word, add_special_tokens=False)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    pieces = [text[start:end] for token_id, (start, end) in places if token_id == unknown]
    return [piece for piece in pieces if piece.strip() != token]

"""The texts of sampled token ids."""

import unicodedata
from collections.abc import Callable, Collection, Sequence

_METASPACE = "\u2581"  # SentencePiece's sign for a space, which it cannot tell from a space


def squash(text: str) -> str:
    """Returns the text without white space, which templates trim and move, in the form NFC, as tokenizers make it."""
    return "".join(unicodedata.normalize("NFC", text.replace(_METASPACE, " ")).split())


def possible_texts(
    decode: Callable[[Sequence[int]], str], special_ids: Collection[int], context: Sequence[int], ids: Sequence[int]
) -> list[str]:
    """Returns texts of the ids that follow a prompt, of which one encodes as these ids.

    Decoders of SentencePiece drop the space that their tokenizer prepends, at the beginning of a text only. Some of
    these tokenizers prepend a space at the beginning of a text, some after each special token, and some nowhere.

    Args:
        decode: Returns the text of ids.
        special_ids: Ids of special tokens, before and after which the tokenizer splits texts.
        context: The last ids of the prompt.
        ids: The ids of the response.
    """
    head = decode(context)

    def continued(part: Sequence[int]) -> str:
        whole = decode([*context, *part])
        return whole[len(head) :] if whole.startswith(head) else decode(part)

    pieces: list[list[int]] = [[]]
    for token in ids:
        if token in special_ids:
            pieces += [[token], []]
        else:
            pieces[-1].append(token)
    rest = "".join(decode(piece) for piece in pieces[1:] if piece)
    return [decode(ids), continued(ids), decode(pieces[0]) + rest, continued(pieces[0]) + rest]

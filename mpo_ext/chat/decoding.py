"""Decodes the token ids of a sampled response to text."""

import unicodedata
from collections.abc import Callable, Collection, Sequence

_METASPACE = "\u2581"  # SentencePiece writes a space as this character, and decodes this character as a space


def squash(text: str) -> str:
    """Removes white space from a text, and normalizes the text to the Unicode form NFC.

    Texts from chat templates and tokenizers are compared in this form. Both may change white space, and tokenizers may
    change the Unicode form.
    """
    return "".join(unicodedata.normalize("NFC", text.replace(_METASPACE, " ")).split())


def possible_texts(
    decode: Callable[[Sequence[int]], str], special_ids: Collection[int], context: Sequence[int], ids: Sequence[int]
) -> list[str]:
    """Returns candidates for the text of a response with the token ids ``ids``.

    The candidates differ only in spaces. At least one candidate should encode to ``ids`` again.

    The reason is SentencePiece. A SentencePiece tokenizer may prepend a space at the beginning of a text or after each
    special token. The decoder removes this space only at the beginning of a text.

    Args:
        decode: Function that returns the text of ids.
        special_ids: Ids of special tokens. The tokenizer splits texts at these tokens.
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

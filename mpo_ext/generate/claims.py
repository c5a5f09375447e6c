"""Prompts and parsers for splitting responses into claims and turning claims into yes-or-no questions.

The steps are those of RLAIF-V (arXiv 2405.17220). The prompts are not those of the paper.
"""

import re

CLAIMS_PROMPT = """Below are a question and an answer to it. List the facts that the answer states, each as a \
complete sentence that can be understood alone. Leave out opinions. Write one fact per line, and begin each line with \
"- ".

Question: {question}
Answer: {answer}"""
QUESTIONS_PROMPT = """Turn each statement below into a question that can be answered with yes or no. Keep its \
wording, its tense and every negation. Write one question per line, in the order of the statements, and begin each \
line with "- ".

Statements:
{claims}"""
VERDICT_PROMPT = "{question}\nAnswer with yes or no."
STATEMENT = "Is this statement correct? {claim}"

_MARK = re.compile(r"\s*(?:[-*\u2022]|\d{1,3}[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\n+")


def read_list(text: str) -> list[str]:
    """Returns the entries of a list that a model has written, one entry per line.

    If any line begins with a list mark ("-", "*", "•", "1." or "1)"), only the lines with a mark are entries.
    Otherwise, each line that does not end with a colon is an entry. Entries without a letter or digit are left out.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [_MARK.sub("", line, count=1).strip() for line in lines if _MARK.match(line)]
    if not marked:
        marked = [line.strip() for line in lines if not line.rstrip().endswith(":")]
    return [entry for entry in marked if _has_word(entry)]


def split_sentences(text: str) -> list[str]:
    """Splits a text into sentences and lines. Leaves out parts without a letter or a digit."""
    return [part.strip() for part in _SENTENCE_END.split(text) if _has_word(part)]


def _has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)

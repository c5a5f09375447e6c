"""Defines long answers that are slow to match with regular expressions.

They repeat texts that mpo_ext.answers looks for, such as "final answer".
"""

import random

LONGEST = 100_000
PARTS = (
    " ", "\n", "\t", "\u3000", ".", ",", ":", "-", "+", "=", "*", "**", "_", "__", "`", "$", "$$", "\\", "\\\\",
    "/", "(", ")", "[", "]", "{", "}", "\\(", "\\)", "\\[", "\\]", "\\boxed", "\\boxed{", "\\boxed {", "\\text{",
    "\\frac{1}{", "\\mathrm{m}", "\\sqrt{", "^", "^{", "^\\circ", "%", "'", "\"", "\u2019", "?", "!", "A", "B",
    "(A)", "A.", "A and B", "a", "x", "x .", "x . . .", "7", "7,", "7,000", "7.5", "1 234", "1/2", "\xbd", "-3",
    "10^", "x 10^5", "1e9", "seven", "twenty-one", "hundred and", "million", "km", "m/s", "per", "square",
    "percent", "USD", "and", "or", "not", "the", "the answer", "final", "final answer", "Final answer is",
    "answer is", "Final answer:", "it is", "is correct", "i do not", "cannot be", "unknown", "option", "choice",
    "thus", "so", "\u4e09", "\xe9", "\U0001f600", "\ud800",
)  # fmt: skip
#: The answers that the audit found, each of which took seconds or minutes.
FOUND = (
    "final answer is" + " " * 100_000,
    "answer" + "\n" * 100_000 + "x",
    "x . . ." * 3000,
    "x" + " ." * 10_000,
    "\\boxed{" * 15_000,
    "\\text{" * 15_000 + "}" * 15_000,
    "a" * 20_000,
    "x \\text{}",  # once ended the matcher "math" with an AttributeError
    "ab" * 10_000,
)


def hostile_answer(rng: random.Random) -> str:
    """Returns a random answer of up to 100,000 characters, which mainly repeats one to four texts from ``PARTS``."""
    parts = rng.choices(PARTS, k=rng.randint(1, 4))
    if rng.random() < 0.3:
        rng.shuffle(parts)
    size = int(2 ** rng.uniform(0, 16.6))
    body = "".join(parts)
    if rng.random() < 0.3:  # another order in each repetition
        body = "".join(rng.choices(parts, k=max(size // max(len(body), 1), 1)))
    text = rng.choice(PARTS) + body * (size // len(body) + 1) + rng.choice(PARTS)
    return text[: rng.choice([LONGEST, 2000, 1999, 800, 400])]

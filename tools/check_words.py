"""Checks the English of the repository against a list of banned phrases.

Usage: ``python tools/check_words.py [FILE ...]``; without files it checks every text file that git tracks. Prints one
line per finding, and exits with status 1 if there are findings. A line that must keep a phrase, such as a quotation,
ends in ``words: ignore``.
"""

import ast
import bisect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {
    ".cpp", ".cu", ".cuh", ".h", ".inl", ".ipynb", ".j2", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml",
}  # fmt: skip
NAMES = {"Makefile", "CMakeLists.txt", "run"}
SKIPPED = ("tools/check_words.py", "LICENSE", "results/", "docs/plots/", "README.zh-CN.md")
IGNORE = "words: ignore"

#: Phrase (a regular expression, case-insensitive) and what to write in its place.
PHRASES = {
    r"(?<!there )(?<!there's )\b(?:is|are) no (?!such\b|more\b|less\b|worse\b|better\b|faster\b|longer\b)"
    r"[a-z]+": "is not a ..., does not exist",
    r"(?:is|are) told\b": "is recognised by, is passed to",
    r"is said\b": "is reported, is printed",
    r"\bgoes on\b": "resumes, continues",
    r"(?:is|are) at work\b": "runs, handles",
    r"\bto be had\b": "available",
    r"\bby what\b": "by the <noun> that",
    r"\bfrom which on\b": "minimum, threshold",
    r"\bnothing but\b": "only",
    r"\bof (?:its|their|his|one's) own\b": "its own <noun>, separate",
    r"\bwhere one\b": "name the noun",
    r"\banew\b": "again",
    r"\bthat is all\b": "only",
    r"\bone that\b": "name the noun",
    r"\bwhose \w+ it is\b": "name the owner",
    r"\bhas the last word\b": "takes precedence",
    r"\bnobody knows\b": "unknown",
    r"\bown affair\b": "unrelated to",
    r"\bhang together\b": "are correlated",
    r"\bnothing takes\b": "unexpected",
    r"\bis found out\b": "is detected",
    r"\bcomes? on top of\b": "beyond, in addition to",
    r"\bhas no place in\b": "is left out of",
    r"\bwas ended\b": "was interrupted",
    r"\b(?:a|the) training(?=[,.;:)]| (?:is|was|has|ends|that|which|of|goes|with|in|on|and)\b)": "training, a run",
    r"\bthe likeliest\b": "the most likely",
    r"\bas (?:long|far) as it does\b": "split the sentence",
    r"\bis good for nothing\b|\bis no good\b": "was rejected because",
    r"\bnor does\b": "and does not",
    r"\bbut for\b": "except for",
    r"\bsuch as it is\b": "delete it",
    r"\bthe other way round\b": "reversed",
}  # fmt: skip
_PATTERN = re.compile("|".join(f"(?P<p{number}>{phrase})" for number, phrase in enumerate(PHRASES)), re.IGNORECASE)
_ADVICE = list(PHRASES.values())


def check_text(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, message) for each banned phrase. A phrase may continue on the next line."""
    lines = text.splitlines()
    joined, starts = "", []
    for line in lines:
        starts.append(len(joined))
        joined += re.sub(r"^[ \t]*(?:#:?|//[/!]?|\*)?[ \t]*", "", line).rstrip() + " "
    for match in _PATTERN.finditer(joined):
        number = bisect.bisect_right(starts, match.start()) - 1
        if IGNORE not in lines[number]:
            yield number + 1, f"{match.group()!r}: write {_ADVICE[int((match.lastgroup or 'p0')[1:])]}"


def check_docstrings(text: str) -> Iterator[tuple[int, str]]:
    """Yields (line number, message) for each docstring that begins with a banned word, such as "What"."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node) or ""
        if docstring.startswith(("What ", "Of ", "As ", "How ", "Where ", "Whether ", "That ")):
            line = node.body[0].lineno
            yield line, f"docstring begins with {docstring.split()[0]!r}: begin with a verb (Returns, Checks ...)"


def check_file(path: Path) -> Iterator[str]:
    """Yields a line of text for each finding in a file: "PATH:LINE: MESSAGE"."""
    text = path.read_text(encoding="utf-8")
    findings = list(check_text(text))
    if path.suffix == ".py":
        findings += check_docstrings(text)
    for number, message in sorted(findings):
        yield f"{path}:{number}: {message}"


def tracked_files() -> list[Path]:
    """Returns the text files that git tracks."""
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, text=True).stdout.split("\0")
    return [
        Path(name)
        for name in names
        if name
        and not name.startswith(SKIPPED)
        and (Path(name).suffix in SUFFIXES or Path(name).name in NAMES)
        and Path(name).is_file()
    ]


def main(arguments: list[str]) -> int:
    """Checks the files and prints the findings. Returns the exit status."""
    files = [Path(name) for name in arguments if not name.startswith(SKIPPED)] if arguments else tracked_files()
    findings = [line for path in files for line in check_file(path)]
    print("\n".join(findings) or f"words: {len(files)} files are clean")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

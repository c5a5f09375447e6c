"""Engines with scripted answers, and a helper that writes files of questions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stub_engine import StubEngine

from mpo_ext.generate.engine import Generation, Request


class ScriptedEngine(StubEngine):
    """Answers with prepared texts.

    ``answers`` maps the first line of a question to its responses, one for each sample. A response that ends in "..."
    counts as cut off at the length limit.
    """

    def __init__(self, answers: Mapping[str, Sequence[str]], *, name: str = "scripted") -> None:
        super().__init__()
        self.answers, self.name = answers, name

    def settings(self) -> dict[str, Any]:
        return {"engine": "scripted", "model": self.name}

    def _answer(self, request: Request) -> Generation:
        text = self.answers[request.question.splitlines()[0]][int(request.key.rpartition("-")[2])]
        return Generation(tuple(self.encode(text)), text, "length" if text.endswith("...") else "stop")


class SeeingEngine(ScriptedEngine):
    """Answers from ``answers`` if the request has an image, otherwise from ``blind``."""

    def __init__(self, answers: dict[str, list[str]], blind: dict[str, list[str]]) -> None:
        super().__init__(answers)
        self.seen, self.blind = answers, blind

    def _answer(self, request: Any) -> Any:
        self.answers = self.seen if request.images else self.blind
        return super()._answer(request)


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path

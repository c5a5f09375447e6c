r"""Named prompt templates. A template is the text around a question, and asks for an answer in a certain form.

The text holds ``{question}`` once. A template that shows options also holds ``{options}`` once. Braces after a letter,
a digit or a backslash are ordinary text, such as ``\boxed{}``. A question may hold any braces.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.answers import REGEX_PREFIX, STYLES, label_options
from mpo_ext.checks import check_choice, install_hint

FIELDS = ("question", "options")
_FIELD = re.compile(r"(?<![\w\\])\{(\w+)\}")


@dataclasses.dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A prompt template.

    Attributes:
        name: Name of the template.
        text: Text of the prompt, with the field ``{question}`` and optionally ``{options}``.
        answer_style: Style with which ``extract_answer`` extracts the answer from a response.
    """

    name: str
    text: str
    answer_style: str

    def __post_init__(self) -> None:
        for attribute in ("name", "text", "answer_style"):
            value = getattr(self, attribute)
            if not isinstance(value, str):
                raise TypeError(f"{attribute} of a template must be a string, got {value!r}")
            if not value.strip():
                raise ValueError(f"{attribute} of a template must not be empty, got {value!r}")
        if self.answer_style not in STYLES and not self.answer_style.startswith(REGEX_PREFIX):
            raise ValueError(
                f"answer_style of template {self.name!r} must be one of {', '.join(STYLES)} or '{REGEX_PREFIX}...', "
                f"got {self.answer_style!r}"
            )
        fields = _FIELD.findall(self.text)
        for field in fields:
            if field not in FIELDS:
                raise ValueError(
                    f"template {self.name!r} must use only the fields {{question}} and {{options}}, got {{{field}}}"
                )
        if fields.count("question") != 1 or fields.count("options") > 1:
            raise ValueError(
                f"template {self.name!r} must hold {{question}} once and {{options}} at most once, "
                f"got {fields.count('question')} and {fields.count('options')}"
            )


# Journals record these texts, so an evaluation cannot resume after a text has changed.
_FINAL_ANSWER = (
    "Close with a line of its own that reads "  # words: ignore
    '"Final answer: <answer>" and holds nothing but the answer.'  # words: ignore
)
_QUESTION = "{question}\n{options}\n\n"

TEMPLATES: dict[str, PromptTemplate] = {
    template.name: template
    for template in (
        PromptTemplate("direct", _QUESTION + "Give a short answer and no explanation.", "direct"),
        PromptTemplate("direct_word", _QUESTION + "Reply with one word, one number or a brief phrase only.", "direct"),
        PromptTemplate("direct_letter", _QUESTION + "Reply with the letter of the right option only.", "direct"),
        PromptTemplate("cot", _QUESTION + f"Reason step by step first. {_FINAL_ANSWER}", "final_answer"),
        PromptTemplate(
            "cot_boxed",
            _QUESTION + "Reason step by step first. Close with the answer, and nothing else, inside \\boxed{}.",
            "boxed",
        ),
        PromptTemplate(
            "cot_background",
            _QUESTION
            + "Start with the facts, laws or definitions that this question rests on, then apply them step by step to "
            + f"what is shown. {_FINAL_ANSWER}",
            "final_answer",
        ),
        PromptTemplate(
            "cot_visual",
            _QUESTION
            + "Start by writing down what the image says about this: the labels, values and words that matter, as "
            + f"they stand there. Then reason from them step by step. {_FINAL_ANSWER}",
            "final_answer",
        ),
        PromptTemplate(
            "cot_grounded",
            _QUESTION
            + "Reason step by step, and point at each object that you rely on: <ref>its name</ref>"
            + "<box>[[x1, y1, x2, y2]]</box>, whole numbers from 0 to 1000, left and top edge first, in thousandths "
            + f"of the width and height of the image. {_FINAL_ANSWER}",
            "final_answer",
        ),
    )
}


def get_template(name: str, templates: Mapping[str, PromptTemplate] = TEMPLATES) -> PromptTemplate:
    """Returns the template with the given name. ``templates`` are the built-in templates by default."""
    check_choice("template", name, templates)
    return templates[name]


def load_templates(path: str | Path) -> dict[str, PromptTemplate]:
    """Reads templates from a file, and returns them together with the built-in templates.

    The YAML or JSON file maps each name to ``text`` and ``answer_style``. If the name is that of a built-in template,
    missing values are taken from that template.

    Raises:
        ImportError: If the file is YAML and ruamel.yaml is not installed.
        ValueError: If the file does not hold such a mapping. The message names the file and the template.
    """
    path = Path(path)
    entries = _read(path)
    if not isinstance(entries, Mapping):
        raise ValueError(f"{path}: must map names of templates to their settings, got {entries!r}")
    templates = dict(TEMPLATES)
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"{path}: template {name!r} must be a mapping with text and answer_style, got {entry!r}")
        for key in entry:
            if key not in ("text", "answer_style"):
                raise ValueError(
                    f"{path}: template {name!r} must have only the settings text and answer_style, got {key!r}"
                )
        built_in = TEMPLATES.get(name)
        settings = {"text": built_in.text, "answer_style": built_in.answer_style} if built_in else {}
        settings |= entry
        for key in ("text", "answer_style"):
            if key not in settings:
                raise ValueError(f"{path}: template {name!r} must have the setting {key!r}, got {sorted(entry)}")
        try:
            templates[name] = PromptTemplate(name, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
    return templates


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: must be JSON: {error}") from error
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"path must end in .yaml, .yml or .json, got {str(path)!r}")
    try:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError
    except ImportError:
        raise ImportError(f"{path}: YAML needs ruamel.yaml: {install_hint('generate')}, or write JSON") from None
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(f"{path}: must be YAML: {error}") from error


def render(template: PromptTemplate, question: str, options: Sequence[str] | Mapping[str, str] | None = None) -> str:
    """Returns a template with a question and its options filled in. Braces in the question are kept.

    Args:
        template: The template.
        question: The question.
        options: Option texts in the order A, B, ..., or a mapping from letter to text. None removes ``{options}`` from
            the prompt. Use None if the question has no options or already shows its options.

    Raises:
        TypeError: If the question or an option is not a string.
        ValueError: If the question is empty, the template cannot show options, or the options are invalid.
    """
    if not isinstance(question, str):
        raise TypeError(f"question for template {template.name!r} must be a string, got {question!r}")
    if not question.strip():
        raise ValueError(f"question for template {template.name!r} must not be empty, got {question!r}")
    if options is not None and "options" not in _FIELD.findall(template.text):
        raise ValueError(f"template {template.name!r} must hold {{options}} to show options, got {template.text!r}")
    text = template.text
    values = {"question": question}
    if options is None:
        text = re.sub(r"\n?(?<![\w\\])\{options\}", "", text)
    else:
        values["options"] = "\n".join(f"{label}. {option}" for label, option in label_options(options).items())
    return _FIELD.sub(lambda match: values[match.group(1)], text)

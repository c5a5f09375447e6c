"""Checks the variables that a user sets for a chat template, and writes them into an exported template."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from mpo_ext.checks import check_json, did_you_mean, shorten

# Arguments of ``apply_chat_template``. The encoder sets some of them; a chat template sees none of the others.
_ARGUMENTS = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents",
    "load_audio_from_video", "max_length", "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask",
    "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip
# Words of Jinja's language, and names that are defined in every chat template.
_JINJA_NAMES = {
    "and", "caller", "cycler", "dict", "else", "false", "False", "if", "in", "is", "joiner", "kwargs", "lipsum",
    "loop", "namespace", "none", "None", "not", "or", "raise_exception", "range", "self", "strftime_now", "super",
    "true", "True", "varargs",
}  # fmt: skip
_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})")


def check_variables(variables: Mapping[str, Any]) -> None:
    """Checks that ``chat_template_kwargs`` can be variables of a template, and can be written into an exported one.

    Raises:
        TypeError: If a value is not a JSON value.
        ValueError: If a name is not an identifier, or is a word of Jinja or an argument of ``apply_chat_template``.
            Also if a number is not finite.
    """
    for name in variables:
        if not isinstance(name, str) or not (name.isascii() and name.isidentifier()):
            raise ValueError(f"chat_template_kwargs must have names of Jinja variables, got {shorten(name)}")
        if name in _ARGUMENTS:
            raise ValueError(
                f"chat_template_kwargs must hold variables of the chat template alone, got {name!r}, which is an "
                "argument of apply_chat_template"
            )
        if name in _JINJA_NAMES:
            raise ValueError(f"chat_template_kwargs must have names of Jinja variables, got {name!r}, a name of Jinja")
    check_json("chat_template_kwargs", dict(variables))


def bake_variables(template: str, variables: Mapping[str, Any], always_defined: Collection[str] = ()) -> str:
    """Returns the template with default values for ``variables``, such as ``{"enable_thinking": False}``.

    A default is used only if the caller of the template does not set the variable. ``always_defined`` are names, such
    as ``bos_token``, that every caller sets: the values of ``variables`` replace theirs. ``variables`` must pass
    ``check_variables``.
    """
    heads = []
    for name, value in variables.items():
        head = f"{{% set {name} = {_literal(value)} %}}"
        heads.append(head if name in always_defined else f"{{% if {name} is not defined %}}{head}{{% endif %}}")
    # transformers removes the first line break after a block; it must not be the template's own.
    return "".join(heads) + "\n" + template if heads else template


def unused_notice(template: str | None, variables: Mapping[str, Any]) -> str | None:
    """Returns a message that names the variables that the template does not read. None: it reads all variables.

    The result is also None if the template cannot be parsed.
    """
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    # transformers adds the tag ``generation``, which does not change a text.
    plain = _GENERATION_TAG.sub(lambda tag: tag[1] + ("endif" if tag[2] else "if true"), template or "")
    try:
        known = jinja2.meta.find_undeclared_variables(environment.parse(plain))
    except jinja2.TemplateError:
        return None
    unused = [name for name in variables if name not in known]
    if not unused:
        return None
    return (
        f"the chat template does not read these names of chat_template_kwargs: {', '.join(map(repr, unused))}"
        f"{did_you_mean(unused[0], sorted(known - variables.keys()))}"
    )


def _literal(value: Any) -> str:
    """Returns a JSON value as a Jinja expression."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(name)}: {_literal(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)

"""Tests the variables of chat templates: their names, and their values in exported templates."""

# ruff: noqa: E402 - these packages come with an extra
import inspect
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers, which dev installs")

from transformers.utils.chat_template_utils import render_jinja_template

from mpo_ext.chat.variables import bake_variables, check_variables

BODIES = (
    "{{ x | tojson }} {{ x is string }} {{ x is none }} {{ x }}",
    "\n  {% macro write() %}{{ x | tojson }}{% endmacro %}{% for m in messages %}{{ write() }}{% endfor %}\n\n",
    "   {{- x | tojson }}",
)
TEXTS = ("", "😀", "é\u2028", "a\"b'c\\d", "\\x41\\n", "{% raw %}{{ x }}#}", "\r\n\t\x00\x08", "none", "-%}")
VALUES = (
    None,
    True,
    False,
    0,
    -(10**20),
    1e300,
    -2.5e-7,
    1e16,
    3.0,
    *TEXTS,
    list(TEXTS),
    {text: [text] for text in TEXTS},
)


def text_of(template: str, **variables: Any) -> str:
    texts, _ = render_jinja_template([[{"role": "user", "content": "q"}]], chat_template=template, **variables)
    return texts[0]


@pytest.mark.parametrize("body", BODIES)
def test_a_variable_in_an_exported_template_has_the_value_of_training(body: str) -> None:
    for value in VALUES:
        check_variables({"x": value})
        expected = text_of(body, x=value)
        assert text_of(bake_variables(body, {"x": value})) == expected
        assert text_of(bake_variables(body, {"x": value}, ["x"]), x="of the caller") == expected
        assert text_of(bake_variables(body, {"x": value}), x="of the caller") == text_of(body, x="of the caller")
    assert bake_variables(body, {}) == body


def test_the_arguments_of_transformers_are_no_variables() -> None:
    for owner in (transformers.PreTrainedTokenizerBase, transformers.ProcessorMixin):
        for name, parameter in inspect.signature(owner.apply_chat_template).parameters.items():
            if name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
                with pytest.raises(ValueError, match=f"'{name}', which is an argument of apply_chat_template"):
                    check_variables({name: None})

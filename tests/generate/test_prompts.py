import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_ext.answers import extract_answer
from mpo_ext.generate.prompts import TEMPLATES, PromptTemplate, get_template, load_templates, render

# A response in the form that a template of each style asks for, with the answer in it.
RESPONSES = {
    "direct": "Paris",
    "final_answer": "It has the Eiffel Tower.\nFinal answer: Paris",
    "boxed": "It has the Eiffel Tower, so \\boxed{Paris}",
}
REQUESTS = {"direct": "", "final_answer": "Final answer: <answer>", "boxed": "\\boxed{}"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_asks_for_what_its_style_reads(name):
    template = get_template(name)
    assert template.name == name
    assert REQUESTS[template.answer_style] in template.text
    assert extract_answer(RESPONSES[template.answer_style], template.answer_style) == "Paris"
    assert ("Reason" in template.text or "step by step" in template.text) is name.startswith("cot")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_echo_of_the_prompt_is_no_right_answer(name):
    template = get_template(name)
    if template.answer_style != "direct":
        assert extract_answer(render(template, "Which city?"), template.answer_style) != "Paris"


def test_the_grounded_template_names_the_format_of_boxes():
    text = get_template("cot_grounded").text
    assert "<ref>" in text
    assert "<box>[[x1, y1, x2, y2]]</box>" in text
    assert "0 to 1000" in text


def test_the_question_comes_first_so_that_an_image_does():
    for template in TEMPLATES.values():
        assert render(template, "<image>\nWhich city?").startswith("<image>\nWhich city?\n")


def test_options_are_lettered():
    text = render(get_template("direct_letter"), "Which city?", ["Rome", "Paris"])
    assert text == "Which city?\nA. Rome\nB. Paris\n\nReply with the letter of the right option only."
    text = render(get_template("direct_letter"), "Which city?", {"C": "Rome", "E": "Paris"})
    assert text.startswith("Which city?\nC. Rome\nE. Paris\n\n")


def test_without_options_their_line_is_left_out():
    text = render(get_template("direct"), "Which city?")
    assert text == "Which city?\n\nGive a short answer and no explanation."


@given(question=st.text(min_size=1).filter(str.strip), option=st.text())
def test_a_question_comes_through_as_it_is(question, option):
    template = get_template("cot_boxed")
    assert render(template, question).startswith(question + "\n\n")
    assert f"{question}\nA. {option}\n" in render(template, question, [option])


@pytest.mark.parametrize("question", ["{question}", "{options}", "{0}", "{", "f(x) = \\frac{1}{x}", "\\g<0> \\1"])
def test_braces_in_a_question_survive(question):
    for options in (None, ["{question}", "{options}"]):
        text = render(get_template("cot_boxed"), question, options)
        assert text.startswith(question + "\n")
        assert text.count("inside \\boxed{}") == 1
    assert "\nA. {question}\nB. {options}\n" in text


FILES = {
    "yaml": 'direct:\n  text: "{question} Be brief."\nmine:\n  text: |\n    {question}\n    {options}\n    <a>\n'
    '  answer_style: "regex:<a>(.*?)</a>"\n',
    "json": json.dumps(
        {
            "direct": {"text": "{question} Be brief."},
            "mine": {"text": "{question}\n{options}\n<a>\n", "answer_style": "regex:<a>(.*?)</a>"},
        }
    ),
}


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_file_overrides_and_adds(tmp_path, suffix):
    path = tmp_path / f"templates.{suffix}"
    path.write_text(FILES["json" if suffix == "json" else "yaml"])
    templates = load_templates(path)
    assert list(templates) == [*TEMPLATES, "mine"]
    assert templates["direct"] == PromptTemplate("direct", "{question} Be brief.", "direct")
    assert get_template("mine", templates).answer_style == "regex:<a>(.*?)</a>"
    assert templates["cot"] is TEMPLATES["cot"]
    assert TEMPLATES["direct"].text != "{question} Be brief."
    assert render(templates["mine"], "Q", ["x"]) == "Q\nA. x\n<a>\n"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([1], "must map names of templates"),
        ({"x": "text"}, "template 'x' must be a mapping"),
        ({"x": {"text": "{question}"}}, "template 'x' must have the setting 'answer_style'"),
        ({"x": {"answer_style": "direct"}}, "template 'x' must have the setting 'text'"),
        ({"x": {"text": "{question}", "style": "direct"}}, "template 'x' must have only the settings .*, got 'style'"),
        ({"x": {"text": "no field", "answer_style": "direct"}}, "template 'x' must hold {question} once"),
        ({"x": {"text": "{question} {qestion}", "answer_style": "direct"}}, "template 'x' .*got {qestion}"),
        ({"x": {"text": "{question}{question}", "answer_style": "direct"}}, "template 'x' must hold {question} once"),
        ({"x": {"text": "{question}", "answer_style": "last"}}, "answer_style of template 'x' must be one of"),
        ({"x": {"text": 5, "answer_style": "direct"}}, "text of a template must be a string, got 5"),
        ({"cot": {"text": " "}}, "text of a template must not be empty"),
    ],
)
def test_a_wrong_file_is_named_with_the_template(tmp_path, entries, message):
    path = tmp_path / "templates.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=rf"templates\.json: .*{message}|templates\.json: {message}"):
        load_templates(path)


@pytest.mark.parametrize(("name", "text"), [("t.json", "{"), ("t.yaml", "a: [1"), ("t.txt", "")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}.*must be|must end in \.yaml, \.yml or \.json, got .*{name}"):
        load_templates(tmp_path / name)


def test_errors_name_template_and_field():
    with pytest.raises(ValueError, match="got 'dirct'; did you mean 'direct'"):
        get_template("dirct")
    with pytest.raises(ValueError, match="question for template 'cot' must not be empty"):
        render(get_template("cot"), " ")
    with pytest.raises(TypeError, match="question for template 'cot' must be a string, got None"):
        render(get_template("cot"), None)
    plain = PromptTemplate("plain", "{question}", "direct")
    with pytest.raises(ValueError, match=r"template 'plain' must hold \{options\}"):
        render(plain, "Q", ["x"])
    with pytest.raises(ValueError, match="options must hold 1 to 26 texts, got 0"):
        render(get_template("cot"), "Q", [])

"""Tests questions in the formats of published benchmarks.

Images, options and answers are read, or the question is refused.
"""

import base64
import bz2
import csv
import dataclasses
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from stub_engine import StubEngine

from mpo_ext.chat import IMAGE_PLACEHOLDER
from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
from mpo_ext.generate.dropout_ntp import WRONG_CHOSEN, DropoutNTP
from mpo_ext.generate.items import WRONG_SAMPLE, Item, item_files, open_items, read_items
from mpo_ext.generate.runner import check_run, run


def picture(color: str = "red", form: str = "PNG") -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, form)
    return buffer.getvalue()


def in_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


NAN = float("nan")
RED, BLUE = picture("red"), picture("blue")
RED_URL, BLUE_URL = (f"data:image/png;base64,{in_base64(content)}" for content in (RED, BLUE))

MMMU = {
    "id": "validation_Art_1", "question": "Which of <image 1> and <image 2> is older?", "explanation": "",
    "image_1": "a.png", "image_2": "b.png", "image_3": None, "img_type": "['Paintings']",
    "options": "['the \"first\"', \"it's <image 2>\", '3, 4']",
    "answer": "B", "topic_difficulty": "Easy", "question_type": "multiple-choice", "subfield": "Art",
}  # fmt: skip
MATHVISTA = {
    "pid": "1", "question": "How long is AB?", "image": "images/1.jpg", "decoded_image": {"bytes": RED, "path": None},
    "choices": None, "unit": "cm", "precision": 1.0, "answer": "1.2", "question_type": "free_form",
    "answer_type": "float", "metadata": {"img_height": 4, "img_width": 4}, "query": "Hint: ... How long is AB?",
}  # fmt: skip
M3COT = {
    "id": "physical-1", "category": "heat", "image_id": "physical-1", "question": "Which is warmer?", "image": "a.png",
    "choices": ["the left", "the right"], "context": "Two bodies touch.", "answer": "A", "rationale": "...",
}  # fmt: skip
SCIENCEQA = {
    "question": "Which ocean is it?", "choices": ["the Arctic Ocean", "the Indian Ocean"], "answer": 1, "hint": "",
    "image": {"bytes": RED, "path": "image.png"}, "task": "closed choice", "grade": "grade4", "lecture": "Oceans ...",
}  # fmt: skip
CHARTQA = {"imgname": "41.png", "query": "What is the highest bar?", "label": "14"}
POPE = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a car?", "label": "yes"}
POPE_TABLE = {
    "id": "0", "question_id": "1", "question": "Is there a car?", "answer": "no", "category": "random",
    "image_source": "COCO_val2014_000000310196", "image": {"bytes": RED, "path": None},
}  # fmt: skip
MMBENCH = {
    "index": "241", "question": "What is shown?", "hint": "Look well.", "A": "a cat", "B": "None", "C": "a dog",
    "D": "", "answer": "B", "category": "coarse", "image": in_base64(RED), "l2-category": "x", "split": "dev",
}  # fmt: skip


def read(values: dict[str, Any]) -> Item:
    item = Item.from_dict(values)
    assert item.problem is None, item.problem
    return item


def test_mmmu() -> None:
    item = read(MMMU)
    assert item.question == "Which of <image> and <image> is older?"
    assert item.extra["options"] == ['the "first"', "it's <image>", "3, 4"]
    assert item.images == ("a.png", "b.png", "b.png")  # in the order of the marks, of which the last is in an option
    assert (item.truths, item.extra["img_type"], item.extra["id"]) == (("B",), "['Paintings']", "validation_Art_1")
    assert not {"image_1", "image_2", "image_3"} & set(item.extra)


def test_open_questions_of_mmmu_may_have_several_answers() -> None:
    values = {**MMMU, "question_type": "open", "options": "[]", "question": "<image 1>, <image 2>?"}
    assert read({**values, "answer": "['24/7', '3.429']"}).truths == ("24/7", "3.429")
    assert read({**values, "answer": "[1, 2"}).truths == ("[1, 2",)
    assert read({**values, "answer": "7"}).options is None
    assert read({**values, "answer": "?"}).truths == ()  # the test split


def test_images_that_no_mark_names_come_first() -> None:
    item = read({**MMMU, "question": "Like <image 2>?", "options": "['a', 'b']"})
    assert (item.question, item.images) == ("<image>\nLike <image>?", ("a.png", "b.png"))
    assert read({**MMMU, "question": "Like?", "options": "['a', 'b']"}).images == ("a.png", "b.png")
    listed = {"question": "<image 2> or <image 1>?", "images": ["a.png", "b.png"], "answer": "x"}
    assert read(listed).images == ("b.png", "a.png")


def test_mathvista() -> None:
    item = read(MATHVISTA)
    assert (item.question, item.images, item.truths, item.options) == ("How long is AB?", (RED_URL,), ("1.2",), None)
    assert (item.extra["precision"], item.extra["unit"]) == (1.0, "cm")
    assert read({**MATHVISTA, "decoded_image": None}).images == ("images/1.jpg",)
    choice = read({**MATHVISTA, "choices": ["longer", "shorter"], "answer": "shorter"})
    assert (choice.extra["options"], choice.truths) == (["longer", "shorter"], ("shorter",))


def test_m3cot() -> None:
    item = read(M3COT)
    assert (item.question, item.truths) == ("Two bodies touch.\nWhich is warmer?", ("A",))
    assert (item.extra["options"], item.extra["image_id"]) == (["the left", "the right"], "physical-1")


def test_scienceqa() -> None:
    item = read(SCIENCEQA)
    assert (item.truths, item.images, item.question) == (("B",), (RED_URL,), "Which ocean is it?")
    assert read({**SCIENCEQA, "image": None}).images == ()
    assert read({**SCIENCEQA, "hint": "It is warm."}).question == "It is warm.\nWhich ocean is it?"
    assert read({"question": "Why?", "context": "It is warm.", "answer": "7"}).question == "It is warm.\nWhy?"
    same = {"question": "Q?", "answer": 5, "options": ["5", "5"]}
    assert (
        Item.from_dict(same).problem
        == Item.from_dict({**SCIENCEQA, "answer": 2}).problem
        == ("answer must be a letter or the text of an option: a number may be an index from 0 or from 1")
    )


@pytest.mark.parametrize(
    ("fields", "before"),
    [
        ({"context": "", "hint": "It rains."}, "It rains.\n"),
        ({"context": " ", "hint": "It rains."}, "It rains.\n"),
        ({"context": "nan", "hint": "It rains."}, "It rains.\n"),
        ({"context": "A map.", "hint": ""}, "A map.\n"),
        ({"context": "A map.", "hint": "It rains."}, "A map.\nIt rains.\n"),
        ({"context": "It rains.", "hint": "It rains."}, "It rains.\n"),
        ({"context": "Which", "hint": ""}, "Which\n"),
    ],
)
def test_context_and_hint_stand_before_the_question(fields: dict[str, str], before: str) -> None:
    item = read({**SCIENCEQA, **fields})
    assert item.question == f"{before}Which ocean is it?"
    for template in (None, "cot"):  # an unsolved item is read again
        pipeline = Correctness(CorrectnessConfig(samples=2, template=template))
        line = {**item.to_dict(), "question": pipeline.questions.prompt(item)}
        again = read(line)
        assert again.question == pipeline.questions.prompt(item)
        assert again.question_with_options == again.question


def test_chartqa() -> None:
    item = read(CHARTQA)
    assert (item.question, item.images, item.truths) == ("What is the highest bar?", ("41.png",), ("14",))
    table = {"image": {"bytes": RED, "path": "41.png"}, "query": "What?", "label": ["14"], "human_or_machine": 0}
    assert (read(table).images, read(table).truths) == ((RED_URL,), ("14",))


def test_pope() -> None:
    item = read(POPE)
    assert (item.question, item.truths, item.images) == (
        "Is there a car?",
        ("yes",),
        ("COCO_val2014_000000310196.jpg",),
    )
    assert (read(POPE_TABLE).truths, read(POPE_TABLE).images) == (("no",), (RED_URL,))
    source = {"question": "Q?", "answer": "no", "image_source": "COCO_val2014_000000310196"}
    assert Item.from_dict(source).problem == "image must be given: image_source names no file"
    assert read({**source, "image_source": "a.jpg"}).images == ("a.jpg",)


def test_mmbench() -> None:
    item = read(MMBENCH)
    assert item.extra["options"] == ["a cat", "None", "a dog"]
    assert (item.question, item.images, item.truths) == ("Look well.\nWhat is shown?", (RED_URL,), ("B",))
    assert Item.from_dict({**MMBENCH, "image": "240"}).problem == (
        "image refers to the image of another row: write that image into this row"
    )
    assert Item.from_dict({**MMBENCH, "C": "", "D": "x"}).problem == "option D stands after an empty option"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["x", "y"], (("A", "x"), ("B", "y"))),
        ("['x', 'y']", (("A", "x"), ("B", "y"))),
        ('["x", "y"]', (("A", "x"), ("B", "y"))),
        ("('x', 'y')", (("A", "x"), ("B", "y"))),
        ({"a": "x", "c": "y"}, (("A", "x"), ("C", "y"))),
        ("{'a': 'x', 'b': 'y'}", (("A", "x"), ("B", "y"))),
        ({"text": ["x", "y"], "label": ["A", "B"]}, (("A", "x"), ("B", "y"))),
        ([1, 2.5], (("A", "1"), ("B", "2.5"))),
        ("['x' 'y']", (("A", "x"), ("B", "y"))),  # a numpy array
        ("['x' \"y's\"\n 'z']", (("A", "x"), ("B", "y's"), ("C", "z"))),
        ("['x']", (("A", "x"),)),
        ([], None),
        ("[]", None),
        ("", None),
        (None, None),
        ({}, None),
    ],
)
def test_options_that_are_read(options: Any, expected: Any) -> None:
    assert read({"question": "Q?", "answer": "A", "options": options}).options == expected


@pytest.mark.parametrize(
    "options",
    [
        "a cat", "A. cat B. dog", 7, True, [None], [["x"]], [{"a": 1}], {"1": "x"}, {"a": "x", "A": "y"}, ["x"] * 27,
        {"text": ["x"], "label": []}, {"text": "x", "label": "A"}, "'a cat'", "[1, [2]]", {"AB": "x"},
        "['x', 'y' 'z']", "['x''y']", "('x' 'y')", "{'a': 'x' 'y'}", "[1 2]", "['x' 1]",
    ],
)  # fmt: skip
def test_options_that_are_refused(options: Any) -> None:
    problem = Item.from_dict({"question": "Q?", "answer": "A", "options": options}).problem
    assert problem is not None
    assert problem.startswith("options must ")
    assert len(problem) < 100


@pytest.mark.parametrize("form", ["{}. {}", "({}) {}", "{}) {}", "{}: {}"])
def test_letters_in_options_are_removed(form: str) -> None:
    def lettered(*letters: str) -> list[str]:
        return [form.format(letter, text) for letter, text in zip(letters, ("cat", "dog", "cow"), strict=True)]

    item = read({"question": "Q?", "answer": "B", "options": lettered("A", "B", "C")})
    assert item.question_with_options == "Q?\nA. cat\nB. dog\nC. cow"
    labelled = dict(zip("ABC", lettered("A", "B", "C"), strict=True))
    assert read({"question": "Q?", "answer": "B", "options": labelled}).options == item.options
    assert read({"question": "Q?", "answer": form.format("B", "dog"), "options": labelled}).options == item.options
    problem = Item.from_dict({"question": "Q?", "answer": "B", "options": lettered("B", "A", "C")}).problem
    assert problem == "options must have texts whose letters are in order, such as 'A. cat' before 'B. dog'"
    names = lettered("A", "B", "N")
    assert read({"question": "Q?", "answer": "B", "options": names}).extra["options"] == names


@pytest.mark.parametrize(
    ("options", "answer", "truth"),
    [(["3", "5"], 5, "B"), (["0", "1"], 0, "A"), (["x", "y"], "B", "B"), (["x", "y"], "y", "y")],
)
def test_answers_that_are_read(options: list[str], answer: Any, truth: str) -> None:
    assert read({"question": "Q?", "answer": answer, "options": options}).truths == (truth,)


@pytest.mark.parametrize(("options", "answer"), [(["x", "y"], 1), (["1", "0"], 1), (["x", "y"], 7), (["x", "y"], -1)])
def test_numbers_that_may_be_an_index_or_an_option_are_refused(options: list[str], answer: int) -> None:
    problem = Item.from_dict({"question": "Q?", "answer": answer, "options": options}).problem
    assert problem is not None
    assert problem.startswith("answer must be a letter")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"video_path": "a.mp4"}, "video_path"),
        ({"videos_1": ["a.mp4"]}, "videos_1"),
        ({"picture": "somewhere"}, "picture"),
        ({"img": "a.png"}, "img"),
        ({"photo_1": "x"}, "photo_1"),
        ({"image_file": "a.png"}, "image_file"),
        ({"file_name": "a.jpeg"}, "file_name"),
        ({"figure_path": "b.webp"}, "figure_path"),
        ({"content": RED}, "content"),
        ({"thing": {"bytes": RED, "path": None}}, "thing"),
        ({"thing": RED_URL}, "thing"),
        ({"left_image": "a"}, "left_image"),
        ({"media": "a.png"}, "media"),
        ({"media": [{"type": "image", "url": "b/a.jpg"}]}, "media"),
        ({"visual": "a.webp"}, "visual"),
        ({"figure": "a.png"}, "figure"),
        ({"diagram": ["a.png"]}, "diagram"),
        ({"screenshot": "https://a/b.png"}, "screenshot"),
        ({"figure": in_base64(RED)}, "figure"),
        ({"pixels": [[1, 2], [3, 4]]}, "pixels"),
    ],
)
def test_unknown_images_refuse_the_item_by_name(fields: dict[str, Any], field: str) -> None:
    problem = Item.from_dict({"question": "Q?", "answer": "7", **fields}).problem
    assert problem == f"the field {field!r} looks like an image, and is not read: name it image or images"


@pytest.mark.parametrize("image", [RED_URL, {"bytes": RED, "path": None}, "train/a.jpeg"])
def test_file_name_beside_an_image_names_the_image(image: Any) -> None:
    item = read({"question": "Q?", "answer": "7", "image": image, "file_name": "a.jpeg"})
    assert (len(item.images), item.extra) == (1, {"file_name": "a.jpeg"})
    problem = Item.from_dict({"question": "Q?", "answer": "7", "image": image, "file_name": RED_URL}).problem
    assert problem == "the field 'file_name' looks like an image, and is not read: name it image or images"


@pytest.mark.parametrize(
    "fields",
    [
        {"image_id": "7", "image_source": "COCO", "image": "a.png"}, {"img_type": "['Plots']"}, {"image_width": 4},
        {"image_1_license": "CC BY 4.0"}, {"num_images": 2}, {"video_id": None}, {"img": ""}, {"has_image": True},
        {"rationale": "See a.png."}, {"source": "figures of a book"}, {"imagination": "x"},
        {"figure": "Figure 2"}, {"media": "print"}, {"visual": True}, {"option_count": 4}, {"choice_type": "single"},
        {"options_format": "text"}, {"choices_a": None}, {"A": "only one"},
        {"a": "1", "b": "2"}, {"a": "only one"},
    ],
)  # fmt: skip
def test_other_fields_are_kept(fields: dict[str, Any]) -> None:
    item = read({"question": "Q?", "answer": "7", **fields})
    assert {**item.extra, **({"image": "a.png"} if item.images else {})} == fields


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"image": "a.png", "images": ["b.png"]}, "images must be given once, got images and image with other images"),
        ({"image": "a.png", "image_1": "b.png"}, "images must be given once, got image_1 and image"),
        ({"question": "<image 2>?", "image_1": "a.png"}, "<image 2> must have an image with this number"),
        ({"question": "<image>?"}, "number of <image> is not that of the images"),
        ({"image": b"no image at all"}, "image must be PNG, JPEG, GIF, WebP, BMP or TIFF, got other bytes"),
        ({"options": ["a", "b"], "choices": ["a", "c"]}, "options and choices differ"),
        ({"answer": {"text": "7"}}, "answer must be a text or a list of texts"),
        ({"answer": [["7"]]}, "answer must hold texts"),
        ({"answer": True}, "answer must be a text: true and false may also mean yes and no"),
        ({"answer": ["7", False]}, "answer must be a text: true and false may also mean yes and no"),
        ({"answer": "['7', 'seven']"}, "answer must be a text or a list of texts, got a list written as text"),
        ({"answer_gt": "8"}, "the true answer must be given once, got answer_gt and answer with other texts"),
        ({"answer": None, "answers": [{"answer": "7"}]}, "answers must hold texts"),
        ({"answer": None, "answers": {"text": ["7"]}}, "answers must be a text or a list of texts"),
        ({"answer": None, "label": 1}, "label must be a text: 0 and 1 may also mean no and yes"),
        ({"answer": None, "label": False}, "label must be a text: 0 and 1 may also mean no and yes"),
        (
            {"a": "x", "b": "y", "answer": "B"},
            "the fields 'a' and 'b' look like options, and are not read: name them A and B",
        ),
        ({"chosen": 7}, "chosen must be text or a list of messages"),
        ({"chosen": True}, "chosen must be text or a list of messages"),
        ({"question": "nan"}, "no question"),
        ({"question": NAN}, "no question"),
        ({"options": ["<image>", "b"], "answer": "A"}, "number of <image> is not that of the images"),
        (
            {"options": ["B", "A"], "answer": "B"},
            "answer must be a letter or the text of an option: this letter is also another option's text",
        ),
    ],
)
def test_items_that_would_be_asked_in_another_way_are_refused(values: dict[str, Any], problem: str) -> None:
    assert Item.from_dict({"question": "Q?", "answer": "7", **values}).problem == problem


@pytest.mark.parametrize(
    ("form", "mime"), [("JPEG", "jpeg"), ("GIF", "gif"), ("WEBP", "webp"), ("BMP", "bmp"), ("TIFF", "tiff")]
)
def test_image_bytes_of_all_formats(form: str, mime: str) -> None:
    content = picture(form=form)
    url = f"data:image/{mime};base64,{in_base64(content)}"
    assert read({"question": "Q?", "image": content}).images == (url,)
    assert read({"question": "Q?", "image": in_base64(content)}).images == (url,)
    assert read({"question": "Q?", "images": [content, RED]}).images == (url, RED_URL)


def test_an_open_image_becomes_a_data_url() -> None:
    from PIL import Image

    (url,) = read({"question": "Q?", "decoded_image": Image.new("RGB", (4, 4), "red")}).images
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


# ---- Other names of options and marks


@pytest.mark.parametrize("name", ["choice_{}", "option_{}", "op{}"])
def test_options_in_fields_of_their_own(name: str) -> None:
    fields = dict(zip(map(name.format, "abcd"), ("a cat", "a dog", "nan", ""), strict=True))
    item = read({"question": "Q?", "answer": "B", **fields})
    assert (item.options, item.truths) == ((("A", "a cat"), ("B", "a dog")), ("B",))
    assert set(item.extra) == {"options"}
    numbers = dict(zip(map(name.format, "abc"), (1, 2, 3), strict=True))
    assert read({"question": "Q?", "answer": "C", **numbers}).extra == {"options": ["1", "2", "3"]}
    problem = Item.from_dict({"question": "Q?", "answer": "D", **fields, name.format("d"): "x"}).problem
    assert problem == "option D stands after an empty option"


def test_candidates_are_options() -> None:
    assert read({"question": "Q?", "answer": "B", "candidates": ["x", "y"]}).extra == {"options": ["x", "y"]}
    assert read({"question": "Q?", "answer": "B", "candidates": "['x' 'y']"}).extra == {"options": ["x", "y"]}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"answer_choices": ["x", "y"]}, "answer_choices"), ({"Options": "A. x B. y"}, "Options"),
        ({"option_1": "x", "option_2": "y"}, "option_1"), ({"choice1": "x"}, "choice1"),
        ({"answerOptions": {"A": "x"}}, "answerOptions"), ({"mc_candidates": ["x"]}, "mc_candidates"),
        ({"distractor1": "x"}, "distractor1"), ({"endings": ["x", "y"]}, "endings"), ({"choice_a": "x"}, "choice_a"),
    ],
)  # fmt: skip
def test_unknown_options_refuse_the_item_by_name(fields: dict[str, Any], field: str) -> None:
    problem = Item.from_dict({"question": "Q?", "answer": "A", **fields}).problem
    assert problem == f"the field {field!r} looks like options, and is not read: name it options"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"Answer": "7"}, "Answer"), ({"ground_truth": 7}, "ground_truth"), ({"answer ": "7"}, "answer "),
        ({"final_answer": ["7", "seven"]}, "final_answer"), ({"correctAnswer": "7"}, "correctAnswer"),
        ({"answer": "", "gt": "7"}, "gt"), ({"reference_answer": "7"}, "reference_answer"),
        ({"answer_index": 1}, "answer_index"),
    ],
)  # fmt: skip
def test_an_unknown_true_answer_refuses_the_item_by_name(fields: dict[str, Any], field: str) -> None:
    problem = Item.from_dict({"question": "Q?", **fields}).problem
    assert problem == f"the field {field!r} looks like a true answer, and is not read: name it answer_gt"
    assert read({"question": "Q?", **fields, "answer": "8"}).truths == ("8",)


@pytest.mark.parametrize(
    "fields",
    [
        {"answer_type": "float"}, {"num_answers": 3}, {"answer_format": "text"}, {"is_answerable": True},
        {"solution": "See above."}, {"chosen_answer": "7"}, {"ground_truth": ""}, {"target": None}, {"gt": [[1, 2]]},
        {"answered": "yes"}, {"final_answer": []}, {"answer_length": 4},
    ],
)  # fmt: skip
def test_other_fields_are_no_true_answer(fields: dict[str, Any]) -> None:
    item = read({"question": "Q?", **fields})
    assert (item.truths, item.extra) == ((), fields)


def test_missing_values_of_pandas_are_missing() -> None:
    assert read({"question": "Q?", "chosen": "nan"}).chosen is None
    assert read({"question": NAN, "query": "Q?", "chosen": NAN}).question == "Q?"
    assert read({"question": "Q?", "system": "nan", "history": "nan", "tools": NAN}).messages == ()
    item = read({**MMBENCH, "hint": "nan", "C": "nan", "D": "nan", "answer": "A"})
    assert (item.question, item.extra["options"]) == ("What is shown?", ["a cat", "None"])
    assert Item.from_dict({**MMBENCH, "C": "nan", "D": "a cow"}).problem == "option D stands after an empty option"
    assert read({**MMBENCH, "answer": "nan"}).truths == ()
    assert [read({"question": "Q?", "options": text}).options for text in ("nan", " ", "")] == [None] * 3
    assert read({"question": "Q?", "answer": "7", "image": "nan", "context": "NaN"}).images == ()


@pytest.mark.parametrize(
    ("fields", "truth"),
    [
        ({"choices": ["x", "y"], "answer": "1"}, "B"), ({"choices": "['x' 'y']", "answer": " 0"}, "A"),
        ({"choices": ["3", "5"], "answer": "5"}, "5"), ({"choices": ["0", "1"], "answer": "1"}, "1"),
        ({"options": ["3", "1"], "answer": "1"}, "1"), ({"options": ["x", "y"], "answer": "(b)"}, "(b)"),
        ({"choices": ["x", "y"], "answer": "1.0"}, "B"), ({"choices": ["x", "y"], "answer": ["1"]}, "B"),
        ({"choices": {"A": "x", "C": "y"}, "answer": "1"}, "C"), ({"options": ["-1", "y"], "answer": "-1"}, "-1"),
        ({"options": ["x", "y"], "answer": "A, B"}, "A, B"), ({"options": ["x", "D"], "answer": "D"}, "D"),
    ],
)  # fmt: skip
def test_answers_as_text_with_options(fields: dict[str, Any], truth: str) -> None:
    assert read({"question": "Q?", **fields}).truths == (truth,)


@pytest.mark.parametrize(
    "fields",
    [
        {"choices": ["1", "0"], "answer": "1"}, {"options": ["x", "y"], "answer": "1"},
        {"choices": ["x", "y"], "answer": "2"}, {"choice_a": "x", "choice_b": "y", "answer": "0"},
        {"options": ["x", "y"], "answer": "C"}, {"options": ["x", "y"], "answer": "(d)."},
        {"options": ["x", "y"], "answer": 1.0}, {"choices": ["x", "y"], "answer": "-1"},
        {"choices": ["x"], "answer": ["1"]},
        {"options": {"A": "x", "B": "y"}, "answer": "1"}, {"choices": ["1", "0"], "answer": ["0"]},
        {"options": {"A": "x", "C": "y"}, "answer": "B"}, {"options": ["x", "y"], "answer": "A, C"},
        {"options": ["x", "y"], "answer": ["A", "E"]},
    ],
)  # fmt: skip
def test_answers_that_name_no_option_are_refused(fields: dict[str, Any]) -> None:
    problem = Item.from_dict({"question": "Q?", **fields}).problem
    assert problem is not None
    assert problem.startswith("answer must be a letter or the text of an option")


@pytest.mark.parametrize("mark", ["<image {}>", "<image{}>", "<image_{}>", "<|image_{}|>", "<Image {}>", "<img_{}>"])
def test_marks_with_numbers(mark: str) -> None:
    question = f"Is {mark.format(2)} like {mark.format(1)}?"
    item = read({"question": question, "images": ["a.png", "b.png"], "answer": "7"})
    assert (item.question, item.images) == ("Is <image> like <image>?", ("b.png", "a.png"))
    vision = {"question": f"What is it?\n{mark.format(1)}", "image": "images/1.jpg", "decoded_image": {"bytes": RED}}
    assert (read(vision).question, read(vision).images) == ("What is it?\n<image>", (RED_URL,))
    options = {"question": "Which?", "images": ["a.png"], "options": [mark.format(1), "none"], "answer": "A"}
    assert read(options).extra["options"] == ["<image>", "none"]
    for fields in ({}, {"images": ["a.png"]}):
        problem = Item.from_dict({"question": question, "answer": "7", **fields}).problem
        assert problem == f"{mark.format(2)} must have an image with this number"


@pytest.mark.parametrize(
    "mark", ["<Image>", "<|image_pad|>", "[IMG]", "<image_placeholder>", "<IMG_CONTEXT>", "<img>a.png</img>"]
)
def test_marks_of_other_programs_are_refused(mark: str) -> None:
    problem = f"the question must mark images by <image> or <image 1>, got {mark!r}"
    values = {"question": f"What is {mark}?", "image": "a.png", "answer": "7"}
    turns = [{"role": "user", "content": f"{mark}"}, {"role": "assistant", "content": "Yes."}]
    for changes in (
        {}, {"image": None}, {"question": "Q?", "options": [mark, "none"], "answer": "A"},
        {"question": "Q?", "messages": [*turns, {"role": "user", "content": "Q?"}]},
    ):  # fmt: skip
        assert Item.from_dict({**values, **changes}).problem == problem


# ---- Tables


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
def test_tables_of_text(tmp_path: Path, suffix: str) -> None:
    rows = [{**MMBENCH, "question": 'A "quoted"\tquestion,\nin two lines?'}, {**MMBENCH, "image": in_base64(BLUE)}]
    path = write_tsv(tmp_path / f"bench{suffix}", rows)
    source = open_items(path)
    first, second = source.items()
    assert source.count == 2
    assert first.question == 'Look well.\nA "quoted"\tquestion,\nin two lines?'
    assert first.extra["options"][1] == "None"  # a text, not a missing value
    assert second.images == (BLUE_URL,)


def test_a_row_with_too_few_or_too_many_values_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.tsv"
    path.write_text("question\tanswer\nQ1\t7\nQ2\nQ3\t7\t8\n")
    assert [item.problem for item in read_items(item_files(path))] == [None, "unreadable line", "unreadable line"]


@pytest.mark.parametrize("extra", [{}, {"system": "Be brief."}])
def test_a_row_without_question_names_its_fields(extra: dict[str, str], tmp_path: Path) -> None:
    row = {"image": {"bytes": RED, "path": None}, "instruction": "How many?", "answer": "7", **extra}
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow, which dev installs")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([row]), tmp_path / "d.parquet")
    for (item,) in (read_items(item_files(tmp_path / "d.parquet")), [Item.from_dict(row)]):
        assert item.problem == "no question"
        names = ", ".join(map(repr, row))
        assert item.detail == f"the question must be in 'question', or in 'messages'; the fields are {names}"
    with pytest.raises(ValueError, match=r"no question \(the question must be in 'question'"):
        check_run(Correctness(CorrectnessConfig()), tmp_path / "d.parquet", tmp_path / "out")
    rows = [row | {"question": "Q?"}, row]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    for pipeline in (Correctness(CorrectnessConfig()), DropoutNTP()):
        summary = run(pipeline, StubEngine(), tmp_path / "e.parquet", tmp_path / pipeline.name)
        assert summary.skipped["no question"] == 1
        assert "'instruction'" in summary.examples["no question"]


def test_the_names_of_many_fields_are_cut() -> None:
    detail = Item.from_dict({f"field {number}": 1 for number in range(1000)}).detail
    assert detail is not None
    assert len(detail) < 600
    assert detail.endswith(" ...")


def test_parquet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets, which dev installs")
    from PIL import Image

    rows = {
        "question": ["Like <image 1>?", "Which?"],
        "options": ["['a', 'b']", "[]"],
        "answer": ["A", "7"],
        "image_1": [Image.new("RGB", (4, 4), "red"), None],
        "precision": [1.0, float("nan")],
    }
    features = datasets.Features(
        {name: datasets.Image() if name == "image_1" else datasets.Value("string") for name in rows}
        | {"precision": datasets.Value("float64")}
    )
    path = tmp_path / "bench.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    source = open_items(path)
    first, second = source.items()
    assert source.count == 2
    assert (first.question, first.extra["options"], first.truths) == ("Like <image>?", ["a", "b"], ("A",))
    assert first.images[0].startswith("data:image/png;base64,")
    assert (second.problem, second.images, second.extra) == (None, (), {"precision": None})
    assert open_items(path, limit=1).count == 1


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bench.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"bench\.parquet must be a Parquet file"):
        open_items(path)


# ---- Files in other forms

ROWS = [{"question": f"Gro\u00df: {number}?", "answer": str(number)} for number in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)), ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES.encode())), ("a.csv.gz", gzip.compress(TABLE.encode(), mtime=0)),
        ("a.jsonl", LINES.encode("utf-16")), ("a.csv", TABLE.encode("utf-16")), ("a.jsonl", LINES.encode("utf-8-sig")),
        ("a.json", json.dumps(ROWS).encode()), ("a.json", json.dumps(ROWS, indent=1).encode("utf-16")),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)), ("a.csv", TABLE.encode("utf-8-sig")),
        ("a.tsv", TABLE.replace(",", "\t").encode("utf-16")),
    ],
)  # fmt: skip
def test_files_in_other_forms(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    source = open_items(tmp_path / name)
    assert source.count == 3
    assert [(item.question, *item.truths) for item in source.items()] == [tuple(row.values()) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.jsonl", json.dumps(ROWS).encode(), "with a JSON array: give it the suffix .json"),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), "with a JSON array: give it the suffix .json"),
        ("a.jsonl", b"PK\x03\x04 zip", "a zip file"), ("a.csv", b"PK\x03\x04 zip", "a zip file"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd zstd", "zstd"),
        ("a.csv", TABLE.encode("latin-1"), "convert it with iconv"),
        ("a.csv", TABLE.encode("utf-16-le"), "text in UTF-8"),
        ("a.jsonl", gzip.compress(LINES.encode(), mtime=0)[:-9], "complete"),
        ("a.json", b"[{}, ", "item 2 is not JSON"),
        ("a.csv", b'question,answer\n"a"b,7\n', "a table of text in UTF-8"),
        ("a.csv", b"question,answer,answer\nHow many?,7,8\n", "with 'answer' twice"),
        ("a.tsv", b"A\tquestion\tA\na\tHow many?\tb\n", "with 'A' twice"),
    ],
)  # fmt: skip
def test_files_that_are_not_read_name_the_cause(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(cause)):
        open_items(tmp_path / name)


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.encode("latin-1"))
    assert {item.problem for item in open_items(path).items()} == {"a line must be text in UTF-8"}


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv"])
def test_lists_and_messages_in_cells_are_read(tmp_path: Path, name: str) -> None:
    row = {"images": '["a.png", "b.png"]', "chosen": '{"role": "assistant", "content": "Two."}', "id": "[1]",
           "messages": '[{"role": "user", "content": "<image> or <image>?"}]', "answer": "7"}  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), dialect="excel-tab" if name == "a.tsv" else "excel")
    writer.writeheader()
    writer.writerow(row)
    content = text.getvalue().encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (item,) = open_items(tmp_path / name).items()
    assert (item.problem, item.question, item.images) == (None, "<image> or <image>?", ("a.png", "b.png"))
    assert (item.chosen, item.truths, item.extra) == ("Two.", ("7",), {"id": "[1]"})


def test_a_repeated_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"question": "Q", "answer": "7", "answer": "8"}', '{"question": "Q", "meta": {"a": 1, "a": 2}}']
    path.write_text("\n".join([*lines, '{"question": "Q", "answer": "7"}']))
    problem = "a line must have each field once"
    assert [item.problem for item in open_items(path).items()] == [problem, problem, None]
    (tmp_path / "a.csv").write_text("question,,answer,\nQ,,7,\n")  # columns without a name
    assert [item.truths for item in open_items(tmp_path / "a.csv").items()] == [("7",)]


# ---- Runs


def test_a_bad_item_does_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    good = {"question": "How many?", "answer": "7", "image": "a.png"}
    bad: list[dict[str, Any]] = [
        {**good, "options": ["x"] * 27}, {**good, "options": {"1": "x"}}, {**good, "options": "no list"},
        {**good, "clip_path": "a.mp4"}, {**good, "choices": ["x", "y"], "answer": 5}, {**good, "image": ["a.png", 7]},
    ]  # fmt: skip
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in [good, *bad, good]))
    pipeline = Correctness(CorrectnessConfig(samples=4, template="cot"))
    engine = StubEngine()
    summary = run(pipeline, engine, path, tmp_path / "out", image_root=str(tmp_path), stream=None)
    assert summary.items == 8
    assert len(engine.requests) == 8
    assert all(len(request.images) == 1 for request in engine.requests)
    assert (
        sum(summary.skipped[reason] for reason in summary.skipped if reason.startswith(("options", "the field"))) == 4
    )


def test_images_in_options_are_shown(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(RED)
    item = Item.from_dict(MMMU, image_root=str(tmp_path))
    for template in ("cot", None):
        pipeline = Correctness(CorrectnessConfig(samples=2, template=template))
        engine = StubEngine()
        (records,) = pipeline.sample([item], engine)
        assert {record.get("problem") for record in records} == {None}
        for request in engine.requests:
            assert request.question.count(IMAGE_PLACEHOLDER) == len(request.images) == 3


TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image> Which?"}]


@pytest.mark.parametrize(
    "values",
    [
        MMMU,
        {"question": "Which?", "images": ["a.png"], "options": ["<image>", "none"], "answer": "A"},
        {"messages": TURNS, "images": ["a.png", "b.png"], "options": ["<image>", "none"], "answer": "A"},
    ],
)
def test_a_question_that_shows_images_in_its_options_needs_no_more_images(values: dict[str, Any]) -> None:
    """Tests lines such as those of unsolved.jsonl, whose question shows the options."""
    item = read(values)
    prompt = item.question_with_options
    again = read(dataclasses.replace(item, question=prompt).to_dict())
    assert (again.images, again.question_with_options, again.options) == (item.images, prompt, item.options)
    assert again.prompt_text == item.prompt_text
    shown = 'Which of <image 1> and <image 2> is older?\nA. the "first"\nB. it\'s <image 2>\nC. 3, 4'
    assert read({**MMMU, "question": shown}).images == ("a.png", "b.png", "b.png")


def test_a_pair_keeps_its_options_and_the_mark_of_its_chosen_response() -> None:
    item = read({"question": "Where?", "options": ["Rome", "Paris"], "answer": "B", "chosen_source": WRONG_SAMPLE,
                 "chosen": "Rome"})  # fmt: skip
    pair = item.pair(item.question_with_options, "Rome", "Roma", {})
    again = read(pair.to_dict())
    assert (again.options, again.truths, again.question) == (item.options, ("B",), item.question_with_options)
    assert again.extra["chosen_source"] == WRONG_SAMPLE
    assert DropoutNTP().sample([again], StubEngine())[0][0]["problem"] == WRONG_CHOSEN


@pytest.mark.parametrize(
    ("answer", "truths"),
    [
        ({"answer": ""}, ()), ({"answer": "  "}, ()), ({"answer": float("nan")}, ()), ({"answer": "nan"}, ()),
        ({"answer_gt": "", "answer": "5"}, ("5",)), ({"answer_gt": float("nan"), "answer": "5"}, ("5",)),
        ({"answer": "", "label": "5"}, ("5",)), ({"label": ""}, ()), ({"label": float("nan")}, ()),
        ({"answer": ["5", "", float("nan"), " "]}, ("5",)), ({"answer": [""]}, ()), ({"answers": ["", "5"]}, ("5",)),
        ({"answer": "0"}, ("0",)), ({"answer": 0.0}, ("0",)), ({"answers": [0, 5.0]}, ("0", "5")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"options": ["0", "5", "False"]}])
def test_an_empty_answer_is_no_true_answer(answer: dict[str, Any], truths: tuple[str, ...], options: Any) -> None:
    assert read({"question": "How many?", **answer, **options}).truths == truths


@pytest.mark.parametrize(
    ("answer", "options", "is_read"),
    [
        ("dog", ["dog", "cow"], True), ("Dog", ["dog", "cow"], True), ("A", ["dog", "cow"], True),
        ("(a)", ["dog", "cow"], True), ("A. dog", ["dog", "cow"], True), ("A, B", ["dog", "cow"], True),
        ("AB", ["dog", "cow"], True), (["dog", "B"], ["dog", "cow"], True), ("cat", ["dog", "cow"], False),
        ("A. cow", ["dog", "cow"], False), ("A or B", ["dog", "cow"], False), ("dog and cat", ["dog", "cow"], False),
        (True, ["yes", "no"], False), (True, ["True", "no"], True), (1.5, ["1", "2"], False),
        (["dog", "cat"], ["dog", "cow"], False),
    ],
)  # fmt: skip
def test_an_answer_names_an_option(answer: Any, options: list[str], is_read: bool) -> None:
    item = Item.from_dict({"question": "Which?", "answer": answer, "options": options})
    assert (item.problem is None) is is_read
    assert is_read or str(item.problem).startswith("answer must be a letter or the text of an option")


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"A": "cat", "B": "dog", "C": NAN, "D": NAN}, ["cat", "dog"]),
        ({"choice_a": "cat", "choice_b": "dog", "choice_c": NAN}, ["cat", "dog"]),
        ({"options": NAN}, None), ({"options": NAN, "A": "cat", "B": "dog"}, ["cat", "dog"]),
        ({"A": "cat", "B": NAN, "C": "dog"}, "problem"), ({"options": ["cat", NAN]}, "problem"),
        ({"options": {"A": "cat", "B": NAN}}, "problem"),
    ],
)  # fmt: skip
def test_nan_is_no_option(fields: dict[str, Any], options: Any) -> None:
    item = Item.from_dict({"question": "Which?", **fields})
    assert (item.problem is not None) is (options == "problem")
    assert options == "problem" or item.extra.get("options") == options


def test_a_template_that_cannot_show_the_options_refuses_the_item() -> None:
    from mpo_ext.generate.engine import SamplingConfig
    from mpo_ext.generate.prompts import PromptTemplate
    from mpo_ext.generate.questions import QuestionSampler

    item = Item.from_dict({"question": "Where?", "options": ["Rome", "Paris"], "answer": "B"})
    template = PromptTemplate("short", "{question} Answer:", "direct")
    engine = StubEngine()
    (records,) = QuestionSampler("test", 1, SamplingConfig(), 0, template).sample([item], engine)
    assert records[0]["problem"] == "options cannot be shown by this template"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("question", "options", "prompt"),
    [
        ("Which?", ["a cat", "a dog"], "Which?\nA. a cat\nB. a dog"),
        ("Which?", {"A": "a cat", "C": "a dog"}, "Which?\nA. a cat\nC. a dog"),
        ("Which?\nA. a cat\nB. a dog", ["a cat", "a dog"], None),
        ("Which?\n(A) a cat (B) a dog", ["a cat", "a dog"], None),
        ("Is it a cat or a dog?", ["a cat", "a dog"], "Is it a cat or a dog?\nA. a cat\nB. a dog"),
        ("A: 12, B: 25. Which?", ["1", "2"], "A: 12, B: 25. Which?\nA. 1\nB. 2"),
        ("A: 1.5, B: 2.5. Which?", ["1", "2"], "A: 1.5, B: 2.5. Which?\nA. 1\nB. 2"),
        ("A: \u732b B: \u72d7\u3002", ["\u732b", "\u72d7"], None),
        ("Which?", None, None),
    ],
)
def test_questions_without_a_template_show_their_options(question: str, options: Any, prompt: str | None) -> None:
    values = {"question": question, "chosen": "B, as it barks", "answer": "A", "options": options}
    item = Item.from_dict({name: value for name, value in values.items() if value is not None})
    assert item.problem is None
    engine = StubEngine()
    Correctness(CorrectnessConfig(samples=2, template=None)).sample([item], engine)
    DropoutNTP().sample([item], engine)
    assert [request.question for request in engine.requests] == [prompt or question] * 3
    for name in ("direct", "cot"):
        engine = StubEngine()
        Correctness(CorrectnessConfig(samples=2, template=name)).sample([item], engine)
        assert {request.question.partition("\n\n")[0] for request in engine.requests} == {prompt or question}

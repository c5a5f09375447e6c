"""Tests random rows in the formats of other programs.

Each row gives a pair, or an error that states the violated rule. Conversions must preserve the pair.

MPO_FUZZ_CASES sets the number of examples. Every run draws the same examples.
"""

import json
import os
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings

from mpo_ext.data import Pair
from mpo_ext.data.formats import ROW_READERS, row_format
from mpo_ext.data.media import check_media
from mpo_ext.data.messages import prompt_text
from mpo_ext.data.reader import FieldError
from mpo_ext.data.trl import from_trl, to_trl

CASES = int(os.environ.get("MPO_FUZZ_CASES", "200"))
KEYS = ["role", "content", "from", "value", "type", "text", "image", "url", "path", "image_url", "source", "base64"]
KEYS += ["bytes", "messages", "tools"]
TEXT = st.sampled_from(["", "q", "a b", "<image>", "x\n<image>\ny", "<video>", "a.png", "[]", "{}"])
LEAF = st.none() | st.booleans() | st.integers(-1, 3) | TEXT
JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "developer", 3, None, "x"]) | JSON
PART = st.one_of(
    JSON,
    st.just({"type": "image"}),
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["image", "image_url"]), "image": JSON}, optional={"image_url": JSON}
    ),
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": ROLE, "content": TEXT | st.lists(PART, max_size=3) | JSON}),
    st.fixed_dictionaries({"from": ROLE, "value": TEXT | JSON}),
    st.fixed_dictionaries({"human": TEXT, "assistant": TEXT}),
    JSON,
)
GOOD_PART = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.sampled_from(["q", "\nq"])}),
    st.sampled_from([{"type": "image"}, {"type": "image", "image": "z.png"}]),
)
GOOD_CONTENT = st.sampled_from(["q", "<image>\nq", "see <image>y"]) | st.lists(GOOD_PART, max_size=4)


def conversations(first: str, second: str, content: Any) -> Any:
    """Draws an odd number of messages. Their roles alternate between ``first`` and ``second``."""
    contents = st.lists(content, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1)
    roles = (first, second)
    return contents.map(lambda turns: [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)])


PROMPT = conversations("user", "assistant", GOOD_CONTENT)
PROMPT |= PROMPT.map(lambda turns: [{"role": "system", "content": "s"}, *turns])
RESPONSE = st.just("c") | conversations("assistant", "user", st.sampled_from(["c", "r"]))
BOTH = {"chosen": RESPONSE, "rejected": RESPONSE}
IMAGES = st.lists(st.sampled_from(["a.png", "b.png"]), max_size=4)
GOOD: dict[str, dict[str, Any]] = {
    "trl": {"prompt": PROMPT | TEXT, **BOTH, "images": IMAGES},
    "sharegpt": {"conversations": PROMPT, **BOTH, "images": IMAGES},
    "alpaca": {"instruction": TEXT, **BOTH, "images": IMAGES},
    "swift": {
        "messages": PROMPT.map(lambda turns: [*turns, {"role": "assistant", "content": "c"}]),
        "rejected_response": st.just("r"),
        "images": IMAGES,
    },
    "openai": {
        "input": PROMPT.map(lambda turns: {"messages": turns}),
        "preferred_output": RESPONSE,
        "non_preferred_output": RESPONSE,
    },
    "rlaif-v": {"question": TEXT, **BOTH, "images": IMAGES},
}
ANY = st.one_of(TEXT, st.lists(MESSAGE, max_size=4), MESSAGE, JSON)
NAMES = ["prompt", "chosen", "rejected", "image", "images", "image_paths", "question", "system", "history", "input"]
NAMES += [
    "instruction",
    "messages",
    "conversations",
    "conversation",
    "rejected_response",
    "rejected_messages",
    "query",
]
NAMES += [
    "response",
    "preferred_output",
    "non_preferred_output",
    "answer_gt",
    "provenance",
    "extra",
    "tools",
    "$source",
]
SOURCES = ['{"$source": 3}', '{"$source": {"messages": 3}}', '{"$source": {"messages": [{"role": "user"}, 3]}}']


@st.composite
def rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    format = draw(st.sampled_from(list(GOOD)))
    row = draw(st.fixed_dictionaries(GOOD[format]))
    if draw(st.booleans()):
        row |= draw(st.dictionaries(st.sampled_from(NAMES), ANY, max_size=3))
        row |= draw(st.fixed_dictionaries({}, optional={"extra": st.sampled_from(SOURCES)}))
    return format, row


def read(format: str, row: dict[str, Any]) -> Pair | Exception:
    try:
        pair = ROW_READERS[format](row, save_image=lambda content: "saved.png")
        check_media(row, pair)
    except (TypeError, ValueError) as error:
        return error
    return pair


@settings(max_examples=CASES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows())
def test_a_row_gives_a_pair_or_a_rule(drawn: tuple[str, dict[str, Any]]) -> None:
    format, row = drawn
    before = json.dumps(row)
    row_format(row)
    pair = read(format, row)
    assert json.dumps(row) == before
    if isinstance(pair, Exception):
        assert isinstance(pair, FieldError) or " must " in str(pair) or "Expecting" in str(pair), pair
        assert len(str(pair)) < 1000
        return
    assert len(pair.images) >= prompt_text(pair).count("<image>") or len(pair.images) > 0
    assert Pair.from_dict(json.loads(json.dumps(pair.to_dict()))) == pair
    for has_images in (True,) if pair.images else (True, False):
        assert from_trl(to_trl(pair, "conversational", has_images=has_images)) == pair

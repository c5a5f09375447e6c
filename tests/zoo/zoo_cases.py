"""Draws random chat templates, tokenizers and conversations for test_random_cases.py."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import transformers
import zoo_templates as templates
import zoo_tokenizers as tokenizers
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from zoo_oracle import Turn

MARKS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<image>")
FRAGMENTS = (
    *("The cat", "The answer is 12.", " red", "12", "question", "it's", ":", ".", "- "),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b"),
    *("红色", "🙂", "\u00e9", "e\u0301", "\u2581", "<0x0A>", "\x00"),
    *("<|im_start|>", "<|im_end|>", "</s>", "<s>", "<unk>", "<think>", "</think>\n\n", "[INST]", "<image>", "{{ 1 }}"),
)


@dataclasses.dataclass(frozen=True)
class TokenizerForm:
    """The settings of a random tokenizer, which is used alone or in a processor."""

    kind: str
    scheme: tokenizers.Scheme = "first"
    add_bos: bool = True
    add_eos: bool = False
    rstrip: bool = False
    in_processor: bool = False
    has_thoughts: bool = True

    @property
    def suffix(self) -> int:
        """The number of special tokens that the tokenizer adds at the end of a text."""
        return int(self.kind == "sentencepiece" and self.add_eos)

    @functools.cache  # noqa: B019 - as many forms as there are
    def build(self) -> Any:
        if self.kind == "sentencepiece":
            tokenizer = tokenizers.sentencepiece(
                *MARKS, scheme=self.scheme, add_bos=self.add_bos, add_eos=self.add_eos, rstrip=self.rstrip
            )
        elif self.kind == "gemma":
            tokenizer = tokenizers.gemma(*MARKS)
        elif self.kind == "llama3":
            tokenizer = tokenizers.llama3(*MARKS, bos="<s>", eos="</s>")
        elif self.kind == "gpt2":
            tokenizer = tokenizers.gpt2(*MARKS[2:])
        else:
            tokenizer = tokenizers.qwen(*MARKS[2:])
        if self.has_thoughts:
            tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
        if not self.in_processor:
            return tokenizer
        size = {"height": 28, "width": 28}
        return transformers.LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )


@dataclasses.dataclass(frozen=True)
class TemplateForm:
    """The parts of a random chat template.

    Attributes:
        begin: Jinja code at the start of the template.
        header: Text before each message. ``{role}`` stands for the role, such as "user", and ``{Role}`` for "User".
        end: Jinja code after each message.
        generation: Text of the generation prompt. None: the header of an assistant message.
        ignores: Whether the template ignores ``add_generation_prompt``. "no": it does not. "yes": it never writes a
            generation prompt. "header": it always writes the assistant's header after a user message.
        trim: Whether the template strips white space from messages.
        thoughts: What the template does with the thoughts in responses. "text": it keeps them as text. "dropped": it
            removes them. "always": only the last response has a block of thoughts, which may be empty.
    """

    begin: str = ""
    header: str = "<|im_start|>{role}\n"
    end: str = "{{ '<|im_end|>\\n' }}"
    generation: str | None = None
    ignores: str = "no"
    trim: bool = False
    thoughts: str = "text"

    @property
    def adds_header(self) -> bool:
        """Returns whether the encoder must add the assistant's header, because the generation prompt lacks it."""
        return self.ignores != "no" or self.generation == ""

    def jinja(self) -> str:
        def quoted(text: str) -> str:
            return "'" + text.replace("\n", "\\n") + "'"

        header = quoted(self.header).replace("{role}", "' + m.role + '").replace("{Role}", "' + m.role|capitalize + '")
        own = self.header.format(role="assistant", Role="Assistant")
        body = templates.content("<image>\\n", trim=self.trim)
        if self.thoughts != "text":
            answer = "{% set c = m.content if m.content is string else m.content[0].text %}"
            split = (
                "{% set t = c.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in c else '' %}"
                "{% set a = c.split('</think>')[-1].lstrip('\\n') %}"
            )
            block = "{% if loop.last %}{{ '<think>\\n' + t + '\\n</think>\\n\\n' }}{% endif %}"
            block = block if self.thoughts == "always" else ""
            body = (
                "{% if m.role == 'assistant' %}" + answer + split + block + "{{ a }}{% else %}" + body + "{% endif %}"
            )
        if self.ignores == "header":
            start = "{% if m.role != 'assistant' %}{{ " + header + " }}{% endif %}"
            after = self.end + "{% if m.role == 'user' %}{{ " + quoted(own) + " }}{% endif %}"
        else:
            start, after = "{{ " + header + " }}", self.end
        out = self.begin + "{% for m in messages %}" + start + body + after + "{% endfor %}"
        if self.ignores == "no":
            generation = quoted(own if self.generation is None else self.generation)
            out += "{% if add_generation_prompt %}{{ " + generation + " }}{% endif %}"
        return out


@dataclasses.dataclass(frozen=True)
class Case:
    """A random test case: a template, a tokenizer, and a conversation with a response."""

    tokenizer: TokenizerForm
    template: TemplateForm
    turns: tuple[Turn, ...]
    response: str


HEADERS = (
    *(
        "<|im_start|>{role}\n",
        "<|{role}|>\n",
        "<|{role}|>",
        "{Role}: ",
        "{Role}:",
        "{role}:\n\n",
        "### {Role}:\n",
        "[{role}] ",
    ),
    *("", "\n"),
)
ENDS = (
    *(
        "{{ '<|im_end|>\\n' }}",
        "{{ '<|im_end|>' }}",
        "{{ eos_token }}",
        "{{ ' ' + eos_token }}",
        "{{ eos_token + ' ' }}",
    ),
    *("{{ '\\n' + eos_token + '\\n' }}", "{{ '\\n' }}", "{{ '\\n\\n' }}", "{{ ' ' }}", "", "{{ '<|end|>\\n' }}"),
    "{{ '\\n<|im_end|>\\n' }}",
)
BEGINS = ("", "{{ bos_token }}", "{{ bos_token }}{{ '\\n' }}", "{{ 'You are here.\\n' }}", "{{ ' ' }}")


@st.composite
def template_forms(draw: st.DrawFn) -> TemplateForm:
    header = draw(st.sampled_from(HEADERS))
    own = header.format(role="assistant", Role="Assistant")
    generation = draw(
        st.sampled_from(
            [
                *(None, None, None, own.rstrip(" "), own + " ", own.rstrip("\n"), "", own + "Answer: "),
                *(own + "<think>", own + "<think>\n", own + "<think>\n\n</think>\n\n"),
            ]
        )
    )
    return TemplateForm(
        begin=draw(st.sampled_from(BEGINS)),
        header=header,
        end=draw(st.sampled_from(ENDS)),
        generation=generation,
        ignores=draw(st.sampled_from(["no", "no", "no", "header", "yes"])),
        trim=draw(st.booleans()),
        thoughts=draw(st.sampled_from(["text", "text", "text", "always", "dropped"])),
    )


tokenizer_forms = st.one_of(
    st.builds(
        TokenizerForm,
        kind=st.just("sentencepiece"),
        scheme=st.sampled_from(["legacy", "always", "first", "never"]),
        add_bos=st.booleans(),
        add_eos=st.sampled_from([False, False, True]),
        rstrip=st.sampled_from([False, False, True]),
        in_processor=st.booleans(),
        has_thoughts=st.booleans(),
    ),
    st.builds(
        TokenizerForm,
        kind=st.sampled_from(["gemma", "llama3", "gpt2", "qwen"]),
        in_processor=st.booleans(),
        has_thoughts=st.booleans(),
    ),
)
texts = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=4).map("".join)
responses = st.one_of(
    texts,
    texts,
    st.builds("<think>\n{}\n</think>\n\n{}".format, texts, texts),
    st.builds("{}\n</think>\n\n{}".format, texts, texts),
    st.sampled_from(["The answer is 12.", "red", " red", "红色 🙂", "12\n"]),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    turns: list[Turn] = [("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.sampled_from([0, 0, 1]))):
        turns += [("user", draw(texts)), ("assistant", draw(texts))]
    turns.append(("user", draw(texts)))
    return Case(draw(tokenizer_forms), draw(template_forms()), tuple(turns), draw(responses))


@dataclasses.dataclass(frozen=True)
class ImageCase:
    """A random test case: a model family, and a conversation with images. A number in a turn is an image's index."""

    family: str
    turns: tuple[tuple[str, tuple[str | int, ...]], ...]
    response: str


PLAIN = tuple(fragment for fragment in FRAGMENTS if not fragment.startswith(("<", "[", "</", "\u2581")))
plain_texts = st.lists(st.sampled_from(PLAIN), min_size=1, max_size=3).map("".join)


@st.composite
def image_cases(draw: st.DrawFn, families: Sequence[str], images: int) -> ImageCase:
    """Draws a conversation that shows images at random places in the user's turns.

    ``images`` is the number of images to choose from. The last turn has at least one image.
    """
    part = st.one_of(plain_texts, st.integers(0, images - 1))
    turns: list[tuple[str, tuple[str | int, ...]]] = []
    for _ in range(draw(st.integers(0, 1))):
        turns += [("user", tuple(draw(st.lists(part, min_size=1, max_size=3)))), ("assistant", (draw(plain_texts),))]
    places = draw(st.lists(part, min_size=0, max_size=3))
    places.insert(draw(st.integers(0, len(places))), draw(st.integers(0, images - 1)))
    turns.append(("user", tuple(places)))
    return ImageCase(draw(st.sampled_from(families)), tuple(turns), draw(plain_texts).strip() or "red")

"""Extracts the answer from a response and compares it with the true answer."""

from mpo_ext.answers.base import VERDICT_VERSION, Matcher, Verdict
from mpo_ext.answers.choices import label_options
from mpo_ext.answers.extract import REGEX_PREFIX, STYLES, extract_answer
from mpo_ext.answers.matchers import MATCHERS, is_same_answer, matcher
from mpo_ext.answers.normalize import clean_answer

__all__ = [
    "MATCHERS",
    "REGEX_PREFIX",
    "STYLES",
    "VERDICT_VERSION",
    "Matcher",
    "Verdict",
    "clean_answer",
    "extract_answer",
    "is_same_answer",
    "label_options",
    "matcher",
]

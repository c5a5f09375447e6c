"""Tests the statistics of pairs."""

import json
import re
from pathlib import Path

import pytest
from mmpr_files import LINES, run_data

from mpo_ext.data import open_pairs
from mpo_ext.data.stats import collect_stats, count_words, token_counter


def test_stats_measure_each_subset(mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = collect_stats(open_pairs(mmpr), len)
    text = stats["text"]
    assert (text.pairs, text.text_only, text.with_answer, text.images) == (6, 6, 3, 0)
    assert text.chosen.to_dict() == {"min": 1, "mean": 1.0, "max": 1}
    assert (stats["multi"].images, stats["multi"].rejected.most) == (5, len(LINES["multi"][0]["rejected"]))
    assert run_data("stats", mmpr, "--json", tmp_path / "stats.json") == 0
    out = capsys.readouterr().out
    assert "words (each Chinese, Japanese or Korean character is one)" in out
    assert "m3cot pairs/correctness" in out
    values = json.loads((tmp_path / "stats.json").read_text())
    assert values["subsets"]["text"]["with_answer"] == 3


def test_stats_count_skipped_lines_with_reasons(broken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats = collect_stats(open_pairs(broken, max_line_bytes=100_000))["broken"]
    assert (stats.pairs, stats.skipped) == (13, 15)
    assert run_data("stats", broken) == 0
    assert "skipped 7: bad field" in capsys.readouterr().err


def test_words_are_counted_in_scripts_without_spaces() -> None:
    assert [count_words(text) for text in ("", " two  words\n", "两个人。", "见 fig 1", "한국")] == [0, 2, 4, 3, 2]


def test_texts_without_these_scripts_have_the_words_of_the_expression() -> None:
    every = [chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000]
    spaces = [character for character in every if re.fullmatch(r"\s", character)]
    assert len(spaces) > 20
    for character in [*every[:300], *spaces, "\u200b", "\ufeff", "\U0001f600"]:
        for text in (f"a{character}b", f"{character}a b{character}", character):
            assert count_words(text) == len(re.findall(r"\S+", text)), repr(text)
    assert count_words("a\u2003\u4e24b\u00a0c") == 4


def test_stats_count_tokens_of_a_tokenizer(mmpr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs transformers, which dev installs")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    length, unit = token_counter(tmp_path / "tokenizer")
    assert (length("abcd"), unit) == (4, f"tokens of {tmp_path}/tokenizer")
    assert run_data("stats", mmpr, "--tokenizer", tmp_path / "tokenizer") == 0
    assert "tokens of" in capsys.readouterr().out
    assert run_data("stats", mmpr, "--tokenizer", tmp_path / "none") == 2
    assert "tokenizer must be a folder here or a model of the Hugging Face hub" in capsys.readouterr().err

"""Tests mixtures of data sources: the lines of a mixture, the samples of an epoch, and ``Mixture.inspect``."""

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from mpo_ext.data.jsonl import write_pairs
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.recipe import SourceRecipe


def pairs_file(path: Path, count: int, name: str = "q") -> SourceRecipe:
    write_pairs(path, [Pair(f"{name}{index}", "yes", "no", (f"{index}.png",)) for index in range(count)])
    return SourceRecipe(path=str(path))


def meta_file(folder: Path, subsets: dict[str, tuple[int, float]]) -> SourceRecipe:
    """Writes an MMPR meta file, which lists data files.

    ``subsets`` maps the name of a data file to (number of lines, how often an epoch uses each line).
    """
    entries = {}
    for name, (count, repeat) in subsets.items():
        lines = [
            json.dumps({"image": f"{name}{index}.png", "question": f"{name}{index}", "chosen": "a", "rejected": "b"})
            for index in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        entries[name] = {"root": "images", "annotation": f"{name}.jsonl", "repeat_time": repeat, "length": count}
    (folder / "meta.json").write_text(json.dumps(entries))
    return SourceRecipe(path=str(folder / "meta.json"))


def with_repeat(recipe: SourceRecipe, repeat: float) -> SourceRecipe:
    return SourceRecipe(path=recipe.path, repeat_time=repeat)


def test_sources_lie_behind_one_another(tmp_path: Path) -> None:
    sources = [pairs_file(tmp_path / "a.jsonl", 3), meta_file(tmp_path, {"x": (2, 1), "empty": (0, 1), "y": (4, 1)})]
    mixture = Mixture([*sources, pairs_file(tmp_path / "b.jsonl", 2, "r")])
    questions = ["q0", "q1", "q2", "x0", "x1", "y0", "y1", "y2", "y3", "r0", "r1"]
    assert len(mixture) == len(questions) == mixture.pairs
    assert [pair.question for pair in mixture] == questions
    assert [mixture.locate(index) for index in (0, 2, 3, 5, 8, 9, 10, -1)] == [
        (0, 0), (0, 2), (1, 0), (1, 2), (1, 5), (2, 0), (2, 1), (2, 1),
    ]  # fmt: skip
    pair, name = mixture.read(4)
    assert isinstance(pair, Pair)
    assert name == f"{tmp_path / 'x.jsonl'}:2"
    assert pair.images == (str(tmp_path / "images" / "x1.png"),)
    assert mixture.read(0)[0].images == (str(tmp_path / "0.png"),)
    assert [pair.question for pair in mixture[2:4]] == ["q2", "x0"]
    for index in (11, -12):
        with pytest.raises(IndexError, match=rf"index must be in \[-11, 11\), got {index}"):
            mixture.read(index)


def test_sources_of_one_name_are_told_apart_and_draw_as_before(tmp_path: Path) -> None:
    for folder in ("correctness", "dropout-ntp"):
        (tmp_path / folder).mkdir()
    sources = [pairs_file(tmp_path / folder / "pairs.jsonl", 9) for folder in ("correctness", "dropout-ntp")]
    mixture = Mixture([*sources, pairs_file(tmp_path / "other.jsonl", 2)])
    assert [one.label for one in mixture.subsets] == [
        "correctness/pairs.jsonl", "dropout-ntp/pairs.jsonl", "other.jsonl",
    ]  # fmt: skip
    assert "dropout-ntp/pairs.jsonl" in "\n".join(mixture.lines())
    alone = Mixture([with_repeat(sources[0], 0.5)])
    beside = Mixture([with_repeat(sources[0], 0.5), sources[1]])
    assert alone.epoch(0).tolist() == beside.epoch(0)[:4].tolist()  # the draw depends on the name, not on the label


def test_a_look_counts_formats_images_and_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "0.png").touch()
    source = pairs_file(tmp_path / "a.jsonl", 3)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"question": "q", "chosen": "c", "rejected": "r"}\n{\n')
    long = pairs_file(tmp_path / "long.jsonl", 1000)
    first, second = Mixture([source, SourceRecipe(path=long.path, format="pairs")]).inspect(limit=100)
    assert (first.format, first.is_format_given, first.lines_read, first.bad, first.with_images) == (
        "pairs",
        False,
        5,
        1,
        3,
    )
    assert (first.images, first.missing, first.pairs_missing) == (3, 2, 2)
    assert str(first).endswith("a.jsonl: format pairs (detected); 3 of 4 pairs with images; 1 lines hold NO PAIR")
    assert any("1.png" in example for example in first.examples)
    assert (second.lines_read, second.lines, second.images) == (100, 1000, 100)
    assert str(second).endswith("format pairs; 100 of 100 pairs with images among 100 of its 1,000 lines")


def test_bad_lines_are_handed_out_as_findings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    source = pairs_file(path, 2)
    path.write_bytes(path.read_bytes() + b'{"question": "?"}\n')
    mixture = Mixture([source])
    found, name = mixture.read(2)
    assert isinstance(found, BadLine)
    assert name == f"{path}:3"
    assert isinstance(mixture[2], BadLine)


@pytest.mark.parametrize(
    ("lines", "repeat", "expected"),
    [(10, 1, 10), (10, 0.5, 5), (100, 0.29, 29), (3, 0.5, 1), (10, 2, 20), (10, 2.5, 25), (7, 1.2, 8), (1, 0.3, 0)],
)
def test_repeat_time_says_how_often_lines_are_met(tmp_path: Path, lines: int, repeat: float, expected: int) -> None:
    source = with_repeat(pairs_file(tmp_path / "a.jsonl", lines), repeat)
    mixture = Mixture([source, pairs_file(tmp_path / "b.jsonl", 4)])
    assert [subset.pairs for subset in mixture.subsets] == [expected, 4]
    for epoch in range(3):
        indices = mixture.epoch(epoch)
        assert indices.dtype == np.int64
        assert len(indices) == mixture.pairs == expected + 4
        times = Counter(indices.tolist())
        whole = int(repeat)
        assert all(whole <= times[index] <= whole + 1 for index in range(lines))
        assert [times[index] for index in range(lines, lines + 4)] == [1] * 4
        assert indices.tolist() == sorted(indices.tolist())


def test_the_repeat_times_of_source_and_subset_multiply(tmp_path: Path) -> None:
    source = with_repeat(meta_file(tmp_path, {"half": (40, 0.5), "twice": (10, 2), "once": (7, 1)}), 3)
    mixture = Mixture([source])
    assert [(s.name, s.lines, s.repeat_time, s.pairs) for s in mixture.subsets] == [
        ("half", 40, 1.5, 60), ("twice", 10, 6.0, 60), ("once", 7, 3.0, 21),
    ]  # fmt: skip
    table = list(mixture.lines())
    assert len(table) == 5
    assert table[1].split() == ["half", "40", "1.5", "60"]
    assert table[-1].split() == ["all", "57", "141"]


def test_draws_are_anew_for_each_epoch_and_depend_on_seed_and_subset_alone(tmp_path: Path) -> None:
    part = with_repeat(pairs_file(tmp_path / "a.jsonl", 200), 0.5)
    mixture = Mixture([part], seed=3)
    first, second = mixture.epoch(0), mixture.epoch(1)
    assert first.tolist() != second.tolist()
    assert mixture.epoch(0).tolist() == first.tolist()
    assert Mixture([part], seed=3).epoch(1).tolist() == second.tolist()
    assert Mixture([part], seed=4).epoch(0).tolist() != first.tolist()
    assert 30 < len(set(first.tolist()) & set(second.tolist())) < 70  # about half of 100, by chance
    beside = Mixture([part, with_repeat(pairs_file(tmp_path / "b.jsonl", 200), 0.5)], seed=3).epoch(0)
    assert beside[:100].tolist() == first.tolist()
    assert (beside[100:] - 200).tolist() != first.tolist()


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    source = pairs_file(tmp_path / "a.jsonl", 2)
    with pytest.raises(ValueError, match=r"^data.train must give an epoch at least one pair, got none from .*a.jsonl"):
        Mixture([with_repeat(source, 0.1)], name="data.train")
    with pytest.raises(ValueError, match="at least one pair, got none from no sources"):
        Mixture([])
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        Mixture([SourceRecipe(path=str(tmp_path / "none.jsonl"))])
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        Mixture([source], seed=-1)
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        Mixture([source]).epoch(-1)


def test_a_copy_opens_its_sources_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"prompt": f"t{index}", "chosen": "a", "rejected": "b"} for index in range(5)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    mixture = Mixture([SourceRecipe(path=str(path)), pairs_file(tmp_path / "a.jsonl", 5000)])
    packed = pickle.dumps(mixture)
    assert len(packed) < 5000  # the index of lines is not pickled
    copy = pickle.loads(packed)
    assert [copy.read(index)[0].question for index in (0, 4, 5, 5004)] == ["t0", "t4", "q0", "q4999"]
    assert copy.epoch(1).tolist() == mixture.epoch(1).tolist()
    path.write_text(path.read_text() + json.dumps(rows[0]) + "\n")
    with pytest.raises(RuntimeError, match=r"t.jsonl must not change while it is read, got 6 lines after 5"):
        pickle.loads(packed).read(0)


def question(items: list[Any]) -> str:
    return items[0].question


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path: Path, context: str) -> None:
    mixture = Mixture([pairs_file(tmp_path / "a.jsonl", 6)])
    mixture.read(0)
    loader = DataLoader(mixture, batch_size=1, num_workers=1, collate_fn=question, multiprocessing_context=context)
    assert list(loader) == [f"q{index}" for index in range(6)]


def test_groups_are_equal_for_pairs_of_one_prompt(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    several = {"$source": {"messages": [{"role": "user", "content": "before"}, {"role": "user", "content": "q"}]}}
    pairs = [
        Pair("q", "a", "b", ("1.png",)),
        Pair("q", "c", "d", ("1.png",)),
        Pair("q", "a", "b", ("2.png",)),
        Pair("q", "a", "b"),
        Pair("q", "e", "f"),
        Pair("q", "e", "f", extra=several),
    ]
    write_pairs(path, pairs)
    path.write_bytes(path.read_bytes() + b"{}\n{}\n")
    groups = Mixture([SourceRecipe(path=str(path))]).prompt_groups()
    assert groups.dtype == np.int64
    assert groups[0] == groups[1]
    assert groups[3] == groups[4]
    assert len(set(groups.tolist())) == 6

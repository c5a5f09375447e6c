"""The file formats of pairs, and detection of a path's format.

| format | path | reader and writer |
| --- | --- | --- |
| mmpr | meta file (.json), or the lines of one subset (.jsonl) | ``mmpr.py`` |
| pairs | lines (.jsonl), one ``Pair.to_dict()`` per line | ``jsonl.py`` |
| trl | lines (.jsonl), one row of TRL's preference format per line | ``trl.py`` |
| hf | folder of a Hugging Face dataset with rows of TRL's preference format | ``hf.py`` |

``sources.py`` opens a path of any format; ``convert.py`` writes every format.
"""

import os
from typing import Literal, get_args

from mpo_ext.data.jsonl import LineFile
from mpo_ext.data.reader import BadLine
from mpo_ext.data.records import Pair

Format = Literal["mmpr", "pairs", "trl", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)
_MARKERS: dict[str, Format] = {"prompt": "trl", "images": "pairs", "image": "mmpr"}  # fields that only one format has
_SAMPLED_LINES = 1000


def detect_format(path: str, *, max_line_bytes: int) -> Format:
    """Returns the format of a path: "hf" for a folder, "mmpr" for a .json file, otherwise the format of its lines.

    The first line with a field that only one format has ("prompt": trl; "images": pairs; "image": mmpr) decides. If
    none of the first 1000 lines has such a field, the pairs are text only and the format is "mmpr".

    Raises:
        ValueError: If the file is empty, or the first 1000 lines are all bad.
    """
    if os.path.isdir(path):
        return "hf"
    if path.endswith(".json"):
        return "mmpr"
    lines = LineFile(path, lambda values, line: Pair.from_dict(values), max_line_bytes=max_line_bytes)
    if len(lines) == 0:
        raise ValueError(f"path must hold pairs, got an empty file: {path}")
    is_readable = False
    for index in range(min(len(lines), _SAMPLED_LINES)):
        try:
            values = lines.read_object(index)
        except BadLine:
            continue
        is_readable = True
        for field, format in _MARKERS.items():
            if field in values:
                return format
    if is_readable:
        return "mmpr"
    raise ValueError(
        f"format must be told apart by a good line, got none among the first {_SAMPLED_LINES} of {path}: "
        f"name it ({', '.join(FORMATS)})"
    )

"""Writes preference pairs to a static HTML page with images, key frames of videos, search and filters."""

import base64
import collections
import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mpo_ext.checks import check_integer
from mpo_ext.data.messages import prompt_text
from mpo_ext.data.picks import Picks, pair_digest
from mpo_ext.data.reader import BadLine, Location, Skipped
from mpo_ext.data.records import SOURCE, Pair
from mpo_ext.data.sources import PairSource
from mpo_ext.files import check_outputs
from mpo_ext.images import ImageError, describe_source, is_remote, is_url, load_image
from mpo_ext.report import save_page
from mpo_ext.videos import Video, describe_video, key_frames

TEMPLATE = "pairs_view.html.j2"
KEY_FRAMES = 4  # frames of a video that a page shows


def write_view(
    path: str | os.PathLike[str],
    source: PairSource,
    *,
    title: str | None = None,
    limit: int = 2000,
    seed: int = 0,
    thumbnail: int = 320,
    image_budget: int = 64 << 20,
    max_characters: int = 20_000,
) -> tuple[int, Skipped]:
    """Atomically writes an HTML page that shows the pairs of a source.

    Args:
        path: Path of the HTML file.
        source: Pairs to show.
        title: Title of the page; None: the path of the source.
        limit: Maximum number of lines. If there are more, ``limit`` lines are drawn at random; the page states this.
        seed: Seed of the draw.
        thumbnail: Maximum width and height of an image in pixels; 0 omits the images.
        image_budget: Maximum size of all encoded images in bytes. The page marks the images that do not fit.
        max_characters: Maximum number of characters of a text. Longer texts are cut, and the page marks them.

    Returns:
        The number of pairs on the page, and the bad lines.

    Raises:
        ValueError: If a number is out of range, or ``path`` is a file of the source.
        ImportError: If jinja2 or PIL is not installed, or PyAV is not installed and a pair has a video file.
        OSError: If the page cannot be written.
    """
    for name, value, least in (
        ("limit", limit, 1),
        ("thumbnail", thumbnail, 0),
        ("image_budget", image_budget, 0),
        ("max_characters", max_characters, 1),
    ):
        check_integer(name, value, least=least)
    check_outputs("path", [path], inputs=source.files)
    total = len(source.indices)
    drawn: Sequence[int] = range(total)
    if total > limit:
        drawn = sorted(random.Random(seed).sample(range(total), limit))
    images, skipped = Thumbnails(thumbnail, image_budget), Skipped()
    pairs: list[dict[str, Any]] = []
    for place in drawn:
        index = int(source.indices[place])
        where, pair = source.read(index)
        if isinstance(pair, BadLine):
            skipped.add(pair)
        else:
            pairs.append(page_entry(index, where, pair, images.of_pair(pair), max_characters))
    notes = [] if total <= limit else [f"{limit:,} of {total:,} lines, drawn at random with seed {seed}."]
    notes += [line.strip() for line in skipped.lines()]
    if images.omitted:
        notes.append(f"{images.omitted:,} images did not fit into {image_budget:,} bytes.")
    values = {
        "title": title or os.fspath(source.path),
        "notes": notes,
        "subsets": count_names(pair["subset"] for pair in pairs),
        "pipelines": count_names(pair["pipeline"] for pair in pairs),
        "is_served": False,
        "data": script_json({"pairs": pairs, "images": images.uris, "picks": empty_picks(source)}),
    }
    values["nonce"] = hashlib.blake2b(repr(values).encode(), digest_size=16).hexdigest()
    save_page(path, TEMPLATE, values)
    return len(pairs), skipped


def count_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """Returns (name, count) for each distinct name, sorted by name. Empty names are not counted."""
    return sorted(collections.Counter(name for name in names if name).items())


def empty_picks(source: PairSource) -> dict[str, Any]:
    """Returns the content of a new picks file for ``source``. No pair is picked yet."""
    return Picks(os.fspath(source.path), len(source.pairs), {}).to_dict()


def page_entry(
    index: int, where: Location, pair: Pair, images: Sequence[dict[str, Any]], max_characters: int
) -> dict[str, Any]:
    """Returns the data of a pair for the page's script, as a dict of JSON values.

    Args:
        index: Index of the pair's line in the source.
        where: Location of the pair.
        pair: The pair.
        images: Entries of the pair's images and videos, such as ``Thumbnails.of_pair`` returns.
        max_characters: Maximum number of characters of a text. Longer texts are cut.
    """
    shared, cut = _shared(pair.chosen, pair.rejected), _cut(pair)
    rest = {name: value for name, value in pair.extra.items() if name != SOURCE}
    more = {name: part for name, part in (("provenance", pair.provenance), ("extra", rest)) if part}
    entry: dict[str, Any] = {
        "index": index,
        "digest": pair_digest(pair),
        "subset": where.subset,
        "where": f"{os.path.basename(where.file)}:{where.line}",
        "pipeline": str(pair.provenance.get("pipeline", ""))[:100],
        "images": list(images),
        "shared": _utf16(pair.chosen[: min(shared, max_characters)]),
        "cut": None if cut is None else _utf16(pair.chosen[: min(cut, max_characters)]),
        "answer": None if pair.answer_gt is None else cut_text(pair.answer_gt, max_characters),
        "more": cut_text(json.dumps(more, ensure_ascii=False, indent=1), max_characters),
    }
    for name, text in (("question", prompt_text(pair)), ("chosen", pair.chosen), ("rejected", pair.rejected)):
        entry[name] = cut_text(text, max_characters)
    return entry


def _cut(pair: Pair) -> int | None:
    """Returns the position in the chosen response, in characters, at which DropoutNTP cut the response.

    Without a valid record of the position, returns None.
    """
    cut = pair.provenance.get("cut")
    cut = cut.get("characters") if isinstance(cut, dict) else cut
    if isinstance(cut, bool) or not isinstance(cut, int) or not 0 < cut <= len(pair.chosen):
        return None
    return cut


def _shared(chosen: str, rejected: str) -> int:
    """Returns the length of the longest common prefix of two responses, in characters."""
    equal = (left == right for left, right in zip(chosen, rejected, strict=False))
    return next((index for index, same in enumerate(equal) if not same), min(len(chosen), len(rejected)))


def _utf16(text: str) -> int:
    """Returns the length of a text in UTF-16 code units, in which JavaScript counts string positions."""
    return len(text.encode("utf-16-le")) // 2


def cut_text(text: str, most: int) -> str:
    """Truncates a text that has more than ``most`` characters, and appends the number of missing characters."""
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most:,} more characters]"


def script_json(value: Any) -> Any:
    """Returns a value as JSON that is safe inside an HTML script element."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # Lone surrogates cannot be written in UTF-8.
    text = re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    return Markup(text)  # the replacement has escaped the text


def make_thumbnail(source: Any, size: int) -> Any:
    """Loads an image and scales it down to at most ``size`` pixels in width and height. Returns a PIL image."""
    image = load_image(source)
    image.thumbnail((size, size))
    return image


def jpeg_thumbnail(source: Any, size: int) -> bytes:
    """Returns a thumbnail of an image as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    make_thumbnail(source, size).save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def jpeg_key_frames(video: Video, size: int) -> bytes:
    """Returns thumbnails of a video's key frames, side by side, as the bytes of one JPEG file."""
    from PIL import Image

    frames = [make_thumbnail(frame.copy(), size) for frame in key_frames(video, KEY_FRAMES).frames]
    whole = Image.new("RGB", (sum(frame.width for frame in frames), max(frame.height for frame in frames)))
    left = 0
    for frame in frames:
        whole.paste(frame, (left, 0))
        left += frame.width
    buffer = io.BytesIO()
    whole.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def media_names(pair: Pair) -> list[str]:
    """Returns the display names of a pair's images, rejected images and videos, in this order."""
    rejected = [f"for rejected: {image_name(image)}" for image in pair.rejected_images]
    return [*map(image_name, pair.images), *rejected, *map(video_name, pair.videos)]


def video_name(video: Video) -> str:
    """Returns the display name of a video: its file name, or a description of its frames."""
    return image_name(video.path) if video.path else describe_video(video)


def image_name(path: str) -> str:
    """Returns the display name of an image: its file name, or a description of a URL."""
    return describe_source(path if is_url(path) else os.path.basename(path))


class Thumbnails:
    """Collects thumbnails of images and of video key frames as data URIs. Each image or video is stored once.

    Args:
        size: Maximum width and height of a thumbnail in pixels; 0 omits all images.
        budget: Maximum number of characters of all data URIs together.

    Attributes:
        uris: The data URIs.
        omitted: Number of images and key frames that did not fit into the budget. If the budget was used up before a
            video was read, the whole video counts as one key frame.
    """

    def __init__(self, size: int, budget: int) -> None:
        self.uris: list[str] = []
        self.omitted = 0
        self._size, self._budget = size, budget
        self._entries: dict[str, dict[str, Any]] = {}
        self._videos: dict[Video, list[dict[str, Any]]] = {}

    def add(self, path: str) -> dict[str, Any]:
        """Adds an image, and returns its entry for the page.

        An entry is a dict with ``name``, and with either ``index`` (position in ``uris``) or ``problem`` (error text).
        """
        if path not in self._entries:
            self._entries[path] = {"name": image_name(path), **self._make(path)}
        return self._entries[path]

    def of_pair(self, pair: Pair) -> list[dict[str, Any]]:
        """Adds the images, rejected images and video key frames of a pair. Returns a list of entries as in ``add``."""
        entries = [self.add(image) for image in (*pair.images, *pair.rejected_images)]
        named = [{**entry, "name": name} for entry, name in zip(entries, media_names(pair), strict=False)]
        return [*named, *(frame for video in pair.videos for frame in self.add_video(video))]

    def add_video(self, video: Video) -> list[dict[str, Any]]:
        """Adds the key frames of a video. Returns a list with an entry for each key frame.

        An entry is as in ``add``. If the video cannot be shown, the list has a single entry with a ``problem``.
        """
        if video not in self._videos:
            name = video_name(video)
            loaded, problem = self._load(lambda: key_frames(video, KEY_FRAMES))
            if problem is not None:
                self._videos[video] = [{"name": name, "problem": problem}]
            else:
                self._videos[video] = [
                    {"name": f"{name} at {time:.1f} s", **self._store(jpeg_thumbnail(frame.copy(), self._size))}
                    for frame, time in zip(loaded.frames, loaded.times, strict=True)
                ]
        return self._videos[video]

    def _make(self, path: str) -> dict[str, Any]:
        if is_remote(path):
            return {"problem": "a URL, not fetched"}
        image, problem = self._load(lambda: jpeg_thumbnail(path, self._size))
        return self._store(image) if problem is None else {"problem": problem}

    def _load(self, load: Callable[[], Any]) -> tuple[Any, str | None]:
        """Calls ``load``. Returns (result, None), or (None, error text).

        Does not call ``load`` if images are omitted or the budget is used up.
        """
        if not self._size:
            return None, "omitted"
        if self._budget <= 0:
            self.omitted += 1
            return None, "no room left in the page"
        try:
            return load(), None
        except FileNotFoundError:
            return None, "missing"
        except ImageError as error:
            return None, f"broken: {error}"

    def _store(self, content: bytes) -> dict[str, Any]:
        """Stores a JPEG file as a data URI, if the page has room. Returns ``index`` or ``problem``; see ``add``."""
        uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
        if len(uri) > self._budget:
            self._budget = 0
            self.omitted += 1
            return {"problem": "no room left in the page"}
        self._budget -= len(uri)
        self.uris.append(uri)
        return {"index": len(self.uris) - 1}

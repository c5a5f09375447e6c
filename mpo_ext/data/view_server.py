"""Serves a page of pairs on this machine. Pairs and images are read only when the page shows them.

Only programs on this machine (127.0.0.1) can connect. The address contains a secret, which is new at each start.
"""

import dataclasses
import hashlib
import http.server
import json
import os
import secrets
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from mpo_ext.checks import check_integer
from mpo_ext.data.picks import Picks, pair_digest, read_picks, restrict
from mpo_ext.data.reader import BadLine, Location
from mpo_ext.data.records import Pair
from mpo_ext.data.sources import PairSource
from mpo_ext.data.view import (
    TEMPLATE,
    empty_picks,
    jpeg_key_frames,
    jpeg_thumbnail,
    media_names,
    page_entry,
    script_json,
)
from mpo_ext.files import check_no_pipe, check_outputs
from mpo_ext.images import ImageError, is_remote
from mpo_ext.report import render_page
from mpo_ext.videos import Video

_HOST = "127.0.0.1"
_PER_PAGE = 20
_SEARCH_S = 0.5  # maximum time of a search request; the page then requests the search of the next lines
_BODY_BYTES = 1000


class PairServer(http.server.ThreadingHTTPServer):
    """An HTTP server for the page of pairs. Call ``serve_forever`` in a ``with`` block to answer requests.

    Args:
        source: Pairs to show.
        port: Number of the port; 0 takes a free port.
        picks_path: JSON file of the picked pairs, written after each pick. Picks in an existing file are kept.
        title: Title of the page; None: the path of the source.
        thumbnail: Maximum width and height of an image in pixels; 0 omits the images.
        max_characters: Maximum number of characters of a text; longer texts are cut, and the page marks them.

    Attributes:
        url: Address of the page, including its secret part.

    Raises:
        OSError: If the port is in use.
        ValueError: If an argument is out of range. If ``picks_path`` holds picks of other pairs, or is a file of the
            source, a pipe or a device.
        FileExistsError: If ``picks_path`` is not a file of picks.
    """

    daemon_threads = True

    def __init__(
        self,
        source: PairSource,
        *,
        port: int = 0,
        picks_path: str | os.PathLike[str] = "picked.json",
        title: str | None = None,
        thumbnail: int = 320,
        max_characters: int = 20_000,
    ) -> None:
        for name, value in (("port", port), ("thumbnail", thumbnail)):
            check_integer(name, value, least=0)
        self.source, self.thumbnail, self.max_characters = source, thumbnail, max_characters
        self.title = title or os.fspath(source.path)
        self.picks_path = os.fspath(picks_path)
        self.picks = self._open_picks()
        self.lock = threading.Lock()
        super().__init__((_HOST, port), _Handler)
        self.token = secrets.token_urlsafe(16)
        self.url = f"http://{_HOST}:{self.server_address[1]}/{self.token}/"

    def _open_picks(self) -> Picks:
        picks = Picks(os.fspath(self.source.path), len(self.source.pairs), {})
        if not os.path.lexists(self.picks_path):
            return picks
        check_no_pipe("picks", self.picks_path)
        try:
            known = read_picks(self.picks_path)
        except ValueError:
            check_outputs("picks", [self.picks_path], inputs=self.source.files, is_ours=False)
            raise
        restrict(self.source, known)  # raises if the picks belong to other pairs
        return Picks(picks.source, picks.lines, dict(known.digests))

    def read(self, index: int) -> tuple[Location, Pair | BadLine]:
        """Reads the line at an index of the source. Only one thread reads at a time."""
        with self.lock:
            return self.source.read(index)

    def pick(self, index: int, *, is_picked: bool) -> int:
        """Picks a pair, or undoes the pick. Writes the file of picks, and returns the number of picks.

        Raises ValueError if the line is bad.
        """
        _, pair = self.read(index)
        if isinstance(pair, BadLine):
            raise ValueError(f"index must be that of a pair, got {pair}")
        with self.lock:
            digests = {known: digest for known, digest in self.picks.digests.items() if known != index}
            if is_picked:
                digests[index] = pair_digest(pair)
            picks = dataclasses.replace(self.picks, digests=digests)
            picks.write(self.picks_path)
            self.picks = picks  # not if the writing failed
            return len(digests)

    def page(self) -> str:
        """Returns the HTML page. Its script loads the pairs later."""
        values: dict[str, Any] = {
            "title": self.title,
            "notes": [f"Picked pairs are written to {self.picks_path} at once."],
            "subsets": [(name, "") for name in self.source.subsets],
            "pipelines": [],
            "is_served": True,
            "data": script_json({"pairs": [], "images": [], "picks": empty_picks(self.source)}),
        }
        values["nonce"] = hashlib.blake2b(secrets.token_bytes(16), digest_size=16).hexdigest()
        return render_page(TEMPLATE, values)

    def find(self, start: int, count: int, query: str, subset: str, *, only_picked: bool) -> dict[str, Any]:
        """Searches the lines of the source for pairs.

        Args:
            start: Position in ``source.indices`` of the first line to search.
            count: Maximum number of matches. A search that takes too long returns fewer.
            query: Text to find in the question, a response, the answer, the pipeline or the location of a pair; case
                is ignored. "" matches all lines, also bad lines.
            subset: Name of the data set (``Location.subset``) to search; "" for all.
            only_picked: Whether only picked pairs match.

        Returns:
            A dict with ``pairs`` (the matches), ``next`` (``start`` of the next search), ``total`` (length of
            ``source.indices``) and ``picked`` (number of picked pairs). A match is the result of ``page_entry`` with
            the additional field ``picked`` (a bool). For a bad line, it is a dict with ``index`` and ``bad`` (error
            text).
        """
        indices = self.source.indices
        query, place = query.lower().strip(), start
        entries: list[dict[str, Any]] = []
        deadline_s = time.monotonic() + _SEARCH_S
        while place < len(indices) and len(entries) < count:
            if place > start and time.monotonic() > deadline_s:
                break
            index = int(indices[place])
            place += 1
            if only_picked and index not in self.picks.digests:
                continue
            where, pair = self.read(index)
            if subset and where.subset != subset:
                continue
            if isinstance(pair, BadLine):
                if not query:
                    entries.append({"index": index, "bad": str(pair)})
                continue
            if query and query not in _text(where, pair):
                continue
            images = [{"name": name} for name in media_names(pair)]
            entry = page_entry(index, where, pair, images, self.max_characters)
            for number, image in enumerate(entry["images"]):
                image["url"] = f"image?index={index}&number={number}"
            entries.append(entry | {"picked": index in self.picks.digests})
        return {"pairs": entries, "next": place, "total": len(indices), "picked": len(self.picks.digests)}

    def image(self, index: int, number: int) -> bytes:
        """Returns a JPEG thumbnail of an image or video of a pair.

        Args:
            index: Index of the pair's line.
            number: Index of the image or video, as in ``media_names``.

        Raises:
            ValueError: If the pair has no such image, or the image cannot be shown.
        """
        _, pair = self.read(index)
        media = () if isinstance(pair, BadLine) else (*pair.images, *pair.rejected_images, *pair.videos)
        if not 0 <= number < len(media):
            raise ValueError("the pair does not have this image")
        source = media[number]
        if not self.thumbnail:
            raise ValueError("omitted")
        if isinstance(source, str) and is_remote(source):
            raise ValueError("a URL, not fetched")
        try:
            if isinstance(source, Video):
                return jpeg_key_frames(source, self.thumbnail)
            return jpeg_thumbnail(source, self.thumbnail)
        except FileNotFoundError:
            raise ValueError("missing") from None
        except (ImageError, OSError) as error:
            raise ValueError(f"broken: {error}") from None


def _text(where: Location, pair: Pair) -> str:
    parts = (pair.question, pair.chosen, pair.rejected, pair.answer_gt or "", pair.provenance.get("pipeline", ""))
    return "\n".join(map(str, (*parts, where.subset, where))).lower()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PairServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        name, values = self._request()
        number = self._number
        if name == "":
            self._answer(self.server.page().encode(), "text/html; charset=utf-8")
        elif name == "pairs":
            options = {"query": values.get("query", ""), "subset": values.get("subset", "")}
            count = min(number(values, "count") or _PER_PAGE, _PER_PAGE)
            found = self.server.find(
                number(values, "start"), count, **options, only_picked=values.get("picked") == "1"
            )
            self._answer_json(found)
        elif name == "image":
            self._try(lambda: self.server.image(number(values, "index"), number(values, "number")), "image/jpeg")
        elif name == "picked.json":
            self._answer_json(self.server.picks.to_dict())
        else:
            self._answer(b"not found", "text/plain", HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        name, values = self._request()
        self.rfile.read(min(int(self.headers.get("Content-Length") or 0), _BODY_BYTES))
        if name != "pick":
            self._answer(b"not found", "text/plain", HTTPStatus.NOT_FOUND)
            return
        index, is_picked = self._number(values, "index"), values.get("picked") == "1"
        self._try(lambda: json.dumps(self.server.pick(index, is_picked=is_picked)).encode(), "application/json")

    def _request(self) -> tuple[str | None, dict[str, str]]:
        """Returns (path, query) of the request.

        ``path`` is the part of the URL's path after the secret. With a wrong secret, ``path`` is None. ``query`` maps
        names to values.
        """
        url = urllib.parse.urlsplit(self.path)
        token, _, name = url.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return None, {}
        return name, dict(urllib.parse.parse_qsl(url.query))

    def _number(self, values: Mapping[str, str], name: str) -> int:
        text = values.get(name, "0")
        number = int(text) if text.isascii() and text.isdigit() else 0
        return min(number, len(self.server.source.pairs) - 1) if name == "index" else number

    def _try(self, make: Callable[[], bytes], kind: str) -> None:
        """Sends the bytes that ``make`` returns. A ValueError or OSError is sent as text with status 404."""
        try:
            self._answer(make(), kind)
        except (ValueError, OSError) as error:
            self._answer(str(error).encode(errors="replace"), "text/plain; charset=utf-8", HTTPStatus.NOT_FOUND)

    def _answer_json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), "application/json")

    def _answer(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Does nothing. The overridden method prints a line for each request."""

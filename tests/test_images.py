"""Tests that all parts of the package load the same pixels, and reject unusable images with a short message."""

import base64
import io
import json
import os
import re
import subprocess
import urllib.parse
import warnings
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest
from image_files import ANIMATED, FILES, ImageFile, chunk, png, saved, tiff
from PIL import Image

from mpo_ext import images as image_module
from mpo_ext.data import Pair, open_pairs, read_pairs, write_pairs
from mpo_ext.data.check import check_pairs
from mpo_ext.data.convert import convert
from mpo_ext.data.reader import FieldError
from mpo_ext.data.row_media import row_images
from mpo_ext.data.view import make_thumbnail, write_view
from mpo_ext.generate.items import Item
from mpo_ext.images import ImageError, describe_source, load_image, local_path, missing_image_advice, read_source
from mpo_ext.train.mixture import Mixture
from mpo_ext.train.recipe import SourceRecipe

NAMES = [file.name for file in FILES]
BROKEN_PROFILES = ("broken_profile.png", "other_profile.png")


def difference(image: Any, file: ImageFile) -> int:
    """Returns the largest absolute difference of a pixel value, on the scale 0 to 255."""
    values = np.asarray(image, dtype=np.int64)
    assert values.shape == file.pixels.shape, file.name
    return int(abs(values - file.pixels).max())


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    for file in FILES:
        (path / file.name).write_bytes(file.content)
    return path


def test_there_are_enough_files() -> None:
    assert len(set(NAMES)) == len(FILES) > 60


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_file_has_the_same_pixels_in_every_form(file: ImageFile, folder: Path) -> None:
    path = folder / file.name
    with Image.open(path) as opened:
        forms = [str(path), path, path.as_uri(), data_url(file.content), file.content, opened]
        for form in forms:
            image = load_image(form)
            assert (type(image), image.mode, image.info) == (Image.Image, "RGB", {})
            assert difference(image, file) <= 1
            assert load_image(image) is image
    assert difference(make_thumbnail(str(path), 320), file) <= 1


# ---------------------------------------------------------------------- train, sample, evaluate, view, check


@pytest.fixture(scope="module")
def llava() -> tuple[Any, Any]:
    """Returns a tiny LLaVA and a processor. The processor returns the pixels unchanged, as float32 from 0 to 255."""
    import torch
    import vision_families

    torch.manual_seed(0)
    model, processor = vision_families.llava()
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        setattr(processor.image_processor, name, False)
    return model, processor


def check_pixels(values: Any, files: list[ImageFile]) -> None:
    pixels = values.permute(0, 2, 3, 1).float().numpy()
    assert len(pixels) == len(files)
    for image, file in zip(pixels, files, strict=True):
        assert difference(image, file) <= 1, file.name


def seen_pixels(model: Any, run: Any) -> Any:
    """Calls ``run`` and returns the pixel values that reached the model's vision tower."""
    import torch

    seen = []

    def record(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        seen.append(args[0] if args else inputs["pixel_values"])

    handle = model.model.vision_tower.register_forward_pre_hook(record, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return torch.cat(seen)


def test_training_sees_the_pixels(llava: tuple[Any, Any], folder: Path) -> None:
    import torch

    from mpo_ext.train.encode import Encoder, Sample

    encoder = Encoder(llava[1])
    samples = [encoder.encode(Pair("Q?", "yes", "no", (str(folder / name),)), name) for name in NAMES]
    assert all(isinstance(sample, Sample) for sample in samples)
    check_pixels(torch.cat([sample.image_inputs["pixel_values"] for sample in samples]), FILES)


@pytest.mark.parametrize("kind", ["correctness", "dropout_ntp", "evaluate"])
def test_sampling_and_evaluation_see_the_pixels(
    llava: tuple[Any, Any], folder: Path, tmp_path: Path, kind: str
) -> None:
    from mpo_ext.evaluate.run import evaluate
    from mpo_ext.evaluate.scoring import EvaluationConfig
    from mpo_ext.generate.correctness import Correctness, CorrectnessConfig
    from mpo_ext.generate.dropout_ntp import DropoutNTP, DropoutNTPConfig
    from mpo_ext.generate.engine import SamplingConfig
    from mpo_ext.generate.runner import run
    from mpo_ext.generate.transformers_engine import TransformersEngine

    model, processor = llava
    engine = TransformersEngine(model, processor, batch_size=2 * len(FILES), name="tiny")
    items = tmp_path / "items.jsonl"
    item = {"question": "Q?", "answer": "7", "chosen": "It is 7."}
    items.write_text("".join(json.dumps({**item, "image": name}) + "\n" for name in NAMES))
    sampling, samples = SamplingConfig(max_new_tokens=1), 2 if kind == "correctness" else 1

    def use() -> None:
        if kind == "evaluate":
            config = EvaluationConfig(prompts=("none",), max_new_tokens=1)
            models, data = {"tiny": engine}, {"items": items}
            evaluate(models, data, tmp_path / "out", config=config, image_root=str(folder), page_limit=2)
            return
        pipeline: Any = DropoutNTP(DropoutNTPConfig(with_image=True, sampling=sampling))
        if kind == "correctness":
            pipeline = Correctness(CorrectnessConfig(samples=samples, sampling=sampling))
        run(pipeline, engine, items, tmp_path / "out", image_root=str(folder), block_size=samples * len(FILES))

    check_pixels(seen_pixels(model, use), FILES)  # once for all samples of an item


def test_pages_show_and_check_decodes_every_file(folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "p.jsonl", [Pair(name, "yes", "no", (str(folder / name),)) for name in NAMES])
    source = open_pairs(tmp_path / "p.jsonl")
    write_view(tmp_path / "p.html", source)
    assert (tmp_path / "p.html").read_text().count("data:image/jpeg;base64,") == len(FILES)
    for images in ("verify", "decode"):
        report = check_pairs(source, images=images)  # type: ignore[arg-type]
        assert report.totals() == {"animated image": len(ANIMATED), "colour profile": len(BROKEN_PROFILES)}
    found = {kind: {NAMES[one.where.line - 1] for one in findings} for kind, findings in report.examples.items()}
    assert found == {"animated image": set(ANIMATED), "colour profile": set(BROKEN_PROFILES)}
    assert "got 2 frames in" in report.examples["animated image"][0].message


# ---------------------------------------------------------------------- sources


def test_a_file_url_is_decoded_and_a_data_url_may_be_percent_encoded(tmp_path: Path) -> None:
    file = FILES[0]
    path = tmp_path / "a b%ü#?.jpg"
    path.write_bytes(file.content)
    urls = [path.as_uri(), path.as_uri().replace("file:", "FILE:"), path.as_uri().replace("//", "//localhost")]
    urls += [path.as_uri().replace("file://", "file:"), f"file://{urllib.parse.quote(str(path))}"]
    text = base64.b64encode(file.content).decode()
    urls += [
        data_url(file.content, "image/jpeg"),
        data_url(file.content, ""),
        f"data:image;base64,{text}",
        f"DATA:image/jpeg;name=a.jpg;BASE64,{text.rstrip('=')}",
        f"data:image/jpeg;base64,{text[:40]}\n {text[40:]}",
        f"data:image/jpeg;base64,{urllib.parse.quote(text, safe='')}",
        f"data:image/jpeg,{urllib.parse.quote(file.content)}",
    ]
    for url in urls:
        assert difference(load_image(url), file) <= 1, url[:80]
        assert read_source(url) == file.content
    assert local_path("file:///a%20b") == "/a b"
    assert [local_path(text) for text in ("/a%20b", "file://host/a", "data:,x")] == [
        "/a%20b", "file://host/a", "data:,x"
    ]  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"image must be a file that exists, got file:///none\.png"):
        load_image("file:///none.png")


LONG = "x" * 100_000
SOURCES = {
    f"https://host/{LONG}": "download it first",
    f"http://host/{LONG}": "download it first",
    f"s3://bucket/{LONG}": "download it first",
    f"HF://{LONG}": "download it first",
    f"oss://{LONG}": "download it first",
    f"file://otherhost/{LONG}": "download it first",
    f"data:image/png;base64,{LONG}!": "valid base64",
    f"data:image/png;base64,{LONG}x": "valid base64",  # one letter too many
    f"data:image/png;base64{LONG}": "a comma before the data",
    f"data:image/png;base64,{'A' * 100_000}": "a format that mpo_ext reads",
    f"data:image/svg+xml,<svg>{LONG}</svg>": "a format that mpo_ext reads",
    "data:,": "a format that mpo_ext reads",
}
BARE = base64.b64encode(FILES[0].content).decode()  # base64 without the beginning of a data URL
PATHS = (f"/{LONG}", LONG, f"/images/{LONG}.png", BARE)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source[:24])
def test_a_source_that_cannot_be_a_path_is_named_in_at_most_80_characters(source: str) -> None:
    with pytest.raises(ImageError, match=SOURCES[source]) as caught:
        load_image(source)
    assert len(str(caught.value)) < 250
    assert len(describe_source(source)) <= 80


@pytest.mark.parametrize("source", PATHS, ids=range(len(PATHS)))
def test_a_text_that_cannot_be_a_path_is_named_in_at_most_80_characters(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="image must be a file that exists") as caught:
        load_image(source)
    assert len(str(caught.value).partition(": it is base64")[0]) < 130


def test_messages_show_paths_and_urls_whole(tmp_path: Path) -> None:
    folder = tmp_path / "/".join(["a folder with a long name"] * 6)
    path, url = str(folder / "none.png"), f"https://host/{'part/' * 40}a.png?size=large"
    with pytest.raises(FileNotFoundError, match=rf"^image must be a file that exists, got {re.escape(path)}$"):
        load_image(path)
    with pytest.raises(ImageError, match=re.escape(f"got the URL {url}: download it first")):
        load_image(url)
    folder.mkdir(parents=True)
    Path(path).write_text("text")
    with pytest.raises(ImageError, match=re.escape(path)):
        load_image(Path(path))
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", (f"{path}x", url))])
    examples = check_pairs(open_pairs(tmp_path / "p.jsonl")).examples
    assert examples["missing image"][0].message.endswith(f"got {path}x")
    assert examples["image is a URL"][0].message.endswith(f"got {url}")
    with pytest.raises(FieldError, match=re.escape(f"got {path}, {path}x and {path}")):
        row_images({"image": [path, f"{path}x"], "images": [path]}, None)


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff\xe0", "jpeg"), (b"GIF89a", "gif"), (b"RIFF....WEBP", "webp")],
)
def test_base64_without_the_beginning_of_a_data_url_gets_advice(head: bytes, kind: str, tmp_path: Path) -> None:
    text = base64.b64encode(head + bytes(range(256)) * 40).decode()
    advice = f"it is base64 text; write data:image/{kind};base64, before it"
    with pytest.raises(FileNotFoundError, match=advice):
        load_image(text)
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", (text,))])
    (finding,) = check_pairs(open_pairs(tmp_path / "p.jsonl")).examples["missing image"]
    assert finding.message.endswith(advice)
    (overview,) = Mixture([SourceRecipe(path=str(tmp_path / "p.jsonl"))]).inspect()
    assert overview.examples[0].endswith(advice)
    assert missing_image_advice(text[:20]) == missing_image_advice(f"/images/{text}.png") == ""


def test_other_types_are_refused() -> None:
    for value in (5, None, np.zeros((2, 2)), ["a.png"], {"bytes": b""}):
        with pytest.raises(TypeError, match="image must be a path, a URL, bytes or a PIL image, got"):
            load_image(value)


# ---------------------------------------------------------------------- refused images


def test_grey_of_an_unknown_range_is_refused(tmp_path: Path) -> None:
    values = np.arange(784).reshape(28, 28)
    cases = {
        ("I", "0 to 783"): tiff(32, 1, values.astype("<i4").tobytes(), sample_format=2),
        ("I", "-100 to 683"): tiff(16, 1, (values - 100).astype("<i2").tobytes(), sample_format=2),
        ("I", "0 to 1"): Image.fromarray((values % 2).astype(np.int32)),
        ("F", "0 to 1"): tiff(32, 1, (values / 783).astype("<f4").tobytes(), sample_format=3),
        ("F", "-1 to 1"): Image.fromarray((values / 391.5 - 1).astype(np.float32)),
        ("F", "0 to 65535"): Image.fromarray((values / 783 * 65535).astype(np.float32)),
        ("F", "nan"): Image.fromarray(np.full((28, 28), np.nan, np.float32)),
    }
    for number, ((mode, span), source) in enumerate(cases.items()):
        with pytest.raises(ImageError, match=f"mode {mode}, .* got values from {span}"):
            load_image(source)
        if isinstance(source, bytes):
            (tmp_path / f"{number}.tiff").write_bytes(source)
            write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", (f"{number}.tiff",))])
            assert check_pairs(open_pairs(tmp_path / "p.jsonl")).totals() == {"broken image": 1}
    assert load_image(Image.new("I", (2, 2))).getpixel((0, 0)) == (0, 0, 0)


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    rows = [row.astype(">u2").tobytes() for row in np.zeros((2, 28, 3), int)]
    with pytest.raises(ImageError, match="image must not have a transparent colour of 16 bits, got mode RGB;16"):
        load_image(png(16, 2, rows, chunk(b"tRNS", bytes(6))))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "ICO"])
def test_a_truncated_file_is_refused(format: str, tmp_path: Path) -> None:
    content = saved(Image.fromarray(image_files.noise(3)), format)
    for share in (0.3, 0.6, 0.9):
        cut = content[: int(share * len(content))]
        with pytest.raises(
            ImageError, match=r"image must be (readable|in a format that mpo_ext reads, such as .*), got"
        ):
            load_image(cut)
        (tmp_path / "cut").write_bytes(cut)
        write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", ("cut",))])
        assert check_pairs(open_pairs(tmp_path / "p.jsonl"), images="decode").totals() == {"broken image": 1}


def test_empty_files_folders_and_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("<svg/>")
    for source in (tmp_path / "empty.png", tmp_path / "text.png", tmp_path, b"", Image.new("RGB", (0, 4))):
        with pytest.raises(ImageError, match="image must"):
            load_image(source)


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    write_pairs(tmp_path / "p.jsonl", [Pair("q", "c", "r", (name,)) for name in ("a.png", "b.png")])
    for name in ("a.png", "b.png"):
        for read in (load_image, image_module.check_image, image_module.read_source, image_module.read_image):
            with pytest.raises(ImageError, match=r"image must be a regular file, got .*[ab]\.png"):
                read(str(tmp_path / name))
    assert check_pairs(open_pairs(tmp_path / "p.jsonl")).totals() == {"missing image": 2}


def test_only_formats_that_pillow_reads_itself_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 0 0 rg 0 0 9 9 rectfill\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(eps)
    started = []
    monkeypatch.setattr(subprocess, "check_call", started.append)
    for source in (eps, tmp_path / "a.png", Image.open(io.BytesIO(eps))):
        with pytest.raises(ImageError, match="format"):
            load_image(source)
    assert not started


def test_a_grey_image_of_16_bits_is_scaled_in_parts_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(128, 512)
    image = Image.fromarray(values)
    whole = np.asarray(load_image(image))
    monkeypatch.setattr(image_module, "_GREY_BLOCK", 1500)
    assert (np.asarray(load_image(image)) == whole).all()
    assert (whole[..., 0] == np.rint(values * (255 / 65535))).all()


def test_the_limit_of_pixels_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    header = png(8, 0, [])[:16]
    rest = png(8, 0, [])[24:]

    def sized(width: int, height: int) -> bytes:
        body = header + width.to_bytes(4, "big") + height.to_bytes(4, "big") + rest
        crc = __import__("zlib").crc32(body[12:29]).to_bytes(4, "big")
        return body[:29] + crc + body[33:]

    for size in ((8_192, 8_193), (200_000, 200_000)):
        with pytest.raises(ImageError, match=r"at most 67,108,864 pixels.*MPO_MAX_IMAGE_PIXELS"):
            load_image(sized(*size))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns from half as many pixels on
        with pytest.raises(ImageError, match="truncated"):
            load_image(sized(8_192, 8_192))
    content = saved(Image.new("RGB", (40, 25)), "PNG")
    monkeypatch.setenv("MPO_MAX_IMAGE_PIXELS", "999")
    for source in (content, Image.new("L", (40, 25))):
        with pytest.raises(ImageError, match=r"at most 999 pixels .*, got 40 x 25"):
            load_image(source)
    monkeypatch.setenv("MPO_MAX_IMAGE_PIXELS", "1000")
    assert load_image(content).size == (40, 25)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own limit follows
    assert load_image(content).size == (40, 25)
    for text in ("0", "-1", "many", "1e9"):
        monkeypatch.setenv("MPO_MAX_IMAGE_PIXELS", text)
        with pytest.raises(ValueError, match="MPO_MAX_IMAGE_PIXELS must be a positive integer, got"):
            load_image(content)


# ---------------------------------------------------------------------- URLs in pairs and items


@pytest.fixture
def url_pairs(folder: Path, tmp_path: Path) -> Path:
    """Writes a file with four pairs that name the same image by different URLs and paths. Returns the file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rgba.png").write_bytes((folder / "rgba.png").read_bytes())
    path = tmp_path / "in" / "rgba.png"
    sources = [data_url(path.read_bytes()), path.as_uri(), str(path), "rgba.png"]
    pairs = [Pair(f"q{number}", "c", "r", (source,)) for number, source in enumerate(sources)]
    write_pairs(tmp_path / "in" / "p.jsonl", pairs)
    return tmp_path / "in" / "p.jsonl"


@pytest.mark.parametrize("format", ["pairs", "trl", "mmpr", "hf"])
def test_urls_survive_every_format(url_pairs: Path, tmp_path: Path, format: Any) -> None:
    file = FILES[NAMES.index("rgba.png")]
    out = tmp_path / "out" / ("p.jsonl" if format in ("pairs", "trl") else "folder")
    assert convert(open_pairs(url_pairs), out, format)[0] == 4
    source = open_pairs(out / "meta.json" if format == "mmpr" else out)
    pairs = [pair for _, pair in source.scan()]
    assert [pair.question for pair in pairs] == ["q0", "q1", "q2", "q3"]
    for pair in pairs:
        assert difference(load_image(pair.images[0]), file) <= 1
    assert pairs[0].images == read_pairs(url_pairs)[0].images
    assert {pair.images for pair in pairs[1:]} == {(str(url_pairs.parent / "rgba.png"),)}
    assert check_pairs(source).is_clean


def test_urls_in_mmpr_lines(folder: Path, tmp_path: Path) -> None:
    inside, outside = (folder / "rgba.png").as_uri(), Path(os.devnull).absolute().as_uri()
    images = [data_url((folder / "rgba.png").read_bytes()), inside, outside, "https://host/a.png", "a.png"]
    lines = [{"image": image, "question": "q", "chosen": "c", "rejected": f"r{n}"} for n, image in enumerate(images)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "meta.json").write_text(json.dumps({"a": {"root": str(folder), "annotation": "a.jsonl"}}))
    report = check_pairs(open_pairs(tmp_path / "meta.json"))
    assert report.totals() == {"bad image path": 1, "image is a URL": 1, "missing image": 1}
    assert [finding.where.line for finding in report.examples["image is a URL"]] == [4]
    convert(open_pairs(tmp_path / "meta.json"), tmp_path / "copy", "mmpr", skip_bad=True)
    written = [json.loads(line)["image"] for line in (tmp_path / "copy" / "annotations" / "a.jsonl").open()]
    assert written == [images[0], images[1], images[3], images[4]]


def test_items_take_urls_and_keep_their_subset(folder: Path) -> None:
    file = FILES[NAMES.index("rgba.png")]
    url = data_url((folder / "rgba.png").read_bytes())
    for image in (url, (folder / "rgba.png").as_uri(), "rgba.png", str(folder / "rgba.png")):
        for subset in (None, "s"):
            item = Item.from_dict({"question": "q", "image": image}, image_root=str(folder), subset=subset)
            assert item.problem is None
            assert difference(item.load_media()["images"][0], file) <= 1
            again = Item.from_dict(item.to_dict(), image_root=str(folder))
            assert again.subset == subset
            assert difference(again.load_media()["images"][0], file) <= 1
    for image in ("https://h/a.png", "s3://b/a.png", "file://host/a.png", "HTTP://h/a.png"):
        item = Item.from_dict({"question": "q", "image": image})
        assert item.problem == "images are URLs, which are not fetched: download them first"


def test_a_dry_run_takes_data_urls_as_images_that_exist(url_pairs: Path, tmp_path: Path) -> None:
    (overview,) = Mixture([SourceRecipe(path=str(url_pairs))]).inspect()
    assert (overview.images, overview.missing, overview.with_images) == (2, 0, 4)  # the URL, and three names of a file
    write_pairs(tmp_path / "b.jsonl", [Pair("q", "c", "r", (source,)) for source in (BARE, f"https://h/{LONG}")])
    (overview,) = Mixture([SourceRecipe(path=str(tmp_path / "b.jsonl"))]).inspect()
    assert overview.missing == 2
    assert all(len(example) < 190 + len(str(tmp_path)) for example in overview.examples)


def test_no_message_shows_a_whole_data_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mpo_ext.cli.main import main
    from mpo_ext.train.encode import BadPairError, _open

    broken = data_url(os.urandom(30_000))
    bare = base64.b64encode(os.urandom(30_000)).decode()  # base64 without "data:"
    url = f"https://host/{'x' * 30_000}"
    for number, source in enumerate((broken, bare, url)):
        pairs = tmp_path / f"{number}.jsonl"
        write_pairs(pairs, [Pair("q", "c", "r", (source,))])
        for command in (
            ["check", pairs], ["check", pairs, "--images", "decode"], ["check", pairs, "--images", "exists"],
            ["stats", pairs], ["view", pairs, "--out", tmp_path / "v.html"],
            ["convert", pairs, tmp_path / f"hf{number}", "--to", "hf", "--skip-bad"],
            ["convert", pairs, tmp_path / f"mmpr{number}", "--to", "mmpr"],
        ):  # fmt: skip
            main(["data", *map(str, command)])
            printed = capsys.readouterr()
            assert len(printed.out) + len(printed.err) < 2500, command
        with pytest.raises(BadPairError) as caught:
            _open(load_image, open_pairs(pairs).read(0)[1].images[0], "images[0]", "p:1")
        assert len(str(caught.value)) < 400
    assert len((tmp_path / "v.html").read_text()) < 20_000


def test_predictions_and_pages_cut_data_urls(tmp_path: Path) -> None:
    from scripted_engine import ScriptedEngine

    from mpo_ext.evaluate.run import evaluate

    url = data_url(saved(Image.fromarray(image_files.noise(3)), "PNG"))
    (tmp_path / "i.jsonl").write_text(json.dumps({"question": "q", "image": url, "answer": "7"}) + "\n")
    evaluate({"m": ScriptedEngine({"q": ["8"]})}, {"d": tmp_path / "i.jsonl"}, tmp_path / "out")
    assert url not in (tmp_path / "out" / "predictions-m.jsonl").read_text()
    page = (tmp_path / "out" / "failures.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert url not in page


def test_the_modes_of_images_in_memory() -> None:
    rgba = Image.fromarray(np.dstack([image_files.noise(3), image_files.noise(seed=1)]))
    shown = image_files.on_white(np.asarray(rgba)[..., :3].astype(float), np.asarray(rgba)[..., 3])
    rgb, levels = rgba.convert("RGB"), rgba.convert("L")
    expected = {mode: np.asarray(rgb.convert(mode).convert("RGB")) for mode in ("YCbCr", "HSV", "CMYK", "RGBX", "P")}
    sources = {mode: rgb.convert(mode) for mode in expected}
    la = Image.merge("LA", (levels, rgba.getchannel("A")))
    on_white = image_files.on_white(image_files.grey(np.asarray(levels).astype(float)), np.asarray(la)[..., 1])
    sources |= {"RGBA": rgba, "LA": la, "La": la.convert("La")}
    expected |= {"RGBA": shown, "LA": on_white, "La": on_white}
    # The second has a palette of RGBA and no other sign of transparency.
    for mode, source in (("PA", la.convert("PA")), ("P with RGBA", rgba.quantize(64))):
        colors = np.asarray(source.convert("RGBA"))
        sources[mode] = source
        expected[mode] = image_files.on_white(colors[..., :3].astype(float), colors[..., 3])
    opaque = rgba.copy()
    opaque.putalpha(200)  # premultiplied values of small opacities are too coarse to compare
    sources["RGBa"] = opaque.convert("RGBa")
    expected["RGBa"] = image_files.on_white(np.asarray(rgb).astype(float), np.full(rgb.size, 200))
    for mode, source in sources.items():
        image = load_image(source)
        assert image.mode == "RGB"
        tolerance = 2 if mode in ("La", "RGBa") else 1  # premultiplied values are rounded once more
        worst = abs(np.asarray(image).astype(int) - expected[mode].astype(int)).max()
        assert worst <= tolerance, mode


def test_image_errors_are_raised_for_open_files_too(tmp_path: Path) -> None:
    content = saved(Image.fromarray(image_files.noise(3)), "PNG")
    with (
        Image.open(io.BytesIO(content[:1000])) as lazy,
        pytest.raises(ImageError, match="got a PIL image of mode RGB"),
    ):
        load_image(lazy)

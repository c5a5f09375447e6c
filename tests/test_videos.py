"""Tests videos: which frames are taken from files and lists of frames, and which files are rejected."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpo_ext.images import ImageError
from mpo_ext.videos import (
    LoadedVideo,
    Video,
    VideoError,
    check_video,
    key_frames,
    load_video,
    set_video_defaults,
    video_settings,
)

av = pytest.importorskip("av", reason="needs the extra video")
from video_files import number_of, write_frames, write_video  # noqa: E402

FORMATS = {
    "mp4": "libx264", "mkv": "ffv1", "avi": "mpeg4", "webm": "libvpx-vp9", "ts": "mpeg2video", "mov": "mpeg4",
    "h264": "libx264", "hevc": "libx265",  # raw streams, which have no times and cannot seek
}  # fmt: skip


def numbers(video: LoadedVideo) -> list[int]:
    return [number_of(frame) for frame in video.frames]


@pytest.mark.parametrize("suffix", FORMATS)
def test_frames_at_equal_distances(tmp_path: Path, suffix: str) -> None:
    rate = 8 if suffix != "ts" else 25  # MPEG-2 knows few rates
    path = write_video(tmp_path / f"a.{suffix}", 24, rate=rate, codec=FORMATS[suffix])
    video = load_video(Video(str(path), fps=rate / 4))
    assert numbers(video) == [0, 4, 8, 12, 16, 20]
    assert video.times == pytest.approx([number * 4 / rate for number in range(6)], abs=2e-3)
    assert video.metadata()["frames_indices"] == [0, 4, 8, 12, 16, 20]
    assert video.metadata()["total_num_frames"] == 24
    assert video.metadata()["fps"] == pytest.approx(rate, rel=0.01)
    assert video.pixels().shape == (6, 48, 64, 3)
    assert numbers(load_video(Video(str(path), fps=1000.0))) == list(range(24))
    assert numbers(load_video(Video(str(path), fps=1000.0, max_frames=3))) == [0, 8, 16]
    assert numbers(load_video(Video(str(path), fps=0.001))) == [0]
    assert numbers(key_frames(Video(str(path)), 2)) == [0, 12]


def test_seeking_gives_the_frames_of_decoding_in_order(tmp_path: Path) -> None:
    """Checks that seeking finds the right frames. The video has 30 frames, and 1 to 30 of them are loaded.

    Some of the loaded frames lie right before or after a keyframe. A wrong seek would miss them.
    """
    path = str(write_video(tmp_path / "a.mp4", 30, keyframes=7))
    for count in range(1, 31):
        expected = [number * 30 // count for number in range(count)]
        assert numbers(load_video(Video(path, fps=1000.0, max_frames=count))) == expected, count


def test_frames_of_a_variable_rate(tmp_path: Path) -> None:
    """Loads a video whose frames are shown for different durations.

    At each sampling time, one frame is on the screen. These frames are loaded, each of them once. ``times`` holds
    their timestamps in the file.
    """
    path = write_video(tmp_path / "a.mkv", 6, stamps=[0, 1, 2, 10, 12, 14], codec="ffv1")
    video = load_video(Video(str(path), fps=4.0))
    # 8 times in 1.875 s. Frame 2 is shown from 0.25 s to 1.25 s, at four of these times, and taken once.
    assert numbers(video) == [0, 1, 2, 3, 4]
    assert video.times == pytest.approx([0, 0.125, 0.25, 1.25, 1.5], abs=2e-3)


def test_rotated_video(tmp_path: Path) -> None:
    """Loads a video with a rotation of 90 degrees.

    Its stored frames are white in the upper half, so the loaded frames must be white in the left part.
    """
    path = write_video(tmp_path / "a.mp4", [0] * 4, rotation=90)
    frame = np.asarray(load_video(str(path)).frames[0])
    assert frame.shape == (64, 48, 3)
    assert frame[:, :20].mean() > 200
    assert frame[:, 28:].mean() < 50


def test_frame_lists(tmp_path: Path) -> None:
    paths = write_frames(tmp_path, 10)
    video = load_video(Video(frames=tuple(paths), fps=5.0))
    assert numbers(video) == list(range(10))
    assert video.times == pytest.approx([number / 5 for number in range(10)])
    assert video.metadata()["duration"] == pytest.approx(2.0)
    video = load_video({"frames": paths, "max_frames": 4})
    assert numbers(video) == [0, 2, 5, 7]
    assert video.metadata()["fps"] == 2.0
    Image.new("RGB", (10, 10)).save(paths[3])
    with pytest.raises(VideoError, match="frames of one size, got 64 x 48 and 10 x 10"):
        load_video(paths)
    os.remove(paths[3])
    with pytest.raises(FileNotFoundError, match="image must be a file that exists"):
        load_video(paths)


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_video(tmp_path / "a.mp4", 24))
    monkeypatch.setenv("MPO_VIDEO_FPS", "")
    monkeypatch.setenv("MPO_VIDEO_MAX_FRAMES", "")
    assert len(load_video(path).frames) == 6  # 3 seconds at 2 frames per second
    assert video_settings() == {}
    set_video_defaults(1.0, 2)
    assert len(load_video(path).frames) == 2
    assert video_settings() == {"fps": 1.0, "max_frames": 2}
    assert len(load_video(Video(path, fps=4.0, max_frames=30)).frames) == 12
    monkeypatch.setenv("MPO_VIDEO_FPS", "fast")
    with pytest.raises(ValueError, match="MPO_VIDEO_FPS must be a positive number, got 'fast'"):
        load_video(path)


def test_refused_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", 24)
    with pytest.raises(FileNotFoundError, match="video must be a file that exists"):
        load_video(str(tmp_path / "none.mp4"))
    with pytest.raises(VideoError, match="must be a file, got the URL https"):
        load_video("https://example.org/a.mp4")
    with pytest.raises(VideoError, match="must be a file, got the URL data:"):
        load_video("data:video/mp4;base64,AAAA")
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="video must be a regular file"):
        load_video(str(tmp_path / "pipe.mp4"))
    with pytest.raises(VideoError, match="video must be a regular file"):
        load_video(str(tmp_path))
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(VideoError, match="video must be readable"):
        load_video(str(tmp_path / "text.mp4"))
    monkeypatch.setenv("MPO_MAX_VIDEO_BYTES", "100")
    with pytest.raises(VideoError, match="at most 100 bytes"):
        load_video(str(path))
    monkeypatch.delenv("MPO_MAX_VIDEO_BYTES")
    monkeypatch.setenv("MPO_MAX_IMAGE_PIXELS", "1000")
    with pytest.raises(VideoError, match="at most 1,000 pixels per frame, got 64 x 48"):
        load_video(str(path))
    assert issubclass(VideoError, ImageError)


@pytest.mark.parametrize("text", ["#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
                                  "ffconcat version 1.0\nfile '{}'\n"])  # fmt: skip
def test_playlists_open_no_other_file(tmp_path: Path, text: str) -> None:
    path = write_video(tmp_path / "a.mp4", 8)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(text.format(path))
    with pytest.raises(VideoError, match=r"video must be readable, .*Invalid (argument|data)"):
        load_video(str(playlist))


def test_damaged_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", 24, codec="mpeg4")
    content = path.read_bytes()
    for size in range(0, len(content), max(1, len(content) // 15)):
        path.write_bytes(content[:size])
        with contextlib.suppress(VideoError):
            assert load_video(str(path)).frames
    sound = tmp_path / "sound.wav"
    sound.write_bytes(b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\0\0\0")
    with pytest.raises(VideoError):
        load_video(str(sound))


def test_check_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 24)
    assert check_video(str(path)) == check_video(str(path), decode=True) == []
    with pytest.raises(VideoError):
        check_video(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        check_video(str(tmp_path / "b.mp4"))


VALUES = [
    ("a.mp4", Video("a.mp4")),
    (["0.png", "1.png"], Video(frames=("0.png", "1.png"))),
    ({"path": "a.mp4", "fps": 1.5}, Video("a.mp4", fps=1.5)),
    ({"frames": ["0.png"], "fps": 4, "max_frames": 8}, Video(frames=("0.png",), fps=4, max_frames=8)),
]


@pytest.mark.parametrize(("value", "video"), VALUES)
def test_values(value: object, video: Video) -> None:
    assert Video.from_value(value) == video
    assert json.loads(json.dumps(video.to_value())) == value
    assert Video.from_value({"video": value if not isinstance(value, dict) else "a.mp4"}).paths


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (3, TypeError, "videos must be paths"),
        ([], ValueError, "must have a path or a list of frames, got neither"),
        ("", ValueError, "got neither"),
        ([1], TypeError, r"frames\[0\] of a video must be a str"),
        ({"path": "a", "frames": ["b"]}, ValueError, "must name one of path, video and frames"),
        ({"path": ["a"]}, ValueError, "path in videos must be a path"),
        ({"frames": "a"}, ValueError, "frames in videos must be a list of paths"),
        ({"path": "a", "start": 1}, ValueError, "got 'start'"),
        ({"path": "a", "fps": 0}, ValueError, "fps must be"),
        ({"path": "a", "fps": "2"}, TypeError, "fps must be"),
        ({"path": "a", "max_frames": 0}, ValueError, "max_frames must be"),
        ("a\0b", ValueError, "must be a path"),
    ],
)
def test_refused_values(value: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        Video.from_value(value)

"""Options, exit statuses and error messages that several commands share."""

import argparse
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mpo_ext.checks import DefectError, LinesError, check_choice, install_hint
from mpo_ext.media_limits import restored_limits

# The names in ``mpo_ext.answers`` and ``mpo_ext.generate.prompts``, which are imported when a command runs.
MATCHERS = ("exact", "choice", "number", "chart", "anls", "vqa", "math", "custom", "any")
ENGINES = ("transformers", "vllm", "openai")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Options that an engine does not have, with advice.
_MISPLACED = (
    ("vllm", "device", "set CUDA_VISIBLE_DEVICES"),
    ("vllm", "batch_size", "use --engine-option max_num_seqs=N"),
    ("openai", "device", "the server decides"),
    ("openai", "dtype", "the server decides"),
    ("openai", "batch_size", "use --engine-option concurrency=N"),
    *((engine, name, "it is an option of openai") for engine in ENGINES[:2] for name in ("base_url", "api_key_env")),
)
Command = Callable[[argparse.Namespace], int]
FAILED, WRONG_SETTINGS = 1, 2  # exit statuses; argparse also exits with 2 for wrong arguments
# Errors of the operating system about the paths that a user names, such as "no such file", not about their contents.
_PATH_ERRORS = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
    errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
}  # fmt: skip


def exit_status(error: Exception) -> int:
    """Returns the exit status for an expected error of a command.

    The status is 2 if the user must change arguments, settings, paths or installed packages. Otherwise it is 1.
    """
    if isinstance(error, DefectError):
        return FAILED
    if isinstance(error, (ImportError, TypeError, ValueError)):
        return WRONG_SETTINGS
    # Libraries raise OSError without a number if a folder does not hold a model, for example.
    if isinstance(error, OSError) and (error.errno is None or error.errno in _PATH_ERRORS):
        return WRONG_SETTINGS
    return FAILED


def command(name: str, extra: str, *, failure: int = FAILED) -> Callable[[Command], Command]:
    """Returns a decorator for the function of a command. The decorated function returns an exit status.

    The decorated function runs the command with the limits of ``add_image_limit``, which it restores afterwards. After
    an expected error, it prints the error on stderr, and returns the larger of ``exit_status(error)`` and ``failure``.
    With ``--debug``, it raises the error instead. After SIGINT, it returns 130.

    Args:
        name: Name of the command in messages.
        extra: Extra of mpo_ext that installs the dependencies of the command, such as "train".
        failure: Minimum exit status after an expected error. It is 2 for commands that return 1 for another reason,
            such as defective data.
    """

    def decorate(run: Command) -> Command:
        @functools.wraps(run)
        def guarded(args: argparse.Namespace) -> int:
            try:
                with restored_limits():
                    apply_media_options(args)
                    status = run(args)
                sys.stdout.flush()
                return status
            except BrokenPipeError:
                return leave_broken_pipe()
            except KeyboardInterrupt:
                if getattr(args, "debug", False):
                    raise
                print(f"mpo-ext {name}: interrupted; the same command resumes a run that it began", file=sys.stderr)
                return 130
            except (ImportError, OSError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
                if getattr(args, "debug", False):
                    raise
                print(f"mpo-ext {name}: {_describe(error, name, extra)}", file=sys.stderr)
                return max(exit_status(error), failure)

        return guarded

    return decorate


def _describe(error: Exception, name: str, extra: str) -> str:
    text = str(error) if isinstance(error, LinesError) else " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, IsADirectoryError) and error.filename is not None:
        from mpo_ext.data.hub import describe_folder

        return f"{error.filename} must be a file, got {describe_folder(error.filename)}"
    if isinstance(error, ImportError) and "pip install" not in text:
        return f"{text}: {install_hint(extra)}"
    if "trust_remote_code=True" in text:
        setting = "model.trust_remote_code=true" if name in ("train", "plan") else "--trust-remote-code"
        return f"{text}\n{setting} does so"
    return text


def leave_broken_pipe() -> int:
    """Handles a closed pipe at stdout: redirects stdout to the null device, and returns the exit status 1."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--debug``: errors are raised with their traceback."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def at_least(least: int) -> Callable[[str], int]:
    """Returns a ``type`` for ``add_argument`` that parses an integer of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return parse


def file_path(text: str) -> Path:
    """Parses a path, for ``type`` of ``add_argument``. An empty text, as of an unset variable, is refused."""
    if not text:  # Path("") would be the current folder
        raise argparse.ArgumentTypeError("must be a path, got an empty text")
    return Path(text)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments RECIPE and KEY=VALUE. KEY=VALUE arguments may also follow options."""
    parser.add_argument("recipe", help="YAML file; its relative paths start at the current folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE",
        help="setting in place of the recipe's, as in optim.learning_rate=1e-6 or 'data.train=[a.jsonl, b.jsonl]'",
    )  # fmt: skip
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments like argparse, but also finds KEY=VALUE arguments after options.

        argparse would return such arguments as unknown. This function adds them to ``overrides``.
        """
        namespace, rest = parse(args, namespace)
        for text in rest:
            if text.startswith("--") and "." in text.partition("=")[0]:
                setting = text.lstrip("-")
                example = setting if "=" in setting else f"{setting}=VALUE"
                parser.error(f"settings must be given as KEY=VALUE without dashes, as {example}, got {text}")
        late = [text for text in rest if "=" in text and not text.startswith("-")]
        namespace.overrides = [*namespace.overrides, *late]
        return namespace, [text for text in rest if text not in late]

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def add_image_limit(parser: argparse.ArgumentParser) -> None:
    """Adds ``--max-image-pixels``, ``--video-fps`` and ``--video-max-frames``.

    The decorator ``command`` applies these options before it runs a command.
    """
    text = "maximum number of pixels of an image; a larger one is refused (default: 67108864)"
    parser.add_argument("--max-image-pixels", type=at_least(1), metavar="N", help=text)
    text = "frames per second of videos that do not set fps (default: 2)"
    parser.add_argument("--video-fps", type=float, metavar="N", help=text)
    text = "maximum number of frames of videos that do not set max_frames (default: 64)"
    parser.add_argument("--video-max-frames", type=at_least(1), metavar="N", help=text)


def apply_media_options(args: argparse.Namespace) -> None:
    """Applies the options of ``add_image_limit`` to this process and the processes that it starts."""
    if getattr(args, "max_image_pixels", None) is not None:
        from mpo_ext.images import set_max_pixels

        set_max_pixels(args.max_image_pixels)
    if getattr(args, "video_fps", None) is not None or getattr(args, "video_max_frames", None) is not None:
        from mpo_ext.videos import set_video_defaults

        set_video_defaults(args.video_fps, args.video_max_frames)


def add_root_map(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--root-map OLD=NEW``, which may be repeated."""
    parser.add_argument(
        "--root-map", action="append", default=[], metavar="OLD=NEW",
        help="where folders have moved to; may be repeated",
    )  # fmt: skip


def add_system(parser: argparse.ArgumentParser) -> None:
    """Adds the option ``--system``, the system prompt."""
    parser.add_argument("--system", metavar="TEXT", help="system prompt of the items that have none (default: none)")


def root_map(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns the (old, new) path prefixes given by ``--root-map``."""
    from mpo_ext.data.paths import parse_root_map

    return [parse_root_map(text) for text in args.root_map]


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the engine that generates responses."""
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0])
    parser.add_argument("--base-url", metavar="URL", help="address of the server of openai: http://localhost:8000/v1")
    parser.add_argument(
        "--api-key-env", metavar="NAME",
        help="environment variable with the key for the server of openai (default: OPENAI_API_KEY)",
    )  # fmt: skip
    add_chat(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the model (default: auto, as saved)")
    parser.add_argument("--device", help="device of transformers (default: the GPU of this process, or the CPU)")
    parser.add_argument("--batch-size", type=int, help="samples per batch of transformers (default: 16)")
    parser.add_argument(
        "--block-size", type=int, default=64,
        help="responses per block; a killed process loses its unfinished blocks (default: 64)",
    )  # fmt: skip


def add_chat(parser: argparse.ArgumentParser) -> None:
    """Adds the options for loading and using a model's processor."""
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the Python code that a model brings in its folder or repository (default: such models are refused)",
    )  # fmt: skip
    parser.add_argument(
        "--engine-option", action="append", default=[], metavar="NAME=JSON",
        help="passed to from_pretrained, VLLMEngine or OpenAIEngine, as in --engine-option tensor_parallel_size=2",
    )  # fmt: skip
    parser.add_argument("--chat-template", metavar="FILE", help="chat template to use instead of the model's")
    parser.add_argument(
        "--chat-template-kwargs", metavar="JSON", default="{}",
        help="variables for the chat template, as in '{\"enable_thinking\": false}'",
    )  # fmt: skip


def load_engine(args: argparse.Namespace, model: str) -> Any:
    """Loads a model into the engine that the options select, and returns the engine.

    Raises ValueError for options that this engine does not have.
    """
    options = engine_options(args)
    for engine, name, advice in _MISPLACED:
        if args.engine == engine and (value := getattr(args, name)) not in (None, "auto"):
            raise ValueError(
                f"--{name.replace('_', '-')} must be left out with --engine {engine}, got {value}: {advice}"
            )
    if args.engine == "vllm":
        from mpo_ext.generate.vllm_engine import VLLMEngine

        return VLLMEngine(model, dtype=args.dtype, chat_options=chat_options(args), **options)
    if args.engine == "openai":
        from mpo_ext.generate.openai_engine import OpenAIEngine

        if args.base_url is None:
            raise ValueError(
                "--base-url must be given with --engine openai, as in --base-url http://localhost:8000/v1"
            )
        if args.api_key_env is not None:
            options["api_key_env"] = args.api_key_env
        return OpenAIEngine(model, base_url=args.base_url, chat_options=chat_options(args), **options)
    from mpo_ext.generate.transformers_engine import TransformersEngine

    return TransformersEngine.from_pretrained(
        model,
        dtype=args.dtype,
        device=args.device,
        batch_size=16 if args.batch_size is None else args.batch_size,
        chat_options=chat_options(args),
        **options,
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments for an engine from ``--trust-remote-code`` and ``--engine-option``."""
    options = parse_json_options("--engine-option", args.engine_option)
    return {"trust_remote_code": args.trust_remote_code, **options}


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments for ``mpo_ext.chat.ChatEncoder`` from the command line."""
    template = None
    if args.chat_template is not None:
        with open(args.chat_template, encoding="utf-8") as file:
            template = file.read()
    try:
        kwargs = json.loads(args.chat_template_kwargs)
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise ValueError(f"--chat-template-kwargs must be a JSON object, got {args.chat_template_kwargs[:80]!r}")
    return {"chat_template": template, "chat_template_kwargs": kwargs}


def add_matcher(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the matcher that compares answers."""
    parser.add_argument(
        "--matcher", default="vqa",
        help=f"how answers are compared: {', '.join(MATCHERS)} (default: vqa); items with options: choice",
    )  # fmt: skip
    parser.add_argument(
        "--matcher-option", action="append", default=[], metavar="NAME=JSON", help="option of the matcher"
    )


def matcher_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments for ``mpo_ext.answers.matcher`` from the command line: the kind and its options."""
    check_choice("--matcher", args.matcher, MATCHERS)
    return {"kind": args.matcher, **parse_json_options("--matcher-option", args.matcher_option)}


def parse_json_options(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    """Parses strings NAME=JSON, and returns the values by name. A value that is not JSON stays a string.

    ``flag`` is the name of the option in error messages.

    Raises:
        ValueError: If a string does not have this form, or two strings have the same name.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.isidentifier() or not equals:
            raise ValueError(f"{flag} must read NAME=JSON, got {text!r}")
        if name in options:
            raise ValueError(f"{flag} must give each name once, got {name} twice")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options

"""Runs programs in forked processes. A forked process need not repeat slow imports.

A request is a JSON line that describes a program. The answer is the exit code of the program.
"""

import json
import os
import runpy
import sys
import traceback


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    import mpo_ext.__main__
    import mpo_ext.cli.data
    import mpo_ext.generate.transformers_engine
    import mpo_ext.train.loop  # noqa: F401

    for line in requests:
        words, folder, output = json.loads(line)
        pid = os.fork()
        if pid == 0:
            requests.close()
            answers.close()
            _run(words, folder, output)
        _, status = os.waitpid(pid, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()
    os._exit(0)  # without the seconds that torch takes to end


def _run(words: list[str], folder: str, output: str) -> None:
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(folder)
        sys.path[0] = folder
        code = _program(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _program(words: list[str]) -> int:
    if words[0] == "mpo-ext":
        sys.argv = words
        import mpo_ext.__main__

        return mpo_ext.__main__.main(words[1:])
    if words[0] == "python":
        words = words[1:]
    if words[0] == "-c":
        sys.argv = words[:1]
        exec(compile(words[1], "<block>", "exec"), {"__name__": "__main__"})
        return 0
    sys.argv = words
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    main()

"""The helper process that compares expressions for ``MathMatcher``. A Python process has at most one helper."""

import atexit
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import threading
from typing import Any

_BOUND = re.compile(r"\\(?:(?:i{1,3}|oi)nt|sum|prod|lim|max|min|det|begin)|\bd/d")
# Commands, texts and names of functions
_NO_VARIABLES = re.compile(
    r"\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+|\b[A-Za-z]\s*'*\(|[\u03c0\u00b0\u2205\u221e]"
)


def check_result(is_equal: bool, truth: Any, prediction: Any, truth_text: str, prediction_text: str) -> str:
    """Corrects the result of math-verify, and returns "equal", "different", "rounded" or "unread".

    ``MathProcess.compare`` explains these results. Three errors of math-verify are corrected:

    - math-verify rounds to six decimals, so it treats all tiny numbers as equal. The values of equal expressions must
      therefore also agree within a relative tolerance of 1e-6.
    - math-verify cannot compare an inequality with a set (such as an interval), and reports a difference. For such a
      pair, this function returns "unread".
    - math-verify leaves out what it cannot read: it reads "3√x" as 3. If the expression lacks a letter of the text,
      this function returns "unread".

    Args:
        is_equal: Result of math-verify: whether the prediction equals the truth.
        truth: The truth as a sympy object.
        prediction: The prediction as a sympy object.
        truth_text: The truth as text. The text shows the number of decimals.
        prediction_text: The prediction as text.
    """
    import sympy

    if not (_has_all_letters(truth, truth_text) and _has_all_letters(prediction, prediction_text)):
        return "unread"
    if isinstance(truth, sympy.Eq) and isinstance(prediction, sympy.Eq) and truth.lhs == prediction.lhs:
        truth, prediction = truth.rhs, prediction.rhs
    if not is_equal:
        kinds = [isinstance(each, (sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)) for each in (truth, prediction)]
        sets = [isinstance(each, sympy.Set) for each in (truth, prediction)]
        if any(kinds) and any(sets):
            return "unread"
    if not all(isinstance(each, sympy.Expr) for each in (truth, prediction)):
        return "equal" if is_equal else "different"
    symbols = sorted(truth.free_symbols | prediction.free_symbols, key=str)
    primes = {symbol: sympy.Rational(sympy.prime(number), 7) for number, symbol in enumerate(symbols, 5)}
    values = [complex(each.subs(primes).evalf(20)) for each in (truth, prediction)]
    distance = abs(values[0] - values[1])
    if is_equal and not math.isfinite(distance):
        return "equal"
    if is_equal:
        return "equal" if distance <= 1e-6 * max(map(abs, values)) else "different" if not symbols else "unread"
    for text in (truth_text, prediction_text):
        decimal = re.fullmatch(r"[+-]?[0-9]*\.([0-9]{1,15})", text.strip("$ "))
        if decimal and not symbols and 2 * distance <= 10.0 ** -len(decimal[1]):
            return "rounded"
    return "different"


def _has_all_letters(expression: Any, text: str) -> bool:
    """Returns whether an expression has all variables of its text. Texts with bound variables are not checked."""
    import sympy

    if not isinstance(expression, sympy.Expr) or _BOUND.search(text):
        return True
    bare = _NO_VARIABLES.sub(" ", text)
    names = "".join(str(symbol) for symbol in expression.free_symbols).casefold()
    return bare.isascii() and set(re.findall("[a-df-hk-z]", bare.casefold())) <= set(names)


def serve() -> None:
    """Runs in the helper process. Reads two expressions from each line of stdin, and prints whether they are equal.

    Requests and results are JSON objects. The first printed line is ``{"ready": true}``. If math-verify cannot be
    imported, it is ``{"error": ...}``.
    """
    import logging
    import signal

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, also within a long C call
    except (ImportError, AttributeError, ValueError, OSError):
        pass
    logging.disable(logging.CRITICAL)
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        rules = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)  # it drops b from "2ab"
        configs = [LatexExtractionConfig(normalization_config=rules), ExprExtractionConfig()]
    except Exception as error:
        print(json.dumps({"error": repr(error)}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)

    def read(text: str) -> list:
        has_delimiters = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
        options = {"fallback_mode": "no_fallback", "parsing_timeout": None, "extraction_config": configs}
        return parse(text if has_delimiters else f"${text}$", **options) or parse(text, **options)

    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        try:
            truth, prediction = read(request["truth"]), read(request["prediction"])
            if not truth or not prediction:
                result = "unread"
            else:
                is_equal = verify(truth, prediction, timeout_seconds=None)
                result = check_result(is_equal, truth[0], prediction[0], request["truth"], request["prediction"])
        except Exception:
            result = "unread"
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"result": result}), flush=True)


class MathProcess:
    """A helper process that compares expressions, one pair of expressions at a time.

    The process starts with the first comparison.
    """

    START = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import serve; serve()"
    START_SECONDS = 120.0
    GRACE_SECONDS = 1.0  # waiting time after the time limit, at which the process ends itself

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def compare(self, prediction: str, truth: str, seconds: float) -> str:
        """Compares two expressions within a time limit of ``seconds``.

        Returns:
            - "equal" or "different".
            - "rounded" if one expression is a decimal number, and the other expression rounds to this number. Example:
              "1.41" and the square root of 2.
            - "unread" if math-verify cannot read or compare the expressions.
            - "unfinished" if the time limit is reached or the helper process dies.

        Raises:
            RuntimeError: If the helper process cannot start, for example because math-verify is missing.
        """
        request = {"prediction": prediction, "truth": truth, "seconds": seconds}
        with self._lock:
            process = self._started()
            reply = self._ask(process, json.dumps(request), seconds + self.GRACE_SECONDS)
            if reply is None:
                self._stop()
                return "unfinished"
            return str(reply["result"])

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                # -I: otherwise "-c" imports from the current folder, which may hold anyone's json.py.
                [sys.executable, "-I", "-c", self.START, json.dumps(_import_path())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
            reply = self._ask(self._process, None, self.START_SECONDS)
            if reply is None or "error" in reply:
                self._stop()
                raise RuntimeError(f"math-verify did not start: {(reply or {}).get('error', 'its process ended')}")
        return self._process

    @staticmethod
    def _ask(process: subprocess.Popen[str], line: str | None, seconds: float) -> dict[str, Any] | None:
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            reply = process.stdout.readline()
        except OSError:
            return None
        finally:
            timer.cancel()
        return json.loads(reply) if reply.endswith("\n") else None

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # the process died before it read the request
                    pipe.close()

    def close(self) -> None:
        with self._lock:
            self._stop()


def _import_path() -> list[str]:
    """Returns the helper's ``sys.path``. The current folder is left out, and mpo_ext's parent folder is added."""
    here = os.path.realpath(os.curdir)
    folders = [folder for folder in sys.path if folder and os.path.realpath(folder) != here]
    return [*folders, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]


_inherited: list[MathProcess] = []  # helpers of the parent process, which a forked child must neither end nor await


@functools.cache
def math_process() -> MathProcess:
    """Returns the helper process of the current Python process."""
    process = MathProcess()
    atexit.register(process.close)
    return process


def _forget_process() -> None:
    if math_process.cache_info().currsize:
        process = math_process()
        atexit.unregister(process.close)
        _inherited.append(process)
        math_process.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_process)

"""The helper process that compares expressions for ``MathMatcher``. A Python process has at most one helper."""

import atexit
import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import threading
from typing import Any


def check_result(is_equal: bool, truth: Any, prediction: Any, truth_text: str, prediction_text: str) -> str:
    """Corrects the result of math-verify, and returns "equal", "different", "rounded" or "unread".

    ``MathProcess.compare`` explains these results. Two errors of math-verify are corrected:

    - math-verify rounds to six decimals, so it treats all tiny numbers as equal. The values of equal expressions must
      therefore also agree within a relative tolerance of 1e-6.
    - math-verify cannot compare an inequality with a set (such as an interval), and reports a difference. It also
      reports a difference for inequalities that are written differently. Such pairs are "unread", unless both sides
      are inequalities of the same variable. These are compared by their solutions.
    - math-verify reads "i" and "e" as variables. Two expressions that are equal if "i" is the imaginary unit and "e"
      is Euler's number are "unread".

    Args:
        is_equal: Result of math-verify: whether the prediction equals the truth.
        truth: The truth as a sympy object.
        prediction: The prediction as a sympy object.
        truth_text: The truth as text. The text shows the number of decimals.
        prediction_text: The prediction as text.
    """
    import sympy

    if isinstance(truth, sympy.Eq) and isinstance(prediction, sympy.Eq) and truth.lhs == prediction.lhs:
        truth, prediction = truth.rhs, prediction.rhs
    if not is_equal and (_has_inequality(truth) or _has_inequality(prediction)):
        return _compare_solutions(truth, prediction)
    if _is_other_kind(truth, prediction, truth_text, prediction_text):
        return "unread"
    if not is_equal and all(isinstance(each, sympy.Eq) for each in (truth, prediction)):
        return "unread" if _compare_solutions(truth, prediction) == "equal" else "different"  # "2x = 8" and "x = 4"
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
    meanings = {"i": sympy.I, "e": sympy.E}
    constants = {symbol: meanings[str(symbol)] for symbol in symbols if str(symbol) in meanings}
    numbers = [complex(each.subs(constants).subs(primes).evalf(20)) for each in (truth, prediction)]
    if symbols and abs(numbers[0] - numbers[1]) <= 1e-6 * max(map(abs, numbers)):
        return "unread"
    unevaluated = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit)
    if symbols and (truth.has(*unevaluated) or prediction.has(*unevaluated)):
        return "unread"
    for text in (truth_text, prediction_text):
        decimal = re.fullmatch(r"[+-]?[0-9]*\.([0-9]{1,15})", text.strip("$ "))
        if decimal and not symbols and 2 * distance <= 10.0 ** -len(decimal[1]):
            return "rounded"
    return "different"


def _is_other_kind(truth: Any, prediction: Any, truth_text: str, prediction_text: str) -> bool:
    r"""Returns whether one expression is a tuple or an interval, and the other a matrix or a set in braces.

    math-verify compares the elements only.
    """
    import sympy

    sides = (truth, truth_text.strip("$ ")), (prediction, prediction_text.strip("$ "))
    for (first, first_text), (second, second_text) in (sides, sides[::-1]):
        if isinstance(first, sympy.MatrixBase) and isinstance(second, sympy.Set | sympy.Tuple):
            return True
        is_tuple = second_text.removeprefix(r"\left").startswith(("(", "["))
        if isinstance(first, sympy.Set) and first_text.removeprefix(r"\left").startswith((r"\{", "{")) and is_tuple:
            return isinstance(second, sympy.Set | sympy.Tuple)
    return False


def _has_inequality(expression: Any) -> bool:
    """Returns whether an expression is an inequality, or has inequalities as parts ("1 < x < 2")."""
    import sympy

    kinds = (sympy.Ne, sympy.Lt, sympy.Le, sympy.Gt, sympy.Ge)
    return any(isinstance(part, kinds) for part in sympy.preorder_traversal(expression))


def _compare_solutions(truth: Any, prediction: Any) -> str:
    """Compares two inequalities of the same variable by their solutions; returns "equal", "different" or "unread"."""
    from sympy.logic.boolalg import Boolean

    if not all(isinstance(each, Boolean) for each in (truth, prediction)):
        return "unread"
    if len(truth.free_symbols) != 1 or truth.free_symbols != prediction.free_symbols:
        return "unread"
    try:
        solutions = [_solutions(each) for each in (truth, prediction)]
    except Exception:  # sympy raises errors of many types for relations that it cannot solve
        return "unread"
    return "equal" if solutions[0] == solutions[1] else "different"


def _solutions(relation: Any) -> Any:
    """Returns the set of solutions of a relation in one real variable, such as "x < 2" or "x in [1, 2]"."""
    import sympy

    if isinstance(relation, sympy.Eq) and isinstance(relation.rhs, sympy.Set):
        return relation.rhs
    (variable,) = relation.free_symbols
    return relation.subs(variable, sympy.Symbol("real", real=True)).as_set()


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
        from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except Exception as error:
        print(json.dumps({"error": repr(error)}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)

    # Further configurations of math-verify search the text for a number, and drop letters at its end as a unit.
    normalization = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True)
    target = LatexExtractionConfig(normalization_config=normalization)

    def read(text: str) -> list:
        has_delimiters = any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed"))
        text = text if has_delimiters else f"${text}$"
        return parse(text, extraction_config=[target], fallback_mode="no_fallback", parsing_timeout=None)

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

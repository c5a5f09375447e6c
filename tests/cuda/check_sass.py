"""Checks the machine code (SASS) of the built CUDA module, and prints a table of registers.

    python tests/cuda/check_sass.py [FILE ...] [--json results/machine_code.json]

Innermost loops over logits or rows must not spill registers to local memory. Spills elsewhere are allowed: some
kernels run four thread blocks per multiprocessor, and have only 64 registers per thread.

In code for sm_80 and sm_90, the main loops must load 128 bits at a time. The main loops of logits_grad and exp_logits
must also store 128 bits at a time. They must store 64 bits if an output element has half the size of a logit.

``--json`` writes registers, spills and instructions per logit, for docs/performance.md. The program cuobjdump is taken
from PATH or from the triton package.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

#: token_logp: 3 types, with and without statistics and pair loss; logits_grad: 6 pairs of types; exp_logits: 3 types;
#: pair_loss.
KERNELS = 22
VECTORS_IN_FLIGHT = 4  # rows.cuh: kUnroll
#: Minimum length of the loop over pairs, which runs once per 256 pairs; main loops have up to 400 instructions.
PAIRS_LOOP = 1000
DISASSEMBLED = ("sm_80", "sm_90")
COUNTED = ("sm_80", "sm_90", "sm_100")


def find_cuobjdump() -> str | None:
    """Returns the path of cuobjdump on PATH or inside the triton package; None if it is missing."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def _output(command: list[str], module: str) -> list[str]:
    """Runs a command once for each file, and returns all printed lines.

    ``module`` has the paths of the files, separated by ``os.pathsep``.
    """
    lines = []
    for file in module.split(os.pathsep):
        lines += subprocess.run([*command, file], capture_output=True, text=True, check=True).stdout.splitlines()
    return lines


def resources(module: str, cuobjdump: str) -> dict[tuple[str, str], dict[str, int]]:
    """Maps (architecture, kernel) to the kernel's use of registers, stack, local and shared memory.

    ``module`` has the paths of one or more files, separated by ``os.pathsep``, such as the fatbins of csrc/mpo/cuda.
    """
    found: dict[tuple[str, str], dict[str, int]] = {}
    arch = kernel = ""
    for line in _output([cuobjdump, "--dump-resource-usage"], module):
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif line.lstrip().startswith("REG:"):
            found[arch, kernel] = {
                key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)
            }
    return found


def disassembly(module: str, cuobjdump: str, arch: str) -> dict[str, list[tuple[int, str]]]:
    """Maps each kernel to its SASS instructions, a list of (address, text)."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    kernel = ""
    for line in _output([cuobjdump, "-sass", "-arch", arch], module):
        if match := re.match(r"\s*Function : (\S+)", line):
            kernel = match[1]
        elif match := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);", line):
            found[kernel].append((int(match[1], 16), match[2].strip()))
    return dict(found)


def innermost_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Returns the instructions of each loop that contains no other loop."""
    loops = []
    for address, instruction in code:
        if match := re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", instruction):
            target = int(match[1], 16)
            if target < address:
                loops.append((target, address))
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [[text for address, text in code if begin <= address <= end] for begin, end in innermost]


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """Returns the instructions of the innermost loop with the most exponentials; [] if the code has no loop."""
    return max(innermost_loops(code), key=lambda body: sum("MUFU.EX2" in text for text in body), default=[])


def spills(body: list[str]) -> int:
    """Returns the number of instructions that access local memory, which holds spilled registers."""
    return sum(bool(re.match(r"(@\S+ )?(STL|LDL)\b", text)) for text in body)


def name_of(kernel: str) -> str:
    """Returns a readable kernel name, such as ``token_logp bfloat16 stats pair``, for a mangled name."""
    kind = next(
        kind for kind in ("token_logp", "logits_grad", "exp_logits", "pair_loss") if f"{kind}_kernel" in kernel
    )
    types = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
    match = re.search(rf"_kernelI({'|'.join(types)})(?:Lb(\d)ELb(\d))?({'|'.join(types)})?", kernel)
    if match is None:
        return kind
    parts = [kind, types[match[1]], *(["stats"] * (match[2] == "1")), *(["pair"] * (match[3] == "1"))]
    if match[4] and match[4] != match[1]:  # a gradient in another type than its logits
        parts.append(f"to {types[match[4]]}")
    return " ".join(parts)


def problems(module: str, cuobjdump: str) -> list[str]:
    """Returns a message for each problem of the compiled kernels in ``module``.

    Problems are a wrong number of kernels, a loop that spills registers, and narrow loads or stores in a main loop.
    """
    found = []
    per_arch: dict[str, int] = defaultdict(int)
    for arch, _ in resources(module, cuobjdump):
        per_arch[arch] += 1
    if not per_arch:
        found.append(f"{module} does not contain kernels")
    found += [f"{arch} has {n} kernels instead of {KERNELS}" for arch, n in per_arch.items() if n != KERNELS]
    for arch in sorted(per_arch):
        for kernel, code in disassembly(module, cuobjdump, arch).items():
            name = name_of(kernel)
            if any(spills(body) for body in innermost_loops(code) if len(body) < PAIRS_LOOP):
                found.append(f"{name} for {arch} spills in a loop")
            if name != "pair_loss" and arch in DISASSEMBLED:
                found += _narrow_accesses(name, arch, main_loop(code))
    return found


def _narrow_accesses(name: str, arch: str, body: list[str]) -> list[str]:
    """Returns a list with a message if a main loop has a wrong number of vector loads or stores; otherwise []."""
    loads = sum(bool(re.search(r"\bLDG\.E\S*\.128", text)) for text in body)
    # Half of a vector of float32 logits.
    is_narrow = name.startswith("logits_grad float32 to") or name in ("exp_logits bfloat16", "exp_logits float16")
    width = 64 if is_narrow else 128
    stores = sum(bool(re.search(rf"\bSTG\.E\S*\.{width}", text)) for text in body)
    wanted = 0 if name.startswith("token_logp") else VECTORS_IN_FLIGHT
    if (loads, stores) == (VECTORS_IN_FLIGHT, wanted):
        return []
    return [f"{name} for {arch}: its main loop has {loads} loads of 128 bits and {stores} stores of {width}"]


def report(module: str, cuobjdump: str) -> str:
    """Returns a table with the number of registers of each kernel on each architecture."""
    table = resources(module, cuobjdump)
    archs = sorted({arch for arch, _ in table}, key=lambda arch: int(arch[3:].rstrip("af")))
    names: dict[str, dict[str, int]] = defaultdict(dict)
    for (arch, kernel), use in table.items():
        names[name_of(kernel)][arch] = use["REG"]
    lines = [f"{'registers per thread':<38}" + "".join(f"{arch:>8}" for arch in archs)]
    lines += [f"{name:<38}" + "".join(f"{names[name].get(arch, 0):>8}" for arch in archs) for name in sorted(names)]
    return "\n".join(lines)


def instructions(module: str, cuobjdump: str, arch: str) -> dict[str, dict[str, float]]:
    """Returns a dict with three counts for each kernel. The kernel "pair_loss" is left out.

    "per_logit" is the number of instructions in the main loop, divided by its number of logits. "exponentials" is the
    number of exponentials in the main loop, also per logit. "spills" is the number of instructions in the whole kernel
    that access spilled registers.
    """
    found = {}
    for kernel, code in disassembly(module, cuobjdump, arch).items():
        name, body = name_of(kernel), main_loop(code)
        if name != "pair_loss":
            is_wide = "float32" in name or name.startswith("exp_logits")
            logits = VECTORS_IN_FLIGHT * 16 / (4 if is_wide else 2)
            exponentials = sum("MUFU.EX2" in text for text in body)
            found[name] = {"per_logit": len(body) / logits, "exponentials": exponentials / logits}
            found[name]["spills"] = spills([text for _, text in code])
    return dict(sorted(found.items()))


def document(module: str, cuobjdump: str, command: str, compiler: str) -> dict[str, Any]:
    """Returns registers, spills and main-loop instructions of all kernels, for benchmarks/machine_code.py."""
    registers: dict[str, dict[str, int]] = defaultdict(dict)
    built = set()
    for (arch, kernel), use in resources(module, cuobjdump).items():
        registers[name_of(kernel)][arch] = use["REG"]
        built.add(arch)
    return {
        "schema": 1,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "compiler": compiler,
        "registers": {name: dict(sorted(registers[name].items(), key=_by_arch)) for name in sorted(registers)},
        "instructions": {arch: instructions(module, cuobjdump, arch) for arch in COUNTED if arch in built},
    }


def _by_arch(item: tuple[str, int]) -> int:
    return int(item[0][3:].rstrip("af"))


def main() -> int:
    """Prints the table and the problems. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="the module, or fatbins of all files (default: the built module)")
    parser.add_argument("--compiler", help="the compiler of the files, for --json (default: that of the built module)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures here")
    args = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print("cuobjdump must be on PATH or inside an installed triton package")
        return 2
    built = sorted((Path(__file__).parents[2] / "mpo_ext").glob("_C*.so"))
    module = os.pathsep.join(args.files) or str(built[0])
    print(report(module, cuobjdump))
    found = problems(module, cuobjdump)
    print("\n".join(found) or "no loop spills; 128-bit loads and stores in the main loops")
    if args.json is not None and not found:
        from mpo_ext.ops.native import compiled

        command = f"python tests/cuda/check_sass.py --json {args.json}"
        args.json.parent.mkdir(parents=True, exist_ok=True)
        figures = document(module, cuobjdump, command, args.compiler or compiled().cuda_compiler)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

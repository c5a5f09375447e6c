"""Makes Markdown tables of the predictions of mpo_ext.plan, for ``benchmarks.documents``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.tables import Documents, provider_name
from mpo_ext.plan import machines, steps
from mpo_ext.plan import roofline as cost
from mpo_ext.report import markdown_table

_BIG = cost.LossShape(tokens=4096, vocab=151936)
_WIDE = cost.LossShape(tokens=4096, vocab=151936, hidden=4096)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _gpu_table(loss: cost.LossShape, methods: Sequence[str]) -> str:
    gpus = [machines.gpu(name) for name in machines.GPUS]
    rows = []
    for method in methods:
        costs = [cost.loss_cost(method, loss, machine) for machine in gpus]
        rows.append([provider_name(method), *(f"{1e3 * each.seconds:.1f}" for each in costs), _gib(costs[0].memory)])
    return markdown_table(["predicted time, ms", *machines.GPUS, f"memory, {next(iter(machines.GPUS))}"], rows)


_VOCABS = (151936, 248320, 262144)  # Qwen2.5, Qwen3.5, Gemma


def vocabularies(documents: Documents) -> str:
    """Returns a table of the loss from hidden states: the predicted time and memory for each vocabulary size."""
    machine = machines.gpu("H100")
    rows = []
    for method in cost.LINEAR:
        costs = [cost.loss_cost(method, replace(_WIDE, vocab=vocab), machine) for vocab in _VOCABS]
        cells = [cell for each in costs for cell in (f"{1e3 * each.seconds:.1f} ms", _gib(each.memory))]
        rows.append([provider_name(method), *cells])
    header = [cell for vocab in _VOCABS for cell in (f"V = {vocab:,}", "memory")]
    return (
        f"Predicted for an H100, {_WIDE.rows:,} of {_WIDE.rows:,} rows labelled, D = {_WIDE.hidden}, bfloat16, from "
        f"hidden states:\n\n{markdown_table(['method', *header], rows)}"
    )


def losses(documents: Documents) -> str:
    """Returns tables of the predicted time and memory of the loss, for each implementation and each GPU."""
    parts = []
    for share in (1.0, 0.1):
        loss, wide = replace(_BIG, share=share), replace(_WIDE, share=share)
        parts.append(f"Predicted, {loss.labelled:,} of {loss.rows:,} rows labelled, V = {loss.vocab:,}, bfloat16, "
                     f"from logits:\n\n{_gpu_table(loss, list(cost.LOGITS))}\n"
                     f"Predicted from hidden states with D = {wide.hidden}, otherwise the same:\n\n"
                     f"{_gpu_table(wide, list(cost.LINEAR))}")  # fmt: skip
    return "\n".join(parts)


#: Table label of each method that computes gradients from hidden states.
_PATHS = {
    "mpo_ext, from logits": "logits, `mpo_loss`",
    "mpo_ext, from logits, reuse_logits": "logits, `mpo_loss(reuse_logits=True)`",
    "mpo_ext": "`linear_mpo_loss`, default on a GPU (`recompute=True`)",
    "mpo_ext, recompute=False": "`linear_mpo_loss(recompute=False)`",
    "mpo_ext, frozen head": "`linear_mpo_loss`, frozen head",
    "eager": "logits, eager torch",
}
_SHARES = (1.0, 0.25, 0.1)


def products_of(method: str) -> str:
    """Returns the number of matmuls with the output head that a method needs, and their rows: "3, labelled rows".

    ``method`` is a way to compute the loss from hidden states. A row is the hidden state of one token.
    """
    counting = machines.Machine(name="counts", is_gpu=True, bandwidth=float("inf"), matmul_rates={"bfloat16": 1.0})
    flop = 2.0 * _WIDE.rows * _WIDE.vocab * _WIDE.hidden_size  # at 1 FLOP/s, predicted seconds count FLOP
    whole, half = (
        cost.loss_cost(method, replace(_WIDE, share=share), counting).seconds / flop for share in (1.0, 0.5)
    )
    return f"{whole:.0f}, {'all' if half == whole else 'labelled'} rows"


def paths(documents: Documents) -> str:
    """Returns a table with the predicted time and memory of each method that computes the loss from hidden states."""
    machine = machines.gpu("H100")
    rows = []
    for method, text in _PATHS.items():
        costs = [cost.loss_cost(method, replace(_WIDE, share=share), machine) for share in _SHARES]
        times = [f"{1e3 * each.seconds:.1f} ms" for each in costs]
        rows.append([text, products_of(method), *times, *(_gib(each.memory) for each in (costs[0], costs[-1]))])
    header = [
        "input and function",
        "matrix products with the head",
        *(f"time, {share:.0%} labelled" for share in _SHARES),
    ]
    header += [f"memory, {_SHARES[0]:.0%}", f"memory, {_SHARES[-1]:.0%}"]
    return (
        f"Predicted for an H100, {_WIDE.rows:,} rows, D = {_WIDE.hidden}, V = {_WIDE.vocab:,}, bfloat16. The time "
        f"includes the output head and the gradients of hidden states and head. Memory includes the gradients and "
        f"stored logits.\n\n{markdown_table(header, rows)}"
    )


def _described_model(*, trainable_share: float = 1.0, head_learns: bool = True) -> steps.ModelShape:
    """Returns the sizes of a text decoder like Qwen2.5-7B, for the cost model.

    ``trainable_share`` is the fraction of the parameters that are trained. ``head_learns`` tells whether the output
    head is trained.
    """
    layers, width, middle, keys, vocab = 28, 3584, 18944, 512, 152064
    decoder = layers * (2 * width * width + 2 * width * keys + 3 * width * middle)
    # The trainer keeps input and output of each linear layer in bfloat16; a norm keeps its input and its result.
    linear = 2 * (width + width) + 2 * (width + keys) + 3 * (width + middle)
    kept = layers * (2 * linear + 2 * (4 + 2) * width)
    # Passes over memory as in ``MemoryEstimate.bytes_moved_per_position``.
    moved = layers * 2 * (linear + 2 * 7 * width + 10 * (width + keys) + 5 * middle + 6 * width)
    parameters = decoder + 2 * vocab * width
    return steps.ModelShape(
        parameters=parameters, trainable=round(trainable_share * parameters), decoder=decoder, layers=layers,
        width=width, vocab=vocab, heads=width // 128, kept=kept, moved=moved, head_learns=head_learns,
    )  # fmt: skip


#: Prompt and response of the pairs of the step tables, in tokens.
_PAIRS = ((3072, 1024), (12288, 2048))


def step_times(documents: Documents) -> str:
    """Returns a table of the predicted time and memory of a training step. Each trainer has a row.

    The columns are different lengths of pairs.
    """
    model, machine = _described_model(), machines.gpu("H100")
    frozen = _described_model(trainable_share=0.005, head_learns=False)
    adapters = "mpo_ext, split attention, precomputed reference, LoRA (0.5 % of the weights)"
    cases = [
        ("mpo_ext, one row with split attention", model, False, "mpo_ext"),
        ("mpo_ext, one row with a dense mask", model, False, "mpo_ext, dense mask"),
        ("mpo_ext, separate rows", model, False, "mpo_ext, separate rows"),
        ("TRL's DPOTrainer", model, False, "TRL"),
        ("mpo_ext, split attention, precomputed reference", model, True, "mpo_ext"),
        (
            "mpo_ext, split attention, precomputed reference, `recompute=False`",
            model,
            True,
            "mpo_ext, recompute=False",
        ),
        (adapters, frozen, True, "mpo_ext"),
        ("mpo_ext, separate rows, from logits", model, False, "mpo_ext, separate rows, from logits"),
    ]
    shapes = [steps.StepShape(prompt=prompt, response=response, checkpointing=True, shards=8) for prompt, response in
              _PAIRS]  # fmt: skip
    rows = []
    for text, described, is_ready, trainer in cases:
        cells = [text]
        for shape in shapes:
            predicted = steps.step_cost(trainer, described, replace(shape, precomputed=is_ready), machine)
            cells += [f"{predicted.seconds:.2f} s", f"{predicted.memory / 2**30:.0f} GiB"]
        rows.append(cells)
    header = ["trainer"]
    for shape in shapes:
        header += [f"prompt {shape.prompt:,}, responses {shape.response:,}", "memory"]
    return (
        f"Predicted for one of {shapes[0].shards} H100s. The weights are sharded over the GPUs; the time of "
        f"communication is not included. The model is a decoder with {model.parameters / 1e9:.1f} billion float32 "
        f"parameters. The compute dtype is bfloat16, with gradient checkpointing, one pair per GPU and no padding.\n\n"
        f"{markdown_table(header, rows)}"
    )


#: Published times of a cross entropy from hidden states, forward and backward, in bfloat16: what, GPU, rows, D, V, ms,
#: and source. Rows that a source does not give are assumed.
_PUBLISHED = (
    ("Liger 0.8.5, CuTe, recomputes", "H100", 8192, 4096, 131072, 50.4, "README in Liger's wheel"),
    ("Liger 0.8.5, CuTe, recomputes", "H100", 32768, 4096, 131072, 211.0, "README in Liger's wheel"),
    ("quack, linear cross entropy", "H100", 2048, 4096, 128256, 7.96, "Liger #1356; 2,048 rows assumed"),
    ("Liger, CuTe", "H100", 2048, 4096, 128256, 8.72, "Liger #1356; 2,048 rows assumed"),
    ("Liger, CuTe, without recomputation", "B200", 8192, 4096, 152064, 20.9, "Liger #1339"),
    ("Liger, CuTe, without recomputation", "B200", 8192, 4096, 262144, 36.3, "Liger #1339"),
)


def published(documents: Documents) -> str:
    """Returns a table of times that other libraries published, and of our predicted times for the same sizes."""
    rows = []
    for name, gpu, count, hidden, vocab, milliseconds, source in _PUBLISHED:
        loss = cost.LossShape(tokens=count // 2, vocab=vocab, hidden=hidden)
        ours = (cost.loss_cost(f"mpo_ext, recompute={value}", loss, machines.gpu(gpu)) for value in (True, False))
        sizes = [gpu, f"{count:,}", f"{hidden:,}", f"{vocab:,}", f"{milliseconds:g}"]
        rows.append([name, *sizes, *(f"{1e3 * each.seconds:.1f}" for each in ours), source])
    header = ["program", "GPU", "rows", "D", "V", "published, ms", "mpo_ext, `recompute=True`, predicted, ms"]
    return markdown_table([*header, "mpo_ext, `recompute=False`, predicted, ms", "source"], rows)


_LATENCY = 0.8e-6  # assumed latency of a GPU's memory, in seconds
_ROWS = 8192  # two responses of 4,096 tokens


def _floors(name: str) -> tuple[float, float]:
    """Returns the seconds to read the logits, and the seconds to read and write them, at the GPU's peak bandwidth."""
    read = 2 * _ROWS * _BIG.vocab / machines.GPUS[name].bandwidth
    return read, 2 * read


def floors(documents: Documents) -> str:
    """Returns a table of the floor on each GPU: the time to move the logits at peak bandwidth.

    No loss that takes logits can be faster than the floor.
    """
    rows = []
    for name in machines.GPUS:
        forward, backward = _floors(name)
        bandwidth = f"{machines.GPUS[name].bandwidth / 1e12:.2f} TB/s"
        rows.append([name, bandwidth, *(f"{1e3 * s:.2f}" for s in (forward, backward, forward + backward))])
    header = ["GPU", "peak bandwidth", "forward, ms", "backward, ms", "both, ms"]
    return (
        f"Predicted floors at the peak bandwidth, with N = N' = {_ROWS:,}, V = {_BIG.vocab:,}, bfloat16, "
        f"{2 * _ROWS * _BIG.vocab / 1e9:.2f} GB of logits.\n\n{markdown_table(header, rows)}"
    )


def issue(documents: Documents) -> str:
    """Returns a table of the predicted time to issue the kernels' instructions, for each GPU.

    The times are percentages of the floor: the time to move the logits at peak bandwidth.
    """
    counts = documents["machine_code"]["instructions"]["sm_90"]
    names = ("token_logp bfloat16", "token_logp bfloat16 stats", "logits_grad bfloat16")
    forward, stats, backward = (counts[name]["per_logit"] for name in names)
    rows = []
    for name, sheet in machines.GPUS.items():
        read, update = _floors(name)
        clocks = sheet.multiprocessors * sheet.clock / (_ROWS * _BIG.vocab)  # cycles per second and logit
        shares = [forward / 128 / clocks / read, 1 / 16 / clocks / read, stats / 128 / clocks / read]
        shares.append(backward / 128 / clocks / update)
        in_flight = f"{sheet.bandwidth / sheet.multiprocessors * _LATENCY / 1024:.0f} KiB"
        rows.append([name, f"{sheet.clock / 1e9:.2f} GHz", *(f"{share:.0%}" for share in shares), in_flight])
    header = ["GPU", "clock", "forward: issue", "forward: exponentials", "forward with statistics: issue"]
    return (
        f'A percentage is a predicted time divided by the floor (bfloat16, instruction counts of sm_90). "Issue" is '
        f'the time to issue the instructions. "In flight" is the number of requested bytes that a multiprocessor must '
        f"wait for at any time to reach the peak bandwidth, with a memory latency of {_LATENCY * 1e6:.1f} us.\n\n"
        f"{markdown_table([*header, 'backward: issue', 'in flight'], rows)}"
    )


def data_sheets(documents: Documents) -> str:
    """Returns a table of the GPU data-sheet values that the predictions use."""
    rows = []
    for name, sheet in machines.GPUS.items():
        figures = {
            "memory": f"{sheet.memory / 1e9:.0f} GB",
            "bandwidth": f"{sheet.bandwidth / 1e12:.2f} TB/s",
            "bfloat16": f"{sheet.matmul_rates['bfloat16'] / 1e12:.0f}",
            "float32": f"{sheet.matmul_rates['float32'] / 1e12:.1f}",
            "multiprocessors": str(sheet.multiprocessors),
            "clock": f"{sheet.clock / 1e9:.2f} GHz",
        }
        cells = [f"{text}, not confirmed" if key in sheet.unconfirmed else text for key, text in figures.items()]
        rows.append([name, *cells, sheet.source])
    header = ["GPU", "memory", "peak bandwidth", "peak dense bf16 TFLOP/s", "peak float32 TFLOP/s", "multiprocessors"]
    return markdown_table([*header, "clock", "source"], rows)

"""Makes Markdown tables of the predictions of mpo_ext.plan.roofline, for ``benchmarks.documents``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.tables import Documents, provider_name
from mpo_ext.plan import machines
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
    return markdown_table(["ms, predicted", *machines.GPUS, "memory, predicted"], rows)


def losses(documents: Documents) -> str:
    """Returns tables of the predicted time and memory of each loss method on each GPU."""
    parts = []
    for share in (1.0, 0.1):
        loss, wide = replace(_BIG, share=share), replace(_WIDE, share=share)
        parts.append(f"Predicted, {loss.labelled:,} of {loss.rows:,} rows labelled, V = {loss.vocab:,}, bfloat16, "
                     f"from logits:\n\n{_gpu_table(loss, list(cost.LOGITS))}\n"
                     f"Predicted, the same from hidden states, D = {wide.hidden}:\n\n"
                     f"{_gpu_table(wide, list(cost.LINEAR))}")  # fmt: skip
    return "\n".join(parts)


#: Table label of each method that computes gradients from hidden states.
_PATHS = {
    "mpo_ext, from logits": "logits, `mpo_loss`",
    "mpo_ext, from logits, reuse_logits": "logits, `mpo_loss(reuse_logits=True)`",
    "mpo_ext": "`linear_mpo_loss`",
    "mpo_ext, recompute=False": "`linear_mpo_loss(recompute=False)`",
    "mpo_ext, frozen head": "`linear_mpo_loss`, frozen head",
    "eager": "logits, eager torch",
}
_SHARES = (1.0, 0.25, 0.1)


def products_of(method: str) -> str:
    """Returns the number of matmuls with the head and the rows they cover, such as "3, labelled rows"."""
    counting = machines.Machine(name="counts", is_gpu=True, bandwidth=float("inf"), matmul_rates={"bfloat16": 1.0})
    flop = 2.0 * _WIDE.rows * _WIDE.vocab * _WIDE.hidden_size  # at 1 FLOP/s, predicted seconds count FLOP
    whole, half = (
        cost.loss_cost(method, replace(_WIDE, share=share), counting).seconds / flop for share in (1.0, 0.5)
    )
    return f"{whole:.0f}, {'all' if half == whole else 'labelled'} rows"


def paths(documents: Documents) -> str:
    """Returns a table of the predicted time and memory of each method in ``_PATHS``."""
    machine = machines.gpu("H100")
    rows = []
    for method, text in _PATHS.items():
        costs = [cost.loss_cost(method, replace(_WIDE, share=share), machine) for share in _SHARES]
        times = [f"{1e3 * each.seconds:.1f} ms" for each in costs]
        rows.append([text, products_of(method), *times, *(_gib(each.memory) for each in (costs[0], costs[-1]))])
    header = ["path", "products with the head", *(f"time, {share:.0%} labelled" for share in _SHARES)]
    header += [f"memory, {_SHARES[0]:.0%}", f"memory, {_SHARES[-1]:.0%}"]
    return (
        f"Predicted for an H100, {_WIDE.rows:,} rows, D = {_WIDE.hidden}, V = {_WIDE.vocab:,}, bfloat16, from hidden "
        f"states to the gradients of hidden states and head. Memory includes the gradients, and the logits if they "
        f"exist.\n\n{markdown_table(header, rows)}"
    )


def _described_model(*, trainable_share: float = 1.0, head_learns: bool = True) -> cost.ModelShape:
    """Returns the shape of a decoder as large as Qwen2.5-7B, without a vision tower."""
    layers, width, middle, keys, vocab = 28, 3584, 18944, 512, 152064
    decoder = layers * (2 * width * width + 2 * width * keys + 3 * width * middle)
    # The trainer keeps input and output of each linear layer in bfloat16; a norm keeps its input and its result.
    linear = 2 * (width + width) + 2 * (width + keys) + 3 * (width + middle)
    kept = layers * (2 * linear + 2 * (4 + 2) * width)
    parameters = decoder + 2 * vocab * width
    return cost.ModelShape(
        parameters=parameters, trainable=round(trainable_share * parameters), decoder=decoder, layers=layers,
        width=width, vocab=vocab, kept=kept, head_learns=head_learns,
    )  # fmt: skip


def steps(documents: Documents) -> str:
    """Returns a table of the predicted time and memory of a training step with each trainer."""
    model, machine = _described_model(), machines.gpu("H100")
    step = cost.StepShape(prompt=3072, response=1024, checkpointing=True, shards=8)
    ready = cost.StepShape(prompt=3072, response=1024, checkpointing=True, shards=8, precomputed=True)
    frozen = _described_model(trainable_share=0.005, head_learns=False)
    cases = [
        ("mpo_ext", model, step, "mpo_ext"),
        ("mpo_ext, precomputed reference", model, ready, "mpo_ext"),
        ("mpo_ext, precomputed, `recompute=False`", model, ready, "mpo_ext, recompute=False"),
        ("mpo_ext, precomputed, adapters of 0.5 % of the weights, frozen head", frozen, ready, "mpo_ext"),
        ("mpo_ext, separate rows", model, step, "mpo_ext, separate rows"),
        ("mpo_ext, separate rows, from logits", model, step, "mpo_ext, separate rows, from logits"),
        ("TRL's DPOTrainer", model, step, "TRL"),
    ]
    rows = []
    for text, described, batch, trainer in cases:
        predicted = cost.step_cost(trainer, described, batch, machine)
        rows.append([text, f"{predicted.seconds:.2f} s", f"{predicted.memory / 2**30:.0f} GiB"])
    return (
        f"Predicted for one of {step.shards} H100s with sharded weights (communication not counted): a decoder of "
        f"{model.parameters / 1e9:.1f} billion float32 parameters with bfloat16 compute, one pair, a prompt of "
        f"{step.prompt:,} tokens, responses of {step.response:,} tokens, gradient checkpointing.\n\n"
        f"{markdown_table(['a training step, predicted', 'time', 'memory'], rows)}"
    )


_LATENCY = 0.8e-6  # assumed latency of a GPU's memory, in seconds
_ROWS = 8192  # two responses of 4,096 tokens


def _floors(name: str) -> tuple[float, float]:
    """Returns the seconds to read the logits, and the seconds to read and write the logits, at peak bandwidth."""
    read = 2 * _ROWS * _BIG.vocab / machines.GPUS[name].bandwidth
    return read, 2 * read


def floors(documents: Documents) -> str:
    """Returns a table of the floor on each GPU: the time to move the logits at peak bandwidth."""
    rows = []
    for name in machines.GPUS:
        forward, backward = _floors(name)
        bandwidth = f"{machines.GPUS[name].bandwidth / 1e12:.2f} TB/s"
        rows.append([name, bandwidth, *(f"{1e3 * s:.2f}" for s in (forward, backward, forward + backward))])
    header = ["GPU", "peak bandwidth", "forward, ms", "backward, ms", "both, ms"]
    return (
        f"Floors (time of the memory traffic alone), predicted from the peak bandwidth: N = N' = {_ROWS:,}, "
        f"V = {_BIG.vocab:,}, bfloat16, "
        f"{2 * _ROWS * _BIG.vocab / 1e9:.2f} GB of logits.\n\n{markdown_table(header, rows)}"
    )


def issue(documents: Documents) -> str:
    """Returns a table of each GPU's time to issue the instructions, as a fraction of the time to move the logits."""
    counts = documents["machine_code"]["instructions"]["sm_90"]
    names = ("token_logp bfloat16", "token_logp bfloat16 stats", "logits_grad bfloat16")
    forward, stats, backward = (counts[name]["per_logit"] for name in names)
    rows = []
    for name, sheet in machines.GPUS.items():
        read, update = _floors(name)
        clocks = sheet.multiprocessors * sheet.clock / (_ROWS * _BIG.vocab)  # of the GPU, per second and logit
        shares = [forward / 128 / clocks / read, 1 / 16 / clocks / read, stats / 128 / clocks / read]
        shares.append(backward / 128 / clocks / update)
        in_flight = f"{sheet.bandwidth / sheet.multiprocessors * _LATENCY / 1024:.0f} KiB"
        rows.append([name, f"{sheet.clock / 1e9:.2f} GHz", *(f"{share:.0%}" for share in shares), in_flight])
    header = ["GPU", "clock", "forward: issue", "forward: exponentials", "forward with statistics: issue"]
    return (
        f"Predicted time of each activity as a share of the floor (bfloat16, instruction counts of sm_90). The last "
        f"column holds the bytes that a multiprocessor must have in flight for the peak bandwidth at a latency of "
        f"{_LATENCY * 1e6:.1f} us.\n\n"
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

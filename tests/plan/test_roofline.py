"""Tests the cost model. Times are compared with times computed by hand, and must grow with each size."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_ext.plan import machines
from mpo_ext.plan.machines import GPUS, Machine, Stage, gpu
from mpo_ext.plan.roofline import LINEAR, LOGITS, LossShape, loss_cost
from mpo_ext.plan.steps import STEPS, ModelShape, StepShape, step_cost

CPU = Machine(
    name="test",
    is_gpu=False,
    bandwidth=1e9,
    matmul_rates={"float32": 1e10, "bfloat16": 4e10},
    kernel_rate=1e8,
    softmax_rate=1e7,
    fresh=2e8,
    huge=5e8,
    overhead=0.5,
)
#: A machine on which work is free. With one rate set to 1, the seconds count the work of that kind.
FREE = Machine(name="free", is_gpu=False, bandwidth=math.inf, matmul_rates={"float32": math.inf, "bfloat16": math.inf})
LOGITS_LOSS = LossShape(tokens=10, vocab=100, dtype="float32", share=0.5)
LINEAR_LOSS = LossShape(tokens=10, vocab=100, hidden=8, dtype="float32", share=0.5)


def only(**rates: object) -> Machine:
    return dataclasses.replace(FREE, **rates)  # type: ignore[arg-type]


def test_a_stage_takes_the_time_of_its_longest_work_and_of_its_page_faults() -> None:
    assert CPU.seconds(Stage(name="x", flop=3e10, moved=1e9, kernel=1e8)) == 3
    assert CPU.seconds(Stage(name="x", flop=3e10, dtype="bfloat16", moved=1e9)) == 1
    assert CPU.seconds(Stage(name="x", moved=2e9, kernel=1e8)) == 2
    assert CPU.seconds(Stage(name="x", moved=1e9, kernel=1e8, softmax=1e7)) == 2
    assert CPU.seconds(Stage(name="x", moved=1e9, fresh=2e8, huge=1e9)) == 1 + 1 + 2


def test_the_loss_from_logits_moves_the_bytes_of_the_design() -> None:
    # 10 of 20 rows are labelled; a row has 100 logits of 4 bytes. On a CPU, backward writes labelled rows only.
    moves = only(bandwidth=1.0)
    row = 100 * 4
    assert loss_cost("mpo_ext", LOGITS_LOSS, moves).seconds == 10 * row + (10 + 10) * row
    assert loss_cost("mpo_ext, reuse_logits", LOGITS_LOSS, moves).seconds == 10 * row + (10 + 20) * row
    on_gpu = dataclasses.replace(moves, is_gpu=True)
    assert loss_cost("mpo_ext", LOGITS_LOSS, on_gpu).seconds == 10 * row + (10 + 20) * row
    half = dataclasses.replace(LOGITS_LOSS, dtype="bfloat16")
    assert loss_cost("mpo_ext", half, moves).seconds == (10 + 20) * row / 2


def test_fresh_memory_and_kernels_of_the_loss_from_logits() -> None:
    assert loss_cost("mpo_ext", LOGITS_LOSS, only(huge=1.0)).seconds == 10 * 100 * 4
    assert loss_cost("mpo_ext, reuse_logits", LOGITS_LOSS, only(huge=1.0, fresh=1.0)).seconds == 0
    assert loss_cost("mpo_ext", LOGITS_LOSS, only(kernel_rate=1.0)).seconds == 10 * 100
    assert loss_cost("eager", LOGITS_LOSS, only(fresh=1.0)).seconds == 20 * 100 * 12


def test_gradients_of_hidden_states_and_head_are_huge_pages() -> None:
    d_hidden, d_weight, logits = 20 * 8 * 4, 100 * 8 * 4, 10 * 100 * 4
    pages = only(huge=1.0)
    assert loss_cost("mpo_ext", LINEAR_LOSS, pages).seconds == d_hidden + d_weight
    assert loss_cost("mpo_ext, recompute=True", LINEAR_LOSS, pages).seconds == d_hidden + d_weight
    assert loss_cost("mpo_ext, recompute=False", LINEAR_LOSS, pages).seconds == d_hidden + max(d_weight, logits)
    assert loss_cost("mpo_ext, frozen head", LINEAR_LOSS, pages).seconds == d_hidden
    assert loss_cost("mpo_ext", LINEAR_LOSS, only(fresh=1.0)).seconds == 0


@pytest.mark.parametrize(
    ("method", "rows", "products"),
    [
        ("mpo_ext", 10, 4 - 8 / 10),  # the logits of 8 of 10 rows fit into the gradient of the head
        ("mpo_ext, recompute=True", 10, 4),
        ("mpo_ext, recompute=False", 10, 3),
        ("mpo_ext, frozen head", 10, 2),
        ("eager", 20, 3),
        ("torch.compile", 20, 3),
        ("mpo_ext, from logits", 20, 3),
        ("mpo_ext, from logits, reuse_logits", 20, 3),
        ("F.linear_cross_entropy", 20, 4),
        ("trl ChunkedLogProb", 20, 4),
        ("cut-cross-entropy torch_compile", 10, 3),
        ("liger chunked DPO", 20, 3),
    ],
)
def test_products_with_the_head(method: str, rows: int, products: int) -> None:
    found = loss_cost(method, LINEAR_LOSS, only(matmul_rates={"float32": 1.0})).seconds
    assert math.isclose(found, 2 * rows * 100 * 8 * products)


def test_logits_that_fit_into_the_gradient_are_kept_on_a_cpu_only() -> None:
    products = only(matmul_rates={"float32": 1.0, "bfloat16": 1.0})
    few = dataclasses.replace(LINEAR_LOSS, share=0.4)  # 8 rows, as many as the hidden size
    assert loss_cost("mpo_ext", few, products) == loss_cost("mpo_ext, recompute=False", few, products)
    on_gpu = dataclasses.replace(products, is_gpu=True)
    assert loss_cost("mpo_ext", few, on_gpu) == loss_cost("mpo_ext, recompute=True", few, on_gpu)
    none = dataclasses.replace(LINEAR_LOSS, share=0.0)
    assert loss_cost("mpo_ext", none, products).seconds == 0


def test_peers_skip_ignored_rows_on_a_gpu() -> None:
    products = only(matmul_rates={"float32": 1.0}, is_gpu=True)
    assert loss_cost("trl ChunkedLogProb", LINEAR_LOSS, products).seconds == 2 * 10 * 100 * 8 * 4
    assert loss_cost("cut-cross-entropy torch_compile", LINEAR_LOSS, products).seconds == 2 * 10 * 100 * 8 * 4


@pytest.mark.parametrize(
    ("method", "per_logit"), [("mpo_ext", 4), ("mpo_ext, reuse_logits", 0), ("torch.compile", 8), ("eager", 12)]
)
def test_memory_from_logits_equals_the_measured_memory(method: str, per_logit: int) -> None:
    loss = LossShape(tokens=512, vocab=151936, dtype="float32")
    assert loss_cost(method, loss, CPU).memory == per_logit * loss.rows * loss.vocab


def test_memory_from_hidden_states_does_not_hold_the_logits() -> None:
    loss = LossShape(tokens=512, vocab=151936, hidden=896, dtype="float32")
    logits, grads = 4 * loss.rows * loss.vocab, 4 * 896 * (loss.rows + loss.vocab)
    assert 0 < loss_cost("mpo_ext", loss, CPU).memory - grads < 0.1 * logits
    # Kept logits and the head's gradient share memory; only rows beyond the hidden size need more.
    kept = loss_cost("mpo_ext, recompute=False", loss, CPU).memory - grads
    assert 4 * (1024 - 896) * 151936 < kept < 4 * (1024 - 896) * 151936 + 0.1 * logits
    few = dataclasses.replace(loss, share=0.5)
    without = loss_cost("mpo_ext, recompute=True", few, CPU).memory
    assert loss_cost("mpo_ext, recompute=False", few, CPU).memory == loss_cost("mpo_ext", few, CPU).memory == without
    assert loss_cost("mpo_ext", loss, CPU).memory == loss_cost("mpo_ext, recompute=True", loss, CPU).memory
    widened = dataclasses.replace(loss, dtype="bfloat16", matmul_dtype="float32")
    kept = loss_cost("mpo_ext, recompute=False", widened, CPU).memory - grads / 2
    assert 2 * (1024 - 896) * 151936 < kept < 2 * (1024 - 896) * 151936 + 0.1 * logits
    frozen = loss_cost("mpo_ext, frozen head", loss, CPU).memory
    assert frozen < 0.1 * logits


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("machine", [CPU, gpu("H100")], ids=["cpu", "gpu"])
def test_cost_grows_with_every_size(method: str, machine: Machine) -> None:
    loss = LossShape(tokens=512, vocab=32768, hidden=1024, dtype="bfloat16")
    first = loss_cost(method, loss, machine)
    for change in ({"tokens": 1024}, {"vocab": 65536}, {"hidden": 2048}, {"pairs": 2}):
        more = loss_cost(method, dataclasses.replace(loss, **change), machine)
        assert more.seconds > first.seconds, change
        assert more.memory >= first.memory, change
    fewer = loss_cost(method, dataclasses.replace(loss, share=0.25), machine)
    assert fewer.seconds <= first.seconds


def test_parts_add_up_with_the_fixed_part() -> None:
    one = loss_cost("mpo_ext", LINEAR_LOSS, CPU)
    assert one.parts["fixed"] == 0.5
    assert math.isclose(sum(one.parts.values()), one.seconds)


def test_a_cpu_that_widens_inputs_multiplies_at_the_rate_of_float32() -> None:
    loss = LossShape(tokens=10, vocab=100, hidden=8, dtype="bfloat16")
    products = only(matmul_rates={"float32": 1.0, "bfloat16": math.inf})
    assert loss_cost("mpo_ext, recompute=True", loss, products).seconds == 0
    widened = dataclasses.replace(loss, matmul_dtype="float32")
    assert loss_cost("mpo_ext, recompute=True", widened, products).seconds == 2 * 20 * 100 * 8 * 4


def test_matmuls_reach_a_share_by_their_smallest_size() -> None:
    machine = dataclasses.replace(CPU, matmul_shares={64: 0.5, 256: 1.0, 1024: 1.25})
    shares = [machine.matmul_share(size) for size in (32, 64, 128, 256, 512, 1024, math.inf)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.125, 1.25, 1.25])
    assert machine.seconds(Stage(name="x", flop=1e10, shortest=64)) == 2
    assert CPU.seconds(Stage(name="x", flop=1e10, shortest=1)) == 1


def test_attention_has_rates_by_kind_and_dtype() -> None:
    machine = dataclasses.replace(CPU, attention_rates={"plain": {"float32": 4e9}, "masked": {"float32": 2e9}})
    assert machine.seconds(Stage(name="x", attention=8e9)) == 2
    assert machine.seconds(Stage(name="x", attention=8e9, attention_kind="masked", flop=1e10)) == 4 + 1
    assert machine.seconds(Stage(name="x", attention=8e10, dtype="bfloat16")) == 2  # as its matmuls


MODEL = ModelShape(
    parameters=1000, trainable=500, decoder=300, layers=2, width=8, vocab=100, heads=3, kept=40, moved=90, vision=50,
    vision_layers=1, vision_width=4, vision_kept=10, vision_moved=20, compute="float32",
)  # fmt: skip
STEP = StepShape(prompt=16, response=4, image_tokens=8, patches=4)
PRODUCTS = only(matmul_rates={"float32": 1.0})


#: Scores of an attention head for a prompt of 16 and responses of 4 tokens, by the rows of a pair.
SPLIT, DENSE, CAUSAL = 20 * 20 / 2 + 4 * (16 + 2), 24 * 24, 2 * 20 * 20 / 2
EAGER = 20 * 20 + 4 * 20  # those of split attention, with the scores above the diagonal


def by_hand(
    *, scores: float, positions: int, rows: int, scored: int, head: int, passes: int = 3, reference: bool = False
) -> float:
    patches = rows * 8 * 4
    decoder, vision = 2 * 300 * positions, 2 * 50 * patches
    attention = 4 * 2 * 8 * scores + 4 * 1 * 4 * 32 * patches
    loss = 2 * scored * 100 * 8
    # A backward of attention has five products, of which two compute the scores and their gradient.
    once = passes * (decoder + vision) + (passes + 0.5) * attention + head * loss
    return once + reference * (decoder + vision + attention + loss)


def test_flop_of_a_step() -> None:
    split = {"scores": SPLIT, "positions": 24, "rows": 1, "scored": 8, "head": 3}
    found = step_cost("mpo_ext", MODEL, STEP, PRODUCTS).seconds
    assert found == by_hand(**split, reference=True)
    precomputed = dataclasses.replace(STEP, precomputed=True)
    found = step_cost("mpo_ext", MODEL, precomputed, PRODUCTS).seconds
    assert found == by_hand(**split)
    checkpointed = dataclasses.replace(precomputed, checkpointing=True)
    found = step_cost("mpo_ext", MODEL, checkpointed, PRODUCTS).seconds
    assert found == by_hand(**split, passes=4)
    found = step_cost("TRL", MODEL, STEP, PRODUCTS).seconds
    assert found == by_hand(scores=CAUSAL, positions=40, rows=2, scored=40, head=4, reference=True)
    found = step_cost("mpo_ext, recompute=True", MODEL, precomputed, PRODUCTS).seconds
    assert found == by_hand(**{**split, "head": 4})
    found = step_cost("mpo_ext, dense mask", MODEL, precomputed, PRODUCTS).seconds
    assert found == by_hand(**{**split, "scores": DENSE})
    found = step_cost("mpo_ext, separate rows", MODEL, precomputed, PRODUCTS).seconds
    assert found == by_hand(scores=CAUSAL, positions=40, rows=2, scored=8, head=3)


def test_each_kind_of_attention_has_its_rate_and_its_memory() -> None:
    step = dataclasses.replace(STEP, precomputed=True, image_tokens=0)
    plain, masked = (only(attention_rates={kind: {"float32": 1.0}}) for kind in ("plain", "masked"))
    for trainer, machine, scores in (
        ("mpo_ext", plain, SPLIT), ("mpo_ext, separate rows", plain, CAUSAL), ("mpo_ext, dense mask", masked, DENSE),
    ):  # fmt: skip
        assert step_cost(trainer, MODEL, step, machine).seconds == 3.5 * 4 * 2 * 8 * scores
    assert step_cost("mpo_ext", MODEL, step, masked).seconds == 0
    # A dense mask stays in memory for each of the two layers; eager attention keeps the scores of all heads.
    eager = dataclasses.replace(step, has_eager_attention=True)
    memory = step_cost("mpo_ext", MODEL, step, CPU).memory
    assert step_cost("mpo_ext, dense mask", MODEL, step, CPU).memory - memory == 4 * 2 * DENSE
    assert step_cost("mpo_ext", MODEL, eager, CPU).memory - memory == (4 + 4) * 2 * 3 * EAGER
    moves = only(bandwidth=1.0)
    passes = step_cost("mpo_ext", MODEL, eager, moves).parts["decoder, attention, policy"]
    assert passes == 16 * 4 * 2 * 3 * EAGER
    products = step_cost("mpo_ext", MODEL, eager, PRODUCTS).parts["decoder, attention, policy"]
    assert products == 3 * 4 * 2 * 8 * EAGER


def test_layers_pass_over_memory_beside_their_products() -> None:
    step = dataclasses.replace(STEP, precomputed=True)
    parts = step_cost("mpo_ext", MODEL, step, only(bandwidth=1.0)).parts
    assert parts["decoder, passes, policy"] == 3 * 90 * 24
    assert parts["vision, passes, policy"] == 3 * (20 * 32 + 4 * 50)
    frozen = dataclasses.replace(MODEL, vision_learns=False)
    assert step_cost("mpo_ext", frozen, step, only(bandwidth=1.0)).parts["vision, passes, policy"] == 20 * 32 + 4 * 50


def test_micro_batches_repeat_all_but_the_optimizer() -> None:
    once = step_cost("mpo_ext", MODEL, STEP, CPU)
    thrice = step_cost("mpo_ext", MODEL, dataclasses.replace(STEP, micro_batches=3), CPU)
    optimizer = once.parts["optimizer"]
    assert optimizer == 10 * 4 * 500 / 1e9 + 4 * 500 / 2e8
    assert math.isclose(thrice.seconds - optimizer, 3 * (once.seconds - optimizer))
    assert thrice.memory == once.memory


def test_a_copy_as_reference_costs_its_weights() -> None:
    copy = step_cost("mpo_ext", MODEL, STEP, CPU)
    precomputed = step_cost("mpo_ext", MODEL, dataclasses.replace(STEP, precomputed=True), CPU)
    assert copy.memory - precomputed.memory == 4 * 1000
    halved = step_cost("mpo_ext", MODEL, dataclasses.replace(STEP, precomputed=True, shards=2), CPU)
    assert precomputed.memory - halved.memory == 4 * (1000 + 3 * 500) / 2


def test_a_frozen_head_has_two_products() -> None:
    frozen = dataclasses.replace(MODEL, head_learns=False, trainable=0)
    step = dataclasses.replace(STEP, precomputed=True)
    found = step_cost("mpo_ext", frozen, step, PRODUCTS).seconds
    assert found == by_hand(scores=SPLIT, positions=24, rows=1, scored=8, head=2)


@pytest.mark.parametrize(("trainer", "name"), list(itertools.product(STEPS, GPUS)))
def test_every_trainer_on_every_gpu(trainer: str, name: str) -> None:
    model = dataclasses.replace(MODEL, compute="bfloat16")
    one = step_cost(trainer, model, STEP, gpu(name))
    assert 0 < one.seconds < 1
    assert one.memory > 0


def test_gpus_are_taken_at_the_stated_shares_of_their_sheets() -> None:
    machine = gpu("H100")
    assert machine.bandwidth == machines.BANDWIDTH_SHARE * 3.35e12
    assert machine.matmul_rates["bfloat16"] == machines.PRODUCT_SHARE * 989e12
    assert math.isclose(machine.kernel_rate, 16 * 132 * 1.98e9 / 2)
    assert "NVIDIA H100 data sheet" in machine.source
    # docs/performance.md gives this time for one read and one read-write at the peak.
    loss = LossShape(tokens=4096, vocab=151936)
    peak = loss_cost(
        "mpo_ext", loss, dataclasses.replace(machine, bandwidth=3.35e12, kernel_rate=math.inf, overhead=0)
    )
    assert round(1e3 * peak.seconds, 2) == 2.23


@pytest.mark.parametrize("name", GPUS)
def test_the_figures_of_a_sheet_fit_each_other(name: str) -> None:
    sheet = GPUS[name]
    lanes = (
        64 if name == "A100" else 128
    )  # float32 lanes of a multiprocessor; each does a multiplication and an addition per clock
    assert math.isclose(2 * lanes * sheet.multiprocessors * sheet.clock, sheet.matmul_rates["float32"], rel_tol=0.01)
    # Multiply-adds per clock of a multiprocessor's tensor cores, which clock up to 8 % lower on Hopper and Blackwell.
    per_clock = {"A100": 1024, "H100": 2048, "H200": 2048, "B200": 4096}[name]
    tensor_clock = sheet.matmul_rates["bfloat16"] / (2 * per_clock * sheet.multiprocessors)
    assert 0.92 * sheet.clock < tensor_clock < 1.01 * sheet.clock
    assert sheet.matmul_rates["float16"] == sheet.matmul_rates["bfloat16"]
    assert set(sheet.unconfirmed) <= {"multiprocessors", "clock"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpu("V100"), "gpu must be one of A100, H100, H200, B200, got 'V100'"),
        (lambda: loss_cost("magic", LOGITS_LOSS, CPU), "method must be one of mpo_ext, .*, got 'magic'"),
        (lambda: loss_cost("liger chunked DPO", LOGITS_LOSS, CPU), "method must be one of"),
        (lambda: step_cost("magic", MODEL, STEP, CPU), "trainer must be one of"),
        (lambda: LossShape(tokens=0, vocab=3), "tokens must be at least 1, got 0"),
        (lambda: LossShape(tokens=1, vocab=3, share=1.5), r"share must be in \[0, 1\], got 1.5"),
        (
            lambda: LossShape(tokens=1, vocab=3, dtype="int8"),
            "dtype must be one of float32, bfloat16, float16, got 'int8'",
        ),
        (lambda: dataclasses.replace(CPU, bandwidth=0), "bandwidth must be positive, got 0"),
        (lambda: dataclasses.replace(CPU, matmul_rates={"float32": math.nan}), "must be positive, got nan"),
        (lambda: dataclasses.replace(CPU, overhead=-1), "overhead must be finite and not negative, got -1"),
        (
            lambda: loss_cost("eager", dataclasses.replace(LINEAR_LOSS, dtype="float16"), CPU),
            "dtype must be one of float32, bfloat16 on test, got 'float16'",
        ),
        (lambda: LOGITS_LOSS.hidden_size, "hidden must be given"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_methods_have_the_names_of_the_benchmarks() -> None:
    from benchmarks import linear, logits, train_step

    assert set(LOGITS) <= set(logits.LOSSES)
    modelled_only = {
        "mpo_ext, from logits",
        "mpo_ext, from logits, reuse_logits",
    }  # benchmarks.logits measures them without a head
    assert set(LINEAR) - modelled_only <= {*linear.OURS, *linear.RIVALS}
    assert set(STEPS) <= set(train_step.CASES)


def test_the_model_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import mpo_ext.plan.steps"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_recipe(folder: Path) -> Path:
    """Writes a recipe and its model folder, which has a config and no weights."""
    transformers = pytest.importorskip("transformers", reason="needs transformers, which dev installs")
    config = transformers.Qwen2Config(
        vocab_size=50000, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n' * 8)
    recipe = folder / "r.yaml"
    recipe.write_text(
        f"model: {{path: {folder / 'model'}}}\ndata: {{train: {folder / 'pairs.jsonl'}, max_length: 1024}}\n"
        f"output: {{dir: {folder / 'out'}}}\noptim: {{batch_size: 8}}\n"
    )
    return recipe


def test_plan_predicts_the_step_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mpo_ext.__main__ import main
    from mpo_ext.plan.planner import plan
    from mpo_ext.train.recipe import load_recipe

    recipe = write_recipe(tmp_path)
    planned = plan(load_recipe(recipe, ["precision=bf16"]))
    model, step = planned.cost_model, planned.cost_step
    # Attention: queries and output 64 x 64, keys and values 64 x 32; the three matrices of the MLP 64 x 96.
    assert model.decoder == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert (model.layers, model.width, model.vocab, model.vision, model.compute) == (2, 64, 50000, 0, "bfloat16")
    assert (step.prompt, step.response, step.micro_batches, step.image_tokens) == (768, 256, 8, 0)
    rows = {row[0]: row for row in planned.times(gpu("H100"))}
    assert rows["this recipe"][2] == "1.00"
    assert float(rows["reference.kind=precomputed"][2]) < 1
    assert "TRL's DPOTrainer" in rows

    assert main(["plan", str(recipe), "precision=bf16", "--gpu", "B200"]) == 0
    text = capsys.readouterr().out
    assert "Time of a step on a B200, PREDICTED (NVIDIA Blackwell data sheet, HGX B200" in text
    assert "measured" not in text
    assert main(["plan", str(recipe), "precision=bf16"]) == 0
    text = capsys.readouterr().out
    assert "Time of a step on an H100, PREDICTED" in text
    assert "one copy per rank" not in text
    assert main(["plan", str(recipe), "precision=bf16", "--world", "2"]) == 0
    assert capsys.readouterr().out.count("one copy per rank") == 2  # in the table of parts and in the table of times
    assert main(["plan", str(recipe), "precision=bf16", "--bandwidth", "8", "--tflops", "2250"]) == 0
    assert "on a GPU of 8 TB/s and 2250 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--gpu", "V100"],
            "gpu must be one of A100, H100, H200, B200, got 'V100': describe another GPU by its "
            "peaks, with --bandwidth and --tflops",
        ),
        (["--tflops", "100"], "--bandwidth must be given too, got only --tflops"),
        (["--bandwidth", "3"], "--tflops must be given too, got only --bandwidth"),
        (["--bandwidth", "3", "--tflops", "-1"], "--tflops must be positive, got -1.0"),
        (["--gpu", "H100", "--tflops", "100"], "--gpu must not come with --bandwidth or --tflops, got 'H100'"),
    ],
)
def test_plan_refuses_options_that_do_not_describe_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    from mpo_ext.__main__ import main

    assert main(["plan", str(write_recipe(tmp_path)), *options]) == 2
    assert f"mpo-ext plan: {message}" in capsys.readouterr().err

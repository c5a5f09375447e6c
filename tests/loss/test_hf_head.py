"""Tests hidden_and_head on small transformers models, with and without wrappers such as DDP.

A loss is computed from the hidden states and the head, and another from the model's logits. Both losses and their
gradients must be equal.
"""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch import nn

from mpo_ext import HiddenAndHead, hidden_and_head, linear_mpo_loss, mpo_loss, value_in_forward
from mpo_ext.loss import eager as reference

VOCAB = 61
IMAGE = 60  # the token that stands for a piece of an image
TOKENS = 9
PROMPT = 6
REF_LOGP = torch.tensor([-13.0, -12.0])

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


def text_model(family: str, **settings: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**TEXT, **settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def gemma2() -> nn.Module:
    return text_model("Gemma2", head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=3.0)


def internvl() -> nn.Module:
    vision = {**VISION, "image_size": [8, 8], "patch_size": [4, 4], "num_channels": 1, "layer_scale_init_value": 1.0}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    return transformers.InternVLForConditionalGeneration(config)


def llava() -> nn.Module:
    vision = {**VISION, "image_size": 8, "patch_size": 8, "num_channels": 1, "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        image_seq_length=1,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "in_channels": 1,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "out_hidden_size": 16,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=IMAGE - 2,
        vision_end_token_id=IMAGE - 3,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "internvl": internvl,
    "qwen2_5_vl": qwen2_5_vl,
    "llava": llava,
    "qwen2": partial(text_model, "Qwen2"),
    "llama": partial(text_model, "Llama", tie_word_embeddings=False),
    "llama-tied": partial(text_model, "Llama", tie_word_embeddings=True),
    "gemma2": gemma2,
    "cohere": partial(text_model, "Cohere", logit_scale=0.3),
    "granite": partial(text_model, "Granite", logits_scaling=3.0),
}
SCALES = {"gemma2": (1.0, 2.0), "cohere": (0.3, None), "granite": (1 / 3.0, None)}


def build(family: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family]().to(dtype).train()
    with torch.no_grad():  # initial heads are so small that a factor or a softcap would hardly have an effect
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch_of(model: nn.Module, seed: int = 0) -> tuple[dict[str, Any], torch.Tensor]:
    """Returns the inputs and labels of one pair. Each sequence has an image if the model takes images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (2, TOKENS), generator=generator)
    labels = ids.masked_fill(torch.arange(TOKENS) < PROMPT, -100)
    labels[1, -1] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    name = type(model).__name__
    if name.startswith(("InternVL", "Llava")):
        ids[:, 2] = IMAGE
        inputs["pixel_values"] = torch.randn(2, 1, 8, 8, generator=generator)
    elif name.startswith("Qwen2_5_VL"):
        ids[:, 1], ids[:, 2], ids[:, 3] = IMAGE - 2, IMAGE, IMAGE - 3
        inputs["pixel_values"] = torch.randn(8, 16, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2], [1, 2, 2]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    dtype = next(model.parameters()).dtype
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs, labels


def logits_of(out: HiddenAndHead) -> torch.Tensor:
    return reference.linear_logits(out.hidden, out.weight, out.bias, out.logit_scale, out.softcap)


def loss_of(out: HiddenAndHead, labels: torch.Tensor) -> torch.Tensor:
    return linear_mpo_loss(
        out.hidden,
        out.weight,
        labels,
        REF_LOGP,
        **out.options,
    ).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the gradients by parameter name without the prefix ``module.``, and clears them in the model.

    A parameter without a gradient gets zeros.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
            parameter.grad = None
    return found


def assert_same_gradients(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tol: float = 1e-9) -> None:
    assert ours.keys() == truth.keys()
    largest = max(grad.abs().max().item() for grad in truth.values())
    for name in truth:
        torch.testing.assert_close(
            ours[name], truth[name], rtol=tol, atol=tol * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_against_logits(model: nn.Module, tol: float = 1e-9, inner: nn.Module | None = None) -> HiddenAndHead:
    """Compares logits, loss and gradients with and without hidden_and_head.

    If ``model`` is a wrapper, ``inner`` is the wrapped model. The inputs are made for the wrapped model.
    """
    inputs, labels = batch_of(inner if inner is not None else model)
    logits = model(**inputs).logits
    truth = mpo_loss(logits, labels, REF_LOGP, backend="reference").loss
    truth.backward()
    true_gradients = gradients(model)
    assert any(grad.any() for grad in true_gradients.values())

    out = hidden_and_head(model, **inputs)
    torch.testing.assert_close(logits_of(out), logits, rtol=tol, atol=tol * logits.abs().max().item())
    loss = loss_of(out, labels)
    torch.testing.assert_close(loss, truth, rtol=tol, atol=tol)
    loss.backward()
    assert_same_gradients(gradients(model), true_gradients, tol)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str) -> None:
    model = build(family)
    out = check_against_logits(model)
    assert (out.logit_scale, out.softcap) == SCALES.get(family, (1.0, None))
    assert out.weight is model.get_output_embeddings().weight
    assert out.hidden.shape == (2, TOKENS, 16)
    assert out.outputs.logits.shape == (2, TOKENS, 8)


def loss_in_forward(model: nn.Module, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    loss, _ = value_in_forward(model, lambda head: loss_of(head, labels), **inputs)
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_in_the_forward_and_its_gradients_are_those_of_the_logits(family: str) -> None:
    model = build(family)
    inputs, labels = batch_of(model)
    truth = mpo_loss(model(**inputs).logits, labels, REF_LOGP, backend="reference").loss
    truth.backward()
    true_gradients = gradients(model)
    for _ in range(2):  # the first call finds the factor and the softcap
        loss = loss_in_forward(model, inputs, labels)
        torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-9)
        (2 * loss).backward()
        assert_same_gradients({name: grad / 2 for name, grad in gradients(model).items()}, true_gradients)


def test_a_value_in_the_forward_needs_no_gradient() -> None:
    model = build("gemma2")
    inputs, _ = batch_of(model)
    with torch.no_grad():
        logits, outputs = value_in_forward(model, logits_of, **inputs)
        torch.testing.assert_close(logits, model(**inputs).logits)
    assert outputs.logits.shape == (2, TOKENS, 8)


def test_a_cache_is_not_extended_twice() -> None:
    model = build("llama")
    inputs, labels = batch_of(model)
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="inputs must not hold past_key_values"):
        loss_in_forward(model, {**inputs, "past_key_values": cache}, labels)
    hidden_and_head(model, **inputs, past_key_values=cache)
    assert cache.get_seq_length() == TOKENS


def test_a_loss_in_the_forward_leaves_the_random_stream_as_it_was() -> None:
    model = build("llama")
    inputs, labels = batch_of(model)
    before = torch.get_rng_state()
    loss_in_forward(model, inputs, labels)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_of_the_loss_in_the_forward_is_passed_on() -> None:
    model = build("llama")
    inputs, labels = batch_of(model)
    with pytest.raises(ValueError, match="labels must have"):
        loss_in_forward(model, inputs, labels[:, :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["internvl", "gemma2", "cohere", "granite"])
def test_factor_and_softcap_are_exact_in_every_dtype(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    inputs, _ = batch_of(model)
    out = hidden_and_head(model, **inputs)
    assert (out.logit_scale, out.softcap) == SCALES.get(family, (1.0, None))
    assert out.hidden.dtype == dtype
    torch.testing.assert_close(logits_of(out), model(**inputs).logits)


@pytest.mark.parametrize("rounded_to", [None, torch.float32, torch.bfloat16], ids=str)
def test_a_factor_that_the_config_does_not_know_is_read_off_the_probe(rounded_to: torch.dtype | None) -> None:
    model = build("qwen2", torch.bfloat16)
    after_head(model, lambda logits: (logits * 0.37).to(rounded_to or logits.dtype))
    out = hidden_and_head(model, **batch_of(model)[0])
    assert out.logit_scale == pytest.approx(0.37, rel={None: 1e-15, torch.float32: 1e-7}.get(rounded_to, 4e-3))
    assert out.softcap is None


def test_a_factor_of_the_config_is_exact_though_the_logits_are_rounded() -> None:
    model = build("cohere", torch.bfloat16)
    after_head(model, lambda logits: logits.bfloat16())
    assert hidden_and_head(model, **batch_of(model)[0]).logit_scale == 0.3


def test_a_softcap_after_a_factor_is_read_off_the_probe() -> None:
    model = build("gemma2")
    model.get_output_embeddings().register_forward_hook(lambda layer, args, output: output * 1.7)
    out = check_against_logits(model)
    assert out.logit_scale == pytest.approx(1.7, rel=1e-12)
    assert out.softcap == 2.0


def test_the_bias_of_the_head_is_returned() -> None:
    model = build("qwen2")
    head = nn.Linear(16, VOCAB).double()
    model.set_output_embeddings(head)
    assert check_against_logits(model).bias is head.bias


def test_hidden_is_what_the_head_got_where_the_forward_slices() -> None:
    model = build("llama")
    inputs, _ = batch_of(model)
    out = hidden_and_head(model, **inputs, logits_to_keep=3)
    assert out.hidden.shape == (2, 3, 16)
    torch.testing.assert_close(logits_of(out), model(**inputs).logits[:, -3:])


def test_the_head_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    inputs, _ = batch_of(model)
    linear = nn.functional.linear
    widths = []

    def watched(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        widths.append(weight.shape[0])
        return linear(input, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    hidden_and_head(model, **inputs)
    assert widths
    assert VOCAB not in widths
    model(**inputs)
    assert VOCAB in widths


def test_a_change_of_the_config_is_seen() -> None:
    model = build("granite")
    inputs, _ = batch_of(model)
    assert hidden_and_head(model, **inputs).logit_scale == 1 / 3.0
    model.config.logits_scaling = 5.0
    assert hidden_and_head(model, **inputs).logit_scale == 1 / 5.0


def test_a_changed_attribute_of_the_model_is_read_again() -> None:
    model = build("cohere")
    inputs, _ = batch_of(model)
    for scale in (0.3, 0.7):
        model.logit_scale = scale
        assert hidden_and_head(model, **inputs).logit_scale == scale
        values, _ = value_in_forward(model, logits_of, **inputs)
        torch.testing.assert_close(values, model(**inputs).logits)


def test_no_grad_and_inference_work_as_for_a_reference_model() -> None:
    model = build("internvl").eval()
    inputs, _ = batch_of(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = hidden_and_head(model, **inputs)
            assert not out.hidden.requires_grad
            torch.testing.assert_close(logits_of(out), model(**inputs).logits)


def test_gradient_checkpointing_and_a_frozen_head_work() -> None:
    model = build("internvl")
    model.gradient_checkpointing_enable()
    model.get_output_embeddings().weight.requires_grad_(False)
    check_against_logits(model)


def test_torch_compile_works_and_compiles_once() -> None:
    model = build("llama", torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(3):
        inputs, labels = batch_of(model, seed)
        loss_of(hidden_and_head(model, **inputs), labels).backward()
        truth = gradients(model)
        loss_of(hidden_and_head(compiled, **inputs), labels).backward()
        assert_same_gradients(gradients(model), truth, 1e-5)
        with torch.no_grad():  # the result must belong to this call, not to the trace
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled(**inputs).logits.shape[-1] == VOCAB


def lora(**settings: Any) -> tuple[nn.Module, nn.Module]:
    peft = pytest.importorskip("peft", reason="peft is not a dependency of the package")
    model = build("internvl")
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, **{"target_modules": ["q_proj", "v_proj", "linear_1"], **settings}
    )
    return peft.get_peft_model(model, config).double(), model


def test_lora_works() -> None:
    model, inner = lora()
    assert not check_against_logits(model, inner=inner).weight.requires_grad


def test_lora_with_the_head_in_modules_to_save_trains_the_copy() -> None:
    model, inner = lora(modules_to_save=["lm_head"])
    with torch.no_grad():
        inner.lm_head.modules_to_save["default"].weight.mul_(1.5)
    out = check_against_logits(model, inner=inner)
    assert out.weight is inner.lm_head.modules_to_save["default"].weight
    assert out.weight.requires_grad
    with model.disable_adapter():
        out = hidden_and_head(model, **batch_of(inner)[0])
        assert out.weight is inner.lm_head.original_module.weight


def test_lora_on_the_head_is_refused() -> None:
    model, inner = lora(target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match=r"plain torch.nn.Linear.*an adapter.*mpo_loss\(model"):
        hidden_and_head(model, **batch_of(inner)[0])


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_in_one_process_works(mixed_precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    try:
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
        model = build("cohere", torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        inputs, labels = batch_of(model)
        truth = mpo_loss(model(**inputs).logits, labels, REF_LOGP).loss
        accelerator.backward(truth)
        true_gradients = gradients(model)
        out = hidden_and_head(model, **inputs)
        assert out.logit_scale == 0.3
        with accelerator.autocast():
            loss = loss_of(out, labels)
        tol = 1e-5 if mixed_precision == "no" else 4e-2
        torch.testing.assert_close(loss, truth, rtol=tol, atol=tol)
        accelerator.backward(loss)
        assert_same_gradients(gradients(model), true_gradients, tol)
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


def test_heads_whose_weight_accelerate_brings_for_the_forward_work() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build("llama").eval()
    inputs, _ = batch_of(model)
    with torch.no_grad():
        truth = model(**inputs).logits
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.lm_head.weight.is_meta
        torch.testing.assert_close(logits_of(hidden_and_head(model, **inputs)), truth)
        torch.testing.assert_close(model(**inputs).logits, truth)


# Two processes. Starting them takes longer than their work, so one start serves all cases.


def distributed_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    for name, case in DISTRIBUTED.items():
        try:
            case(rank)
            dist.barrier()
        except BaseException:
            Path(folder, f"{name}.error{rank}").write_text(traceback.format_exc())
            raise
        Path(folder, f"{name}.done{rank}").touch()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs all distributed cases and returns the folder of their results. The run ends at the first failing case."""
    folder = tmp_path_factory.mktemp("distributed")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        mp.spawn(distributed_worker, args=(str(folder),), nprocs=2)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        (folder / "end").write_text(str(error))
    return folder


def mean_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the gradients that two ranks must get after averaging. Computes them from logits in this process."""
    for seed in range(2):
        inputs, labels = batch_of(model, seed)
        (mpo_loss(model(**inputs).logits, labels, REF_LOGP, backend="reference").loss / 2).backward()
    return gradients(model)


def train(model: nn.Module, inner: nn.Module, rank: int, steps: int) -> None:
    """Trains with AdamW on batches of this rank, and checks that all ranks end with equal parameters.

    The batches are made for ``inner``, a copy of the model without wrappers.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(steps):
        inputs, labels = batch_of(inner, 2 * step + rank)
        loss_of(hidden_and_head(model, **inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for parameter in model.parameters():
        other = parameter.detach().clone()
        dist.broadcast(other, src=0)
        assert torch.equal(other, parameter), "the ranks have drifted apart"


def ddp(rank: int, **settings: Any) -> None:
    inner = build("internvl")
    truth = mean_gradients(inner)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(inner), **settings)
    inputs, labels = batch_of(inner, rank)
    loss_of(hidden_and_head(model, **inputs), labels).backward()
    assert_same_gradients(gradients(model), truth)
    train(model, inner, rank, steps=5)


def ddp_without_images(rank: int) -> None:
    """Checks DDP with ``find_unused_parameters`` on batches without images. The vision tower then gets no gradient."""
    inner = build("internvl")
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(inner), find_unused_parameters=True)
    for seed in range(2):
        _, labels = batch_of(inner, seed)
        inputs = {"input_ids": labels.clamp_min(2), "use_cache": False}
        (mpo_loss(inner(**inputs).logits, labels, REF_LOGP, backend="reference").loss / 2).backward()
        if seed == rank:
            loss_of(hidden_and_head(model, **inputs), labels).backward()
    assert_same_gradients(gradients(model), gradients(inner))


def fsdp2(rank: int, family: str) -> None:
    """Tests FSDP2 with each decoder layer sharded separately. The root shards all other parts, including the head."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    inner = build(family)
    truth = mean_gradients(inner)
    model = copy.deepcopy(inner)
    blocks = model.model.language_model.layers if family == "internvl" else model.model.layers
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        inputs, labels = batch_of(inner, rank)
        out = hidden_and_head(model, **inputs)
        assert not hasattr(out.weight, "full_tensor")
        loss_of(out, labels).backward()
        assert_same_gradients(gradients(model), truth)


def fsdp2_head_by_itself(rank: int, is_kept: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    inner = build("llama")
    truth = mean_gradients(inner)
    model = copy.deepcopy(inner)
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=not is_kept)
    fully_shard(model, mesh=mesh)
    inputs, labels = batch_of(inner, rank)
    if not is_kept:
        with pytest.raises(RuntimeError, match=r"shard the head together with the root.*mpo_loss\(model"):
            hidden_and_head(model, **inputs)
        return
    loss_of(hidden_and_head(model, **inputs), labels).backward()
    assert_same_gradients(gradients(model), truth)


def fsdp2_in_forward(rank: int, family: str) -> None:
    """Tests FSDP2 with a separate ``fully_shard`` call for each linear layer, also for an untied output head.

    FSDP2 frees the full weight of a layer after the forward pass of the layer.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    inner = build(family)
    truth = mean_gradients(inner)
    model = copy.deepcopy(inner)
    tied = model.get_input_embeddings().weight
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module.weight is not tied:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for _ in range(2):
        inputs, labels = batch_of(inner, rank)
        loss_in_forward(model, inputs, labels).backward()
        assert_same_gradients(gradients(model), truth)


def ddp_in_forward(rank: int, **settings: Any) -> None:
    inner = build("gemma2")
    truth = mean_gradients(inner)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(inner), **settings)
    inputs, labels = batch_of(inner, rank)
    for _ in range(2):
        loss_in_forward(model, inputs, labels).backward()
        assert_same_gradients(gradients(model), truth)


def fsdp1(rank: int, family: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def wrapped(*kinds: type) -> nn.Module:
        return FullyShardedDataParallel(
            copy.deepcopy(inner),
            auto_wrap_policy=ModuleWrapPolicy(kinds),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )

    inner = build(family)
    truth = mean_gradients(inner)
    inputs, labels = batch_of(inner, rank)
    model = wrapped(type(inner.model.layers[0]))
    loss_of(hidden_and_head(model, **inputs), labels).backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        ours = {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in gradients(model).items()}
    assert_same_gradients(ours, truth)

    if family == "llama":  # a tied head cannot be its own unit
        with pytest.raises(RuntimeError, match=r"shard the head together with the root.*mpo_loss\(model"):
            hidden_and_head(wrapped(nn.Linear), **inputs)


DISTRIBUTED: dict[str, Callable[[int], None]] = {
    "ddp": ddp,
    "ddp-find-unused": partial(ddp, find_unused_parameters=True),
    "ddp-static-graph": partial(ddp, static_graph=True),
    "ddp-without-images": ddp_without_images,
    "fsdp1": partial(fsdp1, family="llama"),
    "fsdp1-tied": partial(fsdp1, family="llama-tied"),
    "fsdp2": partial(fsdp2, family="internvl"),
    "fsdp2-tied": partial(fsdp2, family="llama-tied"),
    "fsdp2-in-forward": partial(fsdp2_in_forward, family="llama"),
    "fsdp2-in-forward-images": partial(fsdp2_in_forward, family="internvl"),
    "fsdp2-in-forward-tied": partial(fsdp2_in_forward, family="llama-tied"),
    "ddp-in-forward": ddp_in_forward,
    "ddp-in-forward-find-unused": partial(ddp_in_forward, find_unused_parameters=True),
    "fsdp2-head-kept": partial(fsdp2_head_by_itself, is_kept=True),
    "fsdp2-head-resharded": partial(fsdp2_head_by_itself, is_kept=False),
}


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_two_ranks_get_the_gradients_of_both(distributed: Path, case: str) -> None:
    errors = sorted(distributed.glob(f"{case}.error*"))
    assert not errors, errors[0].read_text()
    has_run = len(list(distributed.glob(f"{case}.done*"))) == 2
    assert has_run, "this case or one before it ended the run: " + (distributed / "end").read_text()


# Refused models.


def after_head(model: nn.Module, change: Callable[[torch.Tensor], Any]) -> None:
    """Makes the model apply ``change`` to its logits."""
    forward = type(model).forward

    def changed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.logits = change(outputs.logits)
        return outputs

    model.__class__ = type(type(model).__name__, (type(model),), {"forward": changed})


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """Yields a model. After the test, checks that the model's output head still computes logits."""
    model = build("qwen2")
    head = model.get_output_embeddings()
    yield model
    assert "forward" not in vars(head)
    assert head(torch.zeros(1, 16, dtype=head.weight.dtype)).shape == (1, VOCAB)


@pytest.fixture
def inputs(model: nn.Module) -> dict[str, Any]:
    return batch_of(model)[0]


def test_labels_are_refused(model: nn.Module, inputs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"inputs must not hold labels.*linear_mpo_loss"):
        hidden_and_head(model, **inputs, labels=inputs["input_ids"])
    assert hidden_and_head(model, **inputs, labels=None).logit_scale == 1


def test_a_model_without_output_embeddings_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"must have get_output_embeddings\(\).*got Sequential"):
        hidden_and_head(nn.Sequential(nn.Linear(2, 2)), **inputs)
    with pytest.raises(TypeError, match="must have an output head, got None from Qwen2Model"):
        hidden_and_head(build("qwen2").model, **inputs)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_head_that_is_not_called_once_is_refused(model: nn.Module, inputs: dict[str, Any], calls: int) -> None:
    head = model.get_output_embeddings()
    proxy = nn.Identity()
    proxy.forward = lambda hidden: [*(head(hidden) for _ in range(calls)), hidden][0]
    model.lm_head = proxy
    model.get_output_embeddings = lambda: head
    with pytest.raises(RuntimeError, match=rf"output head once in a forward, got {calls} calls.*mpo_loss\(model"):
        hidden_and_head(model, **inputs)


class ScaledLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def patched() -> nn.Module:
    layer = nn.Linear(16, VOCAB).double()
    layer.forward = lambda input: 2 * nn.functional.linear(input, layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize(
    "head",
    [
        lambda: nn.Sequential(nn.Linear(16, VOCAB)).double(),
        lambda: ScaledLinear(16, VOCAB).double(),
        patched,
    ],
    ids=["Sequential", "subclass", "patched"],
)
def test_a_head_that_is_not_plain_is_refused(inputs: dict[str, Any], head: Callable[[], nn.Module]) -> None:
    model = build("qwen2")
    model.set_output_embeddings(head())
    with pytest.raises(TypeError, match=r"plain torch.nn.Linear.*with another forward.*mpo_loss\(model"):
        hidden_and_head(model, **inputs)


def test_quantised_weight_is_refused(inputs: dict[str, Any]) -> None:
    model = build("qwen2")
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"floating-point weight, got torch.int8.*mpo_loss\(model"):
        hidden_and_head(model, **inputs)


def test_a_weight_that_is_sharded_during_forward_is_refused(
    model: nn.Module, inputs: dict[str, Any], tmp_path: Path
) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        whole = model.lm_head.weight
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        from torch.distributed.tensor import Shard, distribute_tensor

        model.lm_head.weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
        with pytest.raises(
            RuntimeError, match=r"whole during forward, or sharded.*, got DTensor.*Shard.*mpo_loss\(model"
        ):
            hidden_and_head(model, **inputs)
        model.lm_head.weight = whole
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("how", ["numel", "storage"])
def test_a_weight_that_is_freed_after_the_heads_forward_is_refused(inputs: dict[str, Any], how: str) -> None:
    model = build("llama")

    def free(layer: nn.Module, args: Any, output: Any) -> None:
        if how == "numel":
            layer.weight.data = torch.empty(0, dtype=torch.float64)
        else:  # FSDP
            layer.weight.untyped_storage().resize_(0)

    model.lm_head.register_forward_hook(free)
    with pytest.raises(RuntimeError, match=r"shard the head together with the root.*mpo_loss\(model"):
        hidden_and_head(model, **inputs)


def test_a_weight_that_zero3_frees_is_kept(inputs: dict[str, Any]) -> None:
    model = build("llama")
    expected = model.lm_head.weight.detach().clone()
    model.lm_head.weight.ds_id = 0  # the mark of DeepSpeed

    def free(layer: nn.Module, args: Any, output: Any) -> None:
        layer.weight.data = torch.empty(0, dtype=torch.float64)

    model.lm_head.register_forward_hook(free)
    head = hidden_and_head(model, **inputs)
    assert model.lm_head.weight.numel() == 0
    assert torch.equal(head.weight, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + 1,
        lambda logits: logits * 0,
        lambda logits: logits * torch.nan,
        lambda logits: logits.relu(),
        lambda logits: 5 * torch.tanh(logits / 5),  # which is missing in the config
        lambda logits: logits * torch.arange(1, TOKENS + 1).unsqueeze(-1),
        lambda logits: logits[:, -1:],
        lambda logits: logits[..., 1:],
        lambda logits: (logits + logits.abs() * 1e-5).float(),
    ],
    ids=["offset", "zero", "nan", "relu", "softcap", "by row", "slice", "columns", "little"],
)
def test_what_is_done_to_logits_and_not_known_is_refused(
    inputs: dict[str, Any], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    model = build("qwen2")
    after_head(model, change)
    with pytest.raises(RuntimeError, match=r"got an unknown change that \w+ makes to its logits.*mpo_loss\(model"):
        hidden_and_head(model, **inputs)


def test_an_error_of_the_model_after_its_head_says_that_the_probe_was_there(inputs: dict[str, Any]) -> None:
    model = build("qwen2")
    after_head(model, lambda logits: logits[..., 40])
    with pytest.raises(RuntimeError, match=r"in place of its logits, got IndexError.*mpo_loss\(model") as error:
        hidden_and_head(model, **inputs)
    assert isinstance(error.value.__cause__, IndexError)
    assert "forward" not in vars(model.lm_head)


def test_an_error_of_the_model_before_its_head_is_passed_on(model: nn.Module, inputs: dict[str, Any]) -> None:
    model.model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_and_head(model, **inputs)


@pytest.mark.parametrize("outputs", [(torch.zeros(2),), SimpleNamespace(logits=None)], ids=str)
def test_outputs_without_logits_are_refused(model: nn.Module, inputs: dict[str, Any], outputs: Any) -> None:
    model.register_forward_hook(lambda *args: outputs)
    with pytest.raises(RuntimeError, match=r"must return an object with logits, got .*mpo_loss\(model"):
        hidden_and_head(model, **inputs)


def test_inputs_that_are_not_passed_by_keyword_are_told_how_to_be() -> None:
    with pytest.raises(
        TypeError, match=r"by keyword, as in hidden_and_head\(model, input_ids=input_ids\), got 1 without: T"
    ):
        hidden_and_head(nn.Linear(2, 2), torch.zeros(1, 2))

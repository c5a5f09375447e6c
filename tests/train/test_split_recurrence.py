"""Tests recurrent layers on rows with several responses: each response starts from the state after its prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from digits_run import recipe, write_pairs
from families import ALL, DELTA_NET, HYBRID, PAD, REFUSED, build, sample, text_model
from single_forwards import assert_same, batch_of, gradients, loss_of
from torch import nn

from mpo_ext.demo import digits
from mpo_ext.demo.model import IMAGE_TOKENS, build_processor, make_config
from mpo_ext.train import model_card, split_recurrence
from mpo_ext.train.encode import Sample
from mpo_ext.train.forward import forward
from mpo_ext.train.loop import train
from mpo_ext.train.masks import attention_masks, prompt_positions, undo_split_attention, use_split_attention
from mpo_ext.train.shared_prefix import check_shared_prefix, supports_shared_prefix
from mpo_ext.train.split_attention import RowSegments
from mpo_ext.train.split_recurrence import _groups, _pieces, _SplitForward, _States, split_layers


def pairs_of(family: str, count: int = 3) -> list[Sample]:
    """Returns ``count + 2`` pairs of unequal lengths.

    The first ``count`` pairs share a prompt. The next pair has a shorter prompt. The last pair has a longer prompt.
    """
    some = 1 if ALL[family].images else 0
    shared = [
        sample(family, seed, prompt=3, text=9, chosen=1 + 3 * seed % 7, rejected=6 - seed, images=2 * some)
        for seed in range(count)
    ]
    return [*shared, sample(family, 21, text=2, chosen=8, rejected=2), sample(family, 22, text=17, images=some)]


def split_model(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return build(family, "split sdpa", dtype)


def checked(model: nn.Module, family: str, **options: Any) -> str | None:
    return check_shared_prefix(model, pairs_of(family), pad_id=PAD, positions=prompt_positions(model), **options)


def split_forwards(model: nn.Module) -> list[_SplitForward]:
    forwards = [vars(module).get("forward") for module in model.modules()]
    return [forward for forward in forwards if isinstance(forward, _SplitForward)]


def both_layouts(model: nn.Module, samples: list[Sample]) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    losses = [loss_of(model, batch_of(model, samples, layout)) for layout in ("shared", "separate")]
    return [(loss.detach(), gradients(model, loss)) for loss in losses]


@pytest.mark.parametrize("family", HYBRID)
def test_loss_and_gradients_are_those_of_separate_rows(family: str) -> None:
    model = split_model(family)
    assert supports_shared_prefix(model) is None
    assert checked(model, family) is None
    (loss, grads), (expected_loss, expected) = both_layouts(model, pairs_of(family))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same(grads, expected, 1e-5)


@pytest.mark.parametrize("shortest", [0.0, 0.75, 1.0])
def test_a_layer_in_float64_gives_the_outputs_and_gradients_of_single_sequences(
    shortest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_recurrence, "SHORTEST", shortest)
    layer = build("lfm2", None, torch.float64).model.layers[0].conv
    generator = torch.Generator().manual_seed(0)
    rows = [(9, 3, 1, 5, 4), (1, 2, 2), (6, 4), (9, 2, 2), (4,), ()]
    hidden = torch.randn(len(rows), 22, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(rows), 22, 16, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(hidden)
    for number, (row, lengths) in enumerate(zip(hidden, rows, strict=True)):
        places = torch.arange(sum(lengths)).split(list(lengths))
        for response in places[1:] or places:
            sequence = torch.cat([places[0], response]) if len(places) > 1 else response
            out = layer(row[sequence].unsqueeze(0))[0]
            expected = expected.index_put((torch.tensor(number), sequence), out)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), hidden)

    assert split_layers(layer) is None
    for shape in ((len(rows), 22), (1, len(rows) * 22)):  # also as one packed row
        segments = RowSegments([[row] for row in rows], 22, torch.device("cpu"))
        actual = layer(hidden_states=hidden.reshape(*shape, 16), row_segments=segments).reshape(hidden.shape)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        assert not actual[4, 4:].any()
        (grad,) = torch.autograd.grad((actual * weights).sum(), hidden)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12)


def test_rows_become_pieces() -> None:
    segments = RowSegments([[(4, 3, 2)], [(5, 6)], [(2,)], []], 11, torch.device("cpu"))
    pieces = _pieces(segments)
    assert [tuple(piece) for piece in pieces] == [
        (4, None, True, False), (3, 0, False, False), (2, 0, False, False), (2, None, False, True),
        (11, None, False, False), (2, None, False, False), (9, None, False, True), (11, None, False, True),
    ]  # fmt: skip


def test_pieces_of_similar_lengths_are_one_call() -> None:
    assert list(_groups({1: 10, 2: 4, 3: 8, 4: 7, 5: 3}, 0.75)) == [[1, 3], [4], [2, 5]]
    assert list(_groups({1: 10, 2: 4, 3: 10}, 1.0)) == [[1, 3], [2]]
    assert list(_groups({}, 1.0)) == []


def test_a_layer_runs_once_over_each_prompt_and_each_group_of_responses() -> None:
    model = split_model("qwen3_5")
    layer = model.model.layers[0].linear_attn
    samples = [
        sample("qwen3_5", 1, text=9, chosen=8, rejected=7),
        sample("qwen3_5", 2, text=9, chosen=3, rejected=7),
        sample("qwen3_5", 3, text=5, chosen=3, rejected=2),
    ]
    loss_of(model, batch_of(model, samples, "shared"))  # checks the layer
    shapes = []
    layer.in_proj_qkv.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape[:2])))
    loss_of(model, batch_of(model, samples, "shared"))
    assert shapes == [(2, 9), (1, 5), (3, 8), (2, 3), (1, 2)]


def lost(what: str) -> Callable[[Any], _States]:
    """Returns a deliberately wrong replacement for ``_States.join``.

    ``what`` is the mistake. Examples: "no states", or "no gradient of recurrent" (the gradient of ``recurrent`` is
    lost).
    """

    def wrong(states: Any) -> _States:
        joined = JOIN(states)
        if what == "no states":
            return _States()
        if what == "the states of another prompt":
            return JOIN([states[-1]] * len(states))
        change = {"no gradient": torch.Tensor.detach, "no value": torch.zeros_like}[what.partition(" of ")[0]]
        name = what.rpartition(" ")[2]
        setattr(joined, name, {i: change(state) for i, state in getattr(joined, name).items()})
        return joined

    return wrong


JOIN = _States.join


MISTAKES = ["no states", "no value of recurrent", "no gradient of recurrent", "no value of conv"]


@pytest.mark.parametrize(
    ("family", "dtype", "mistake"),
    [
        (family, dtype, mistake)
        for family, dtypes in (
            ("qwen3_5", (torch.float32, torch.bfloat16)),
            ("bamba", (torch.float32,)),
            ("lfm2", (torch.bfloat16,)),
        )
        for dtype in dtypes
        for mistake in MISTAKES
        if family != "lfm2" or "recurrent" not in mistake  # a short convolution has no recurrent state
    ],
)
def test_a_layer_that_does_not_continue_from_the_states_is_refused(
    family: str, mistake: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = split_model(family, dtype)
    monkeypatch.setattr(_States, "join", staticmethod(lost(mistake)))
    reason = checked(model, family) or ""
    assert "must continue from the states of a prompt" in reason
    assert "no gradient" not in mistake or "gradients that differ" in reason


def test_states_that_decay_within_a_token_pass_the_check() -> None:
    torch.manual_seed(1)  # the gradients that reach the prompt are rounding errors
    heads = {"linear_num_key_heads": 8, "linear_num_value_heads": 8}
    heads |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
    layer = text_model("Qwen3_5Text", **{**DELTA_NET, **heads, "hidden_size": 512}).model.layers[0].linear_attn
    with torch.no_grad():
        layer.A_log.fill_(2)
    assert split_layers(layer) is None
    segments = RowSegments([[(16, 4, 4)]], 24, torch.device("cpu"))
    assert layer(torch.randn(1, 24, 512), row_segments=segments).isfinite().all()


@pytest.mark.parametrize("mistake", ["no states", "the states of another prompt"])
@pytest.mark.parametrize("family", ["qwen3_5", "bamba", "lfm2"])
def test_the_check_of_the_first_pairs_finds_wrong_states(
    family: str, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = split_model(family)
    for split in split_forwards(model):
        split._is_checked = True
    monkeypatch.setattr(_States, "join", staticmethod(lost(mistake)))
    assert "differ by" in (checked(model, family) or "")


@pytest.mark.parametrize("family", REFUSED)
def test_a_recurrence_without_an_initial_state_is_refused(family: str) -> None:
    model = build(family, None)
    before = model.config._attn_implementation
    kind = {"mamba": "MambaMixer", "jamba": "JambaMambaMixer"}[family]
    assert use_split_attention(model) == f"the recurrence of {kind} takes no initial state"
    assert model.config._attn_implementation == before
    assert not split_forwards(model)
    assert "linear_attention" in (supports_shared_prefix(model) or "")


def test_no_layer_changes_where_attention_has_no_split_form() -> None:
    model = build("qwen3_5", None)
    model.config._attn_implementation = "mine"
    assert use_split_attention(model) == "attention 'mine' has no split form"
    assert not split_forwards(model)


def test_no_mask_separates_responses() -> None:
    model = split_model("lfm2")
    samples = pairs_of("lfm2")
    segments = batch_of(model, samples, "masked").segments
    with pytest.raises(ValueError, match=r'"shared" or "separate".*got "masked".*layers of conv'):
        attention_masks(model, segments)
    assert 'got "masked"' in (checked(model, "lfm2", layout="masked") or "")
    undo_split_attention(model)
    with pytest.raises(ValueError, match=r'must be "separate".*got "shared".*layers of conv'):
        forward(model, batch_of(model, samples, "shared"))


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "lfm2"])
def test_rows_without_segments_go_through_the_layers_as_before(family: str) -> None:
    ours, theirs = split_model(family), build(family, "sdpa")
    ids = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for options in ({"attention_mask": mask}, {}):
        assert torch.equal(ours(ids, **options).logits, theirs(ids, **options).logits)
    generated = [model.eval().generate(ids, max_new_tokens=4, do_sample=False) for model in (ours, theirs)]
    assert torch.equal(*generated)


def test_undone_a_model_is_as_before() -> None:
    model = build("qwen3_5", "sdpa")
    layer = model.model.layers[0].linear_attn
    hooked = layer.forward
    layer.forward = hooked  # as accelerate's hooks do
    attributes = [dict(vars(module)) for module in model.modules()]
    for _ in range(2):  # the second call changes nothing
        assert use_split_attention(model) is None
    assert len(split_forwards(model)) == 1
    undo_split_attention(model)
    assert model.config._attn_implementation == "sdpa"
    assert layer.forward == hooked
    assert [set(vars(module)) for module in model.modules()] == [set(values) for values in attributes]


def test_a_copy_of_a_model_runs_its_own_layers() -> None:
    model = split_model("qwen3_5")
    samples = pairs_of("qwen3_5")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].linear_attn.out_proj.weight.mul_(0)
    losses = [loss_of(one, batch_of(one, samples, "shared")) for one in (model, twin)]
    expected = [loss_of(one, batch_of(one, samples, "separate")) for one in (model, twin)]
    assert abs(losses[0] - losses[1]) > 1e-3
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


def test_nothing_is_saved_with_the_model(tmp_path: Path) -> None:
    model = split_model("qwen3_5")
    loss_of(model, batch_of(model, pairs_of("qwen3_5"), "shared"))
    assert list(model.state_dict()) == list(build("qwen3_5", None).state_dict())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    assert not split_forwards(again)


def test_recomputed_layers_give_the_same() -> None:
    samples = pairs_of("qwen3_5")
    plain, recomputed = split_model("qwen3_5"), split_model("qwen3_5")
    recomputed.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [loss_of(model, batch_of(model, samples, "shared")) for model in (plain, recomputed)]
    grads = [gradients(model, loss) for model, loss in zip((plain, recomputed), losses, strict=True)]
    assert torch.equal(*losses)
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_adapters_in_the_layers_get_the_gradients_of_separate_rows() -> None:
    peft = pytest.importorskip("peft", reason="peft is not a dependency of the package")
    config = peft.LoraConfig(r=2, target_modules=["in_proj_qkv", "in_proj_a", "out_proj", "q_proj"])
    model = peft.get_peft_model(split_model("qwen3_5"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    (loss, grads), (expected_loss, expected) = both_layouts(model, pairs_of("qwen3_5"))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_same(grads, expected, 1e-5)
    assert all("lora" in name for name in grads)


@pytest.mark.parametrize("family", ["qwen3_5", "bamba", "lfm2"])
def test_autocast_gives_the_loss_of_separate_rows_within_rounding(family: str) -> None:
    model = split_model(family)
    samples = pairs_of(family)
    with torch.autocast("cpu", torch.bfloat16):
        assert checked(model, family) is None
        losses = [loss_of(model, batch_of(model, samples, layout)).item() for layout in ("shared", "separate")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"row_segments": None}, "must pass row_segments on to Qwen3_5GatedDeltaNet"),
        ({"seq_idx": torch.zeros(1)}, "hidden_states alone in rows with several responses, got seq_idx"),
        ({"cache": transformers.DynamicCache()}, "hidden_states alone in rows with several responses, got cache"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_layer_called_with_more_than_the_segments_is_refused(changed: dict[str, Any], message: str) -> None:
    model = split_model("qwen3_5")
    model.model.layers[0].linear_attn.register_forward_pre_hook(
        lambda layer, args, kwargs: (args, {**kwargs, **changed}), with_kwargs=True
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        forward(model, batch_of(model, pairs_of("qwen3_5"), "shared"))


def hybrid() -> tuple[Any, Any]:
    """Returns a tiny InternVL model for images of digits, and its processor. The model has Qwen3.5's decoder."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    text = {"model_type": "qwen3_5_text", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": 128, **DELTA_NET}
    vision: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "patch_size": [8, 8]}
    torch.manual_seed(0)
    config = make_config(tokenizer, text, vision, pixels=digits.IMAGE_PIXELS, image_tokens=IMAGE_TOKENS)
    return transformers.InternVLForConditionalGeneration(config), processor


def test_a_run_trains_as_with_separate_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_card, "write_card", lambda folder, **values: None)  # draws curves
    pairs = write_pairs(tmp_path / "pairs", 12, text_only=4)
    logs, consoles = [], []
    for shared in (True, "masked"):
        model, processor = hybrid()
        lines: list[dict[str, float]] = []
        settings = {"loss__shared_prefix": shared, "model__gradient_checkpointing": True, "data__workers": 0}
        run = recipe(tmp_path / str(shared), pairs, **settings)
        assert (
            train(run, model=model, processor=processor, on_step=lambda _, line, to=lines: to.append(dict(line))) == 0
        )
        logs.append(lines)
        consoles.append(capsys.readouterr())
    assert "(shared prefix), checked on the first pairs" in "".join(consoles[0])
    assert "separate rows for chosen and rejected responses: loss.shared_prefix is masked" in "".join(consoles[1])
    assert "has layers of linear_attention" in "".join(consoles[1])
    assert len(logs[0]) == 2
    for ours, theirs in zip(*logs, strict=True):
        for name in ("loss", "chosen_logp", "chosen_reward", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name

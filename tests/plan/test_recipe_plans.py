"""Plans the recipes of recent models on the meta device, with the sizes from their published configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from test_plan import make, part, write_data

from benchmarks.published_configs import PUBLISHED
from mpo_ext.plan.machines import gpu
from mpo_ext.plan.planner import plan
from mpo_ext.plan.report import Plan
from mpo_ext.train.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
MOE = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}


def planned_recipe(folder: Path, name: str, *overrides: str) -> Plan:
    build, *_ = PUBLISHED[name]
    build().save_pretrained(folder / "model")
    pairs = write_data(folder / "pairs.jsonl", 300)
    settings = [f"model.path={folder / 'model'}", f"data.train={pairs}", *overrides]
    return plan(load_recipe(RECIPES / f"{name}.yaml", settings))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_plans_the_published_model(tmp_path: Path, name: str) -> None:
    _, total, active = PUBLISHED[name]
    planned = planned_recipe(tmp_path, name)
    assert planned.parameters / 1e9 == pytest.approx(total, abs=0.06)
    assert planned.active / 1e9 == pytest.approx(active, abs=0.15)
    assert planned.trainable == planned.parameters
    assert (planned.layout, planned.tokens) == ("shared", 16384)
    assert part(planned, "optimizer state").bytes == 8 * planned.parameters
    row = dict(next(rows for title, _, rows in planned.tables() if title == "Model"))  # type: ignore[arg-type]
    assert ("active per token" in row) == ("a3b" in name)
    assert any("auxiliary loss of 48 routers with weight 0.001" in note for note in planned.notes) == ("a3b" in name)


def test_a_token_of_30b_a3b_costs_as_much_as_its_active_weights(tmp_path: Path) -> None:
    moe = planned_recipe(tmp_path / "moe", "qwen3-vl-30b-a3b", "model.freeze=[vision_tower]")
    dense = planned_recipe(tmp_path / "dense", "qwen3-vl-8b", "model.freeze=[vision_tower]")
    flop = [2 * (p.cost_model.decoder + p.cost_model.expert_share * p.cost_model.experts) for p in (moe, dense)]
    assert moe.cost_model.experts == 48 * 128 * 3 * 2048 * 768
    assert moe.cost_model.expert_share == 8 / 128
    assert flop[0] / flop[1] == pytest.approx(2.7 / 6.9, rel=0.05)  # without embedding and head
    parts = moe.predict("mpo_ext", gpu("H100")).parts
    assert parts["experts, products, policy"] > parts["decoder, products, policy"]
    assert moe.predict("mpo_ext", gpu("H100")).seconds < dense.predict("mpo_ext", gpu("H100")).seconds


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen3Moe", MOE),
        ("GptOss", {"num_local_experts": 16, "num_experts_per_tok": 2, "head_dim": 8}),  # transposed, with biases
        ("Mixtral", {"num_local_experts": 16, "num_experts_per_tok": 2}),
        ("DeepseekV3", {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                        "moe_intermediate_size": 8, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
                        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 2,
                        "head_dim": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_experts_of_several_families(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    attention = ["model.attention=eager"] if family == "GptOss" else []
    recipe = make(tmp_path, *attention, family=family, **settings)
    planned = plan(recipe)
    config = transformers.AutoConfig.from_pretrained(recipe.model.path)
    model = transformers.AutoModelForCausalLM.from_config(config)
    experts = [p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    assert planned.cost_model.experts == sum(p.numel() for p in experts) > 0
    assert planned.cost_model.expert_share == 2 / 16
    assert planned.active == planned.parameters - planned.cost_model.experts * 14 // 16


def test_adapters_leave_the_experts_frozen(tmp_path: Path) -> None:
    planned = plan(make(tmp_path, "model.lora.rank=2", family="Qwen3Moe", **MOE))
    assert planned.cost_model.experts == 2 * 16 * 3 * 16 * 8
    assert part(planned, "gradients").bytes == 4 * planned.trainable < 4 * planned.cost_model.experts


def test_the_router_logits_are_kept_for_the_loss_only(tmp_path: Path) -> None:
    on, off = (
        plan(make(tmp_path / coef, f"loss.router_aux_loss_coef={coef}", family="Qwen3Moe", **MOE))
        for coef in ("0.1", "0")
    )
    positions = on.positions
    assert part(on, "activations").bytes - part(off, "activations").bytes == 4 * 16 * 2 * positions
    assert any("router_aux_loss_coef of the recipe is 0" in note for note in off.notes)

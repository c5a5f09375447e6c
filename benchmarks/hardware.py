"""Makes the table of the GPUs that the recipes need, from memory predictions of mpo_ext.plan."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.published_configs import PUBLISHED
from benchmarks.tables import Documents
from mpo_ext.data.jsonl import write_pairs
from mpo_ext.data.records import Pair
from mpo_ext.plan.planner import plan
from mpo_ext.report import markdown_table
from mpo_ext.train.recipe import load_recipe

_RECIPES = Path(__file__).parents[1] / "recipes"
GPU_SIZES = (24, 48, 80, 141)  # memory in GB of common GPUs, such as RTX 4090, L40S, H100 and H200
USABLE_SHARE = 0.9  # assumed; the rest is for CUDA, fragments and the buffers of communication
#: Kind of training, overrides of the recipe and number of ranks.
WAYS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("LoRA", ("model.lora={}", "model.dtype=bfloat16", "data.max_length=4096"), 1),
    ("all weights", (), 1),
    ("all weights, FSDP2", (), 8),
)


def needed_memory(name: str, overrides: tuple[str, ...], ranks: int, folder: Path) -> tuple[int, int]:
    """Returns the assumed sequence length of a recipe, and the predicted peak bytes per GPU.

    The length counts the tokens of a prompt and one response.

    Args:
        name: Name of the recipe, without suffix.
        overrides: Settings that replace settings of the recipe, such as "data.max_length=4096".
        ranks: Number of GPUs. With several GPUs, each GPU holds only a shard of the parameters, gradients and
            optimizer state.
        folder: Folder to which a model config and a file with one pair are written.
    """
    model, pairs = folder / name, folder / "pairs.jsonl"
    if not model.exists():
        PUBLISHED[name][0]().save_pretrained(model)
        write_pairs(pairs, [Pair("q", "yes", "no")])
    planned = plan(
        load_recipe(_RECIPES / f"{name}.yaml", [f"model.path={model}", f"data.train={pairs}", *overrides]), world=ranks
    )
    return planned.tokens, planned.total_sharded if ranks > 1 else planned.total_bytes


def smallest_gpu(needed: int) -> int | None:
    """Returns the memory in GB of the smallest GPU with ``needed`` usable bytes, or None if there is none."""
    return next((size for size in GPU_SIZES if needed <= USABLE_SHARE * size * 1e9), None)


def gpus(documents: Documents) -> str:
    """Returns a table with the predicted memory of each recipe, and the smallest GPU with enough memory."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in PUBLISHED:
            for way, overrides, ranks in WAYS:
                tokens, needed = needed_memory(name, overrides, ranks, Path(folder))
                size = smallest_gpu(needed)
                fits = "none" if size is None else f"{size} GB"
                rows.append([f"`{name}.yaml`", way, f"{tokens:,}", str(ranks), f"{needed / 1e9:.1f} GB", fits])
    header = ["recipe", "trained", "tokens", "GPUs", "memory of each GPU, predicted", "smallest GPU"]
    sizes = f"{', '.join(map(str, GPU_SIZES[:-1]))} and {GPU_SIZES[-1]} GB"
    return (
        f"{markdown_table(header, rows)}\n"
        "The column 'tokens' is the length of a prompt and one response; every pair is assumed to have this length. "
        "'LoRA' is the recipe with adapters of rank 16 and bfloat16 weights; the other rows are unchanged recipes. "
        f"The considered GPUs have {sizes}, of which {USABLE_SHARE:.0%} are assumed to be usable."
    )

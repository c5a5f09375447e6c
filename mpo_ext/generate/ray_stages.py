"""Runs a pipeline on a Ray cluster. Each Ray actor holds an engine, and the driver stores the samples.

The driver reads the items, and sends each actor a few groups of items (blocks) at a time. When a block is finished,
the driver stores its samples. A run with Ray resumes like any other run and gives the same output files.
"""

import contextlib
import datetime
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from mpo_ext.checks import check_integer, check_number, install_hint
from mpo_ext.generate.early_blocks import EarlyBlocks
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.items import Item, ItemSource, item_files, open_items
from mpo_ext.generate.outputs import Summary
from mpo_ext.generate.progress import SamplingProgress
from mpo_ext.generate.ray_pool import RayPool
from mpo_ext.generate.ray_worker import Block
from mpo_ext.generate.runner import PairPipeline, check_output_files, write_outputs
from mpo_ext.generate.sampler import blocks, check_records, open_journal, stored_blocks, stored_date


def run(
    pipeline: PairPipeline,
    make_engine: Callable[[], Engine],
    source: str | Path,
    out: str | Path,
    *,
    address: str = "local",
    engines: int = 1,
    gpus_per_engine: float = 0,
    block_size: int = 64,
    limit: int | None = None,
    stream: TextIO | None = None,
    **place: Any,
) -> Summary:
    """Runs a pipeline like ``runner.run``, but with engines on a Ray cluster, and returns the summary of the run.

    Only this process, the driver, reads ``source`` and writes to ``out``. If an engine dies, a new engine takes over
    its unfinished items. The actors end when the driver ends or is killed.

    Args:
        pipeline: As in ``runner.run``.
        make_engine: Function that creates an engine; each actor calls it once.
        source: As in ``runner.run``.
        out: As in ``runner.run``.
        address: Address of the cluster. "auto": the cluster that runs on this machine. "local": a new cluster on this
            machine, which ends with the run. Not used if Ray is already initialized.
        engines: Number of actors.
        gpus_per_engine: Number of GPUs of each actor.
        block_size: As in ``runner.run``.
        limit: As in ``runner.run``.
        stream: As in ``runner.run``.
        **place: As in ``runner.run``; ``image_root`` must be the same folder on every machine.

    Raises:
        BlockError: If responses to a group of items cannot be sampled. Groups that have begun are stored first.
        ImportError: If ray is missing.
        RuntimeError: If an engine cannot be created, or two engines have different settings.
        SettingsMismatchError: If the folder holds a run with other settings or another input.
    """
    check_integer("engines", engines, least=1)
    check_number("gpus_per_engine", gpus_per_engine, "[0, inf)")
    check_integer("block_size", block_size, least=1)
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"ray_stages needs ray: {install_hint('ray')} ({error})") from error
    out = Path(out)
    check_output_files(pipeline, source, item_files(source, **place), out)
    items = open_items(source, limit=limit, **place)
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            _connect(ray, address)
            stack.callback(ray.shutdown)
        # All machines use the same date, that of the first day of the run.
        date = stored_date(out) or datetime.date.today().isoformat()
        arguments = (pipeline, make_engine, date)
        pool = RayPool(ray, arguments, engines=engines, gpus=gpus_per_engine, block_size=block_size, stream=stream)
        stack.enter_context(contextlib.closing(pool))
        name = _sample(pool, pipeline, items, out, block_size, stream)
    written = write_outputs(pipeline, items, out, model=name)
    assert written is not None  # the journal is complete
    return written


def _sample(
    pool: RayPool, pipeline: PairPipeline, items: ItemSource, out: Path, block_size: int, stream: TextIO | None
) -> str:
    """Samples the responses that are missing in the folder ``out``, and returns the name of the model."""
    name, settings = pool.start()
    with contextlib.ExitStack() as stack:
        journal = stack.enter_context(open_journal(pipeline, settings, items, out))
        early = stack.enter_context(EarlyBlocks(journal))
        progress = stack.enter_context(SamplingProgress(pipeline.name, items.count, stream))
        summary = Summary()

        def count(block_items: Sequence[Item], records: Iterator[dict[str, Any]]) -> None:
            for item in block_items:
                item_records = list(itertools.islice(records, len(pipeline.keys(item))))
                summary.add(pipeline.make_pairs(item, item_records, name), len(item_records))
                progress.advance(summary.counts())

        def to_do() -> Iterator[Block]:
            start = first_item = 0
            for block in stored_blocks(blocks(items.items(), pipeline, block_size), pipeline, journal):
                keys = list(itertools.chain.from_iterable(block.keys))
                if block.is_complete:
                    count(block.items, iter(block.records))
                elif (finished := early.announce(start, keys, block.records)) is not None:
                    count(block.items, iter(finished))
                else:
                    yield Block(start, first_item, block.items, keys)
                start += len(keys)
                first_item += len(block.items)

        for block, records in pool.run(to_do()):
            check_records(records, block.keys, pipeline.name)
            early.finish(block.start, records)
            count(block.items, iter(records))
    return name


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The processes that an engine starts, such as those of vLLM, end with its actor.
    os.environ.setdefault("RAY_process_group_cleanup_enabled", "1")
    options = {"include_dashboard": False} if address == "local" else {}
    ray.init(address=address, logging_level="WARNING", **options)

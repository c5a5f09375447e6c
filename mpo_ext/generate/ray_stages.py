"""The pipelines as a stage of Ray Data: actors with an engine each, and a driver that keeps the journal.

The driver reads the items (all that are still to do, at once), sends out the blocks that the journal lacks, and
appends what comes back in the order of the input. So a run with Ray resumes like any other, and gives the same
outputs.
"""

import functools
import itertools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from mpo_ext.checks import check_integer, install_hint
from mpo_ext.generate import items as item_reading
from mpo_ext.generate import runner
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.outputs import Summary
from mpo_ext.generate.progress import SamplingProgress
from mpo_ext.journal import Journal


def run(
    pipeline: runner.Pipeline,
    make_engine: Callable[[], Engine],
    source: str | Path,
    out: str | Path,
    *,
    engine_settings: dict[str, Any],
    model: str,
    workers: int = 1,
    gpus_per_worker: float = 0,
    block_size: int = 64,
    limit: int | None = None,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    stream: TextIO | None = None,
) -> Summary | None:
    """Does what ``runner.run`` does, on the machines of a Ray cluster.

    Args:
        pipeline: ``DropoutNTP`` or ``Correctness``.
        make_engine: Called once in each worker.
        source: JSONL file of items, or a meta file of such files; the driver reads them.
        out: Folder of the run, which the driver writes.
        engine_settings: What ``settings()`` of the engines gives; the driver has no engine to ask.
        model: Name of the model.
        workers: Number of workers.
        gpus_per_worker: GPUs of each.
        block_size: Samples that a worker is asked for at a time.
        limit: Takes the first items only.
        image_root: Folder that relative image paths start from; the same on every machine. A meta file has its own.
        root_map: Pairs of prefixes (old, new): where the folders in a meta file have moved to.
        stream: Where progress is shown; None shows none.

    Raises:
        ImportError: If ray is missing.
    """
    try:
        import ray
        from ray.data import ActorPoolStrategy, DataContext
    except ImportError as error:
        raise ImportError(f"ray_stages needs Ray Data: {install_hint('ray')} ({error})") from error
    check_integer("workers", workers, least=1)
    check_integer("block_size", block_size, least=1)
    out = Path(out)
    files = item_reading.item_files(source, image_root=image_root, root_map=root_map)
    digest, total = item_reading.scan(files)
    settings = runner.run_settings(pipeline, engine_settings, digest, 1)
    items = functools.partial(item_reading.take, files, limit)
    per_block = max(1, block_size // max(1, len(pipeline.keys(item_reading.Item()))))
    DataContext.get_current().execution_options.preserve_order = True

    with Journal(runner.journal_path(out, 0, 1), settings) as journal:
        finished = sum(1 for _ in journal.records())
        per_item = len(pipeline.keys(item_reading.Item()))
        whole, partial = divmod(finished, per_item * per_block)
        numbered = enumerate(runner.blocks(items(), per_block))
        # Bytes, because Arrow would give all dicts of a column the same keys.
        todo = [
            {"number": number, "block": pickle.dumps(block)}
            for number, block in itertools.islice(numbered, whole, None)
        ]
        with SamplingProgress(pipeline.name, total if limit is None else min(total, limit), stream) as progress:
            if todo:
                data = ray.data.from_items(todo, override_num_blocks=len(todo))
                stage = data.map_batches(
                    _Worker,
                    fn_constructor_args=(pipeline, make_engine),
                    batch_size=1,
                    compute=ActorPoolStrategy(size=workers),
                    num_gpus=gpus_per_worker or None,
                )
                for row in stage.iter_rows():
                    block, records = pickle.loads(row["block"]), pickle.loads(row["records"])
                    journal.append(list(itertools.chain(*records))[partial if row["number"] == whole else 0 :])
                    for item, own in zip(block, records, strict=True):
                        progress.add(pipeline.make_pairs(item, own, model), len(own))
        return runner.write_outputs(pipeline, items(), out, world_size=1, model=model)


class _Worker:
    """Holds the engine of one worker."""

    def __init__(self, pipeline: runner.Pipeline, make_engine: Callable[[], Engine]) -> None:
        self.pipeline = pipeline
        self.engine = make_engine()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        blocks = map(pickle.loads, batch["block"])
        return {**batch, "records": [pickle.dumps(self.pipeline.sample(block, self.engine)) for block in blocks]}

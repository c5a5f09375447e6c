"""Runs a pipeline as a stage of Ray Data: each actor holds an engine, and the driver keeps the journal.

The driver reads the unfinished items into memory, sends out the blocks that the journal lacks, and appends the results
in the order of the input. A run with Ray resumes like any other run and gives the same outputs.
"""

import dataclasses
import itertools
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mpo_ext.checks import check_integer, install_hint
from mpo_ext.generate.engine import Engine
from mpo_ext.generate.feeding import run_steps
from mpo_ext.generate.items import Item, open_items
from mpo_ext.generate.outputs import Summary
from mpo_ext.generate.progress import SamplingProgress
from mpo_ext.generate.runner import PairPipeline, write_outputs
from mpo_ext.generate.sampler import Pipeline, blocks, open_journal, set_date, stored_date


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteEngine:
    """An engine that is created separately in each worker.

    Attributes:
        make: Function that creates the engine; each worker calls it once.
        name: Name of the model, which the pairs record.
        settings: Result of the engine's ``settings()``. The driver needs it, because it has no engine.
    """

    make: Callable[[], Engine]
    name: str
    settings: Mapping[str, Any]


def run(
    pipeline: PairPipeline,
    engine: RemoteEngine,
    source: str | Path,
    out: str | Path,
    *,
    workers: int = 1,
    gpus_per_worker: float = 0,
    block_size: int = 64,
    limit: int | None = None,
    image_root: str = "",
    root_map: Sequence[tuple[str, str]] = (),
    stream: TextIO | None = None,
) -> Summary | None:
    """Runs a pipeline like ``runner.run``, but on the machines of a Ray cluster, and returns the numbers of the run.

    The run uses ``workers`` actors with ``gpus_per_worker`` GPUs each. The other arguments are those of
    ``runner.run``. Only the driver reads ``source`` and writes to ``out``. ``image_root`` must be the same folder on
    every machine.

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
    items = open_items(source, image_root=image_root, root_map=root_map, limit=limit)
    DataContext.get_current().execution_options.preserve_order = True

    settings = dict(engine.settings)
    if (date := stored_date(out)) and "processor" in settings:
        settings["processor"] = {**settings["processor"], "date": date}
    with open_journal(pipeline, settings, items, out) as journal:
        stored = sum(1 for _ in journal.records())
        per_item = len(pipeline.keys(Item()))
        to_do: list[dict[str, Any]] = []
        n_stored_of_block = 0
        for block in blocks(items.items(), pipeline, block_size):
            count = len(block) * per_item
            if stored < count:
                if not to_do:
                    n_stored_of_block = stored
                # Bytes, because Arrow would give all dicts of a column the same keys.
                to_do.append({"number": len(to_do), "block": pickle.dumps(block)})
            stored = max(0, stored - count)
        with SamplingProgress(pipeline.name, items.count, stream) as progress:
            summary = Summary()
            if to_do:
                data = ray.data.from_items(to_do, override_num_blocks=len(to_do))
                stage = data.map_batches(
                    _Worker,
                    fn_constructor_args=(pipeline, engine.make, settings.get("processor", {}).get("date")),
                    batch_size=1,
                    compute=ActorPoolStrategy(size=workers),
                    num_gpus=gpus_per_worker or None,
                )
                for row in stage.iter_rows():
                    block, records = pickle.loads(row["block"]), pickle.loads(row["records"])
                    journal.append(list(itertools.chain(*records))[0 if row["number"] else n_stored_of_block :])
                    for item, item_records in zip(block, records, strict=True):
                        summary.add(pipeline.make_pairs(item, item_records, engine.name), len(item_records))
                        progress.advance(summary.counts())
        return write_outputs(pipeline, items, out, model=engine.name)


class _Worker:
    def __init__(self, pipeline: Pipeline, make_engine: Callable[[], Engine], date: str | None) -> None:
        self.pipeline = pipeline
        self.engine = make_engine()
        set_date(self.engine, date)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        steps = (self.pipeline.steps(pickle.loads(block), self.engine) for block in batch["block"])
        return {**batch, "records": [pickle.dumps(run_steps(block, self.engine)) for block in steps]}

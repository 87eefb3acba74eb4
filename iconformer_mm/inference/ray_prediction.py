"""Predictions on image files by Ray Data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .image_files import FilePredictor

_BATCH = 8  # images per task; the results of a task come together


class _Worker:
    """A copy of the model in a process of Ray's."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._predictor = FilePredictor(**arguments)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        records = [json.dumps(self._predictor(*row)) for row in zip(batch['image'], batch['target'])]
        return dict(index=batch['index'], record=np.array(records, dtype=object))


def predict_with_ray(
    images: Sequence[tuple[Path, Path]], arguments: dict[str, Any], workers: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Predict on image files in the processes of the Ray cluster this process is connected to.

    A task whose process dies is done again. On a cluster of several machines, all must see the same files.

    Args:
        images: Images, with what the names of the written files begin with.
        arguments: Arguments of :class:`FilePredictor`.
        workers: Number of processes. Defaults to None: one per GPU, or one per CPU core if there is no GPU.

    Yields:
        The index of an image and its record, in any order.

    Raises:
        ValueError: The cluster has too few GPUs or CPU cores for the workers. Ray would wait for more.
    """
    import ray
    import ray.data

    resources = ray.cluster_resources()
    gpus = int(resources.get('GPU', 0))
    if workers is None:
        workers = gpus or int(resources.get('CPU', 1))
    kind, present = ('GPUs', gpus) if gpus else ('CPU cores', int(resources.get('CPU', 1)))
    if workers > present:
        raise ValueError(
            f'{workers} workers need as many {kind}, and the Ray cluster has {present}; give fewer --workers'
        )
    workers = max(1, min(workers, -(-len(images) // _BATCH)))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [
        dict(index=index, image=str(image.absolute()), target=str(target.absolute()))
        for index, (image, target) in enumerate(images)
    ]
    results = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // _BATCH)).map_batches(
        _Worker,
        fn_constructor_args=(arguments,),
        batch_size=_BATCH,
        num_cpus=0 if gpus else 1,
        num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    for row in results.iter_rows():
        yield int(row['index']), json.loads(row['record'])

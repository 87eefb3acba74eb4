"""Draws of a data set's pipeline, and the data set that reads them from a cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils.data import Dataset

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.fit import random_state_kept
from iconformer_mm.tuning.prefix import PrefixError, Values

from .records import decode, encode
from .shards import Shards

RECORDS = 'prefix'  # key of a batch under which records travel from the data loader to the hook
INPUTS = 'inputs'


class Recorded(BaseDataElement):
    """The recorded tensors of an image, which collate functions pass on as they are.

    Attributes:
        calls: Of each call of the backbone, the tensors by name.
        dtypes: What each was computed in, by name.
    """

    calls: list[Values]
    dtypes: dict[str, str]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw the random numbers of a seed within a context. The caller's generators go on as before."""
    with random_state_kept():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield


def random_numbers() -> tuple:
    """The states of this process's generators, to be compared."""
    numpy: Any = np.random.get_state()
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().numpy().tobytes()


def draw(dataset: Dataset, view: int, image: int, fixed: bool) -> dict[str, Any]:
    """Run the pipeline on an image. The same view gives the same draw, in any process.

    Args:
        dataset: The data set.
        view: Which draw.
        image: The image.
        fixed: Whether the pipeline may draw nothing at random.

    Raises:
        PrefixError: It does nevertheless, or the sample has no image.
    """
    with seeded(_seed(view, image)):
        before = random_numbers()
        item: Any = dataset[image]
        drew = random_numbers() != before
    if not isinstance(item, Mapping) or not isinstance(item.get(INPUTS), Tensor) or RECORDS in item:
        raise PrefixError(
            "prefix_cache: samples of the data set must be dicts with one tensor `inputs`, as the libraries' Pack... "
            f'transforms make them, got {type(item).__name__}'
        )
    if fixed and drew:
        with seeded(_seed(view, image) ^ 0x5EED):
            again = dataset[image]
        if encode(dict(item)) != encode(dict(again)):
            raise PrefixError(
                f'prefix_cache: the pipeline augments at random (image {image} differs between two draws), and '
                'views=None keeps one draw only. Set `views` to the number of draws of each image, e.g. views=4, or '
                'take the augmentation out of the pipeline'
            )
    return dict(item)


def _seed(view: int, image: int) -> int:
    return (image * 100 + view) % 2**32


class Draws(Dataset):
    """Draws of a data set's pipeline by view and image, for a data loader.

    Args:
        dataset: The data set.
        fixed: Whether the pipeline may draw nothing at random.
    """

    def __init__(self, dataset: Dataset, fixed: bool) -> None:
        self.dataset = dataset
        self.fixed = fixed

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        return draw(self.dataset, *place, self.fixed)


class CachedDataset(Dataset):
    """A data set whose samples come from a cache: without decoding, augmentation, and the prefix of the backbone.

    Instead of the image, a sample has a blank one of its size, and what was recorded of the prefix. With several
    views, one is drawn at random each time.

    Args:
        dataset: The data set, to which other attributes lead.
        shards: The files.
        views: Number of views.
    """

    def __init__(self, dataset: Dataset, shards: Shards, views: int) -> None:
        vars(self).update(_dataset=dataset, _shards=shards, _views=views)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or '_dataset' not in vars(self):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise DataError(
            f"something sets '{name}' of the data set in training, which the prefix cache would not follow: its "
            'samples are drawn already. Remove that hook, or train without prefix_cache'
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = range(len(self))[index]
        view = int(torch.randint(self._views, ())) if self._views > 1 else 0
        return unpack(self._shards.read(view, image))


def pack(item: Mapping[str, Any], calls: Sequence[Values], dtype: torch.dtype | None) -> bytes:
    """Make the record of a sample.

    Args:
        item: The sample.
        calls: Of each call of the backbone, what was recorded of this image.
        dtype: What recorded tensors are stored in; None for what they are.

    Raises:
        UnstorableError: The sample holds what a record cannot.
    """
    rest = {name: value for name, value in item.items() if name != INPUTS}
    inputs = item[INPUTS]
    dtypes = {n: str(t.dtype).removeprefix('torch.') for call in calls for n, t in call.items()}
    stored = [{n: t if dtype is None else t.to(dtype) for n, t in call.items()} for call in calls]
    return encode(
        dict(
            item=rest,
            shape=list(inputs.shape),
            dtype=str(inputs.dtype).removeprefix('torch.'),
            calls=stored,
            dtypes=dtypes,
        )
    )


def unpack(data: bytearray) -> dict[str, Any]:
    """Make a sample of a record."""
    content = decode(data)
    blank = torch.zeros((), dtype=getattr(torch, content['dtype'])).expand(content['shape'])
    recorded = Recorded()
    recorded.set_data(dict(calls=content['calls'], dtypes=content['dtypes']))
    return {INPUTS: blank, **content['item'], RECORDS: recorded}


def stack(samples: Sequence[Recorded]) -> list[Values]:
    """Put what was recorded of the images of a batch together.

    Raises:
        PrefixError: The images differ in size.
    """
    counts = {len(sample.calls) for sample in samples}
    if len(counts) > 1:
        raise PrefixError('prefix_cache: images of one batch are cut into different numbers of crops; use batch_size=1')
    calls: list[Values] = []
    for index in range(counts.pop()):
        values: Values = {}
        for name in samples[0].calls[index]:
            parts = [sample.calls[index][name] for sample in samples]
            if any(part.shape != parts[0].shape for part in parts):
                raise PrefixError('prefix_cache: images of one batch differ in size; use batch_size=1')
            values[name] = torch.cat(parts).to(getattr(torch, samples[0].dtypes[name]))
        calls.append(values)
    return calls

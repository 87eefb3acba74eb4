"""A task of a comparison on a user's own images: one key of the YAML file in place of a config and its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iconformer_mm.compat import config_folder
from iconformer_mm.datasets.few_shot import choose_images, fingerprint_of, refuse_copies, refuse_damaged

CONFIG = config_folder('iconformer_mm') / 'quickstart' / 'real' / 'dinov2-small_linear_images.py'
KEYS = {'images': str, 'shots': int, 'val': int, 'test': int, 'size': int}
PATCH = 14  # of DINOv2-S, in pixels
RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # those of configs/comparison/real.yaml


def expand_images(name: str, content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The whole content of a task that has ``images``: a linear head on a fetched DINOv2-S, and the user's images.

    ``images`` is a folder that :func:`iconformer_mm.datasets.few_shot.choose_images` can split. Learning rates are
    searched on the validation images, and the methods compared on the test images.

    Args:
        name: Name of the task.
        content: What the YAML file has. Beside the keys of any task: ``shots``, ``val`` and ``test``, the training,
            validation and test images a class, and ``size``, the side of an image in pixels (112).
        folder: What a relative ``images`` is relative to.

    Raises:
        DataError: The folder cannot be split so, or an image is there twice.
        ValueError: A value is out of its range, or there is a key that ``images`` stands for.
    """
    for key in ('config', 'base', 'metric'):
        if key in content:
            raise ValueError(f'there are both images and {key}; images stands for a config, its base and its metric')
    for key, kind in KEYS.items():
        if not isinstance(content.get(key, kind()), kind) or isinstance(content.get(key), bool):
            raise ValueError(f'{key} must be {kind.__name__}, it is {content[key]!r}')
    source = (folder / Path(content['images']).expanduser()).resolve()
    size = content.get('size', 8 * PATCH)
    if size < 2 * PATCH or size % PATCH:
        raise ValueError(f'size must be a multiple of {PATCH} pixels, from {2 * PATCH} on, it is {size}')
    split = {'most' if key == 'test' else key: content[key] for key in ('shots', 'val', 'test') if key in content}
    for key, number in split.items():
        if number < 1:
            raise ValueError(f'{"test" if key == "most" else key} must be at least 1, it is {number}')
    chosen = choose_images(source, **split)
    refuse_copies(chosen)
    options: dict[str, Any] = {'model.head.num_classes': len(chosen['train'])}
    for loader in ('train', 'val', 'test'):
        values = dict(
            type='ImageFolderSplit',
            data_root=str(source),
            data_prefix='',
            split=loader if loader == 'train' else 'test',
            fingerprint=fingerprint_of(chosen),
            **split,
        )
        options |= {f'{loader}_dataloader.dataset.{key}': value for key, value in values.items()}
        options[f'{loader}_dataloader.dataset.pipeline.1.scale'] = [size, size]
    rest = {key: value for key, value in content.items() if key not in KEYS}
    return {
        'config': str(CONFIG),
        'base': 'fetched:mmpretrain',
        'metric': 'accuracy/top1',
        'title': f'{name} (%)',
        **({} if 'rates_of' in rest else {'learning_rates': list(RATES)}),
        **rest,
        'options': options | rest.get('options', {}),
        'search_options': {'val_dataloader.dataset.split': 'val'} | rest.get('search_options', {}),
    }


def refuse_damaged_images(options: Mapping[str, Any]) -> None:
    """Read all images of a task's data set of the type ``ImageFolderSplit``, if it has one.

    Args:
        options: Those of the task.

    Raises:
        DataError: An image is damaged.
    """
    prefix = 'train_dataloader.dataset.'
    given = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
    if given.get('type') == 'ImageFolderSplit':
        split = {key: given[key] for key in ('shots', 'val', 'most', 'seed') if key in given}
        refuse_damaged(choose_images(Path(given['data_root']), **split))

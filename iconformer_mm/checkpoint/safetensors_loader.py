"""Lets MMEngine read ``.safetensors`` weights wherever it reads checkpoints."""

from __future__ import annotations

from pathlib import Path

import safetensors
from mmengine.runner import CheckpointLoader
from safetensors.torch import load_file
from torch import Tensor


@CheckpointLoader.register_scheme(prefixes=r'(?!\w+://).*\.safetensors$', force=True)
def load_safetensors(filename: str, map_location: str | None = None) -> dict[str, Tensor]:
    """Read a local safetensors file, for ``init_cfg``, ``load_from`` and the like.

    Args:
        filename: Path of the file.
        map_location: Device for the tensors. Defaults to None, the CPU.

    Returns:
        The state dict.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged or of another format.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{path} cannot be found')
    try:
        return load_file(path, device=str(map_location or 'cpu'))
    except safetensors.SafetensorError as error:
        raise RuntimeError(f'{path} is no intact safetensors file: {error}') from error

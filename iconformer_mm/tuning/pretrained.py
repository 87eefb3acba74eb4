"""Refuses weights that do not fit the frozen blocks."""

from __future__ import annotations

from typing import Any

from torch import nn


class PretrainedCheck:
    """Watches what is loaded into an adapted backbone.

    OpenMMLab loads non-strictly and only logs what did not fit. For a backbone
    that is trained this costs accuracy; a frozen block that kept its random
    weights can never recover, so it is an error.

    Output norms that a task adds around the blocks may be missing, and a file
    that holds none of the blocks and nothing foreign (adapters, a head) passes.

    Args:
        backbone: The adapted backbone.
        blocks: Names of the blocks whose weights have to be complete.
    """

    def __init__(self, backbone: nn.Module, blocks: list[str]) -> None:
        prefixes = tuple(f'{name}.' for name in blocks)
        self._needed = [n for n, _ in backbone.named_parameters() if n.startswith(prefixes)]
        self._prefix = ''
        self._errors: list[str] = []
        self._handles = [
            backbone._register_load_state_dict_pre_hook(self._begin),
            backbone.register_load_state_dict_post_hook(self._end),
        ]

    def _begin(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        self._prefix = prefix
        self._errors = errors

    def _end(self, backbone: nn.Module, incompatible_keys: Any) -> None:
        needed = {self._prefix + name for name in self._needed}
        unfit = [e for e in self._errors if 'size mismatch' in e and any(f'for {name}:' in e for name in needed)]
        missing = [key for key in incompatible_keys.missing_keys if key in needed]
        unexpected = list(incompatible_keys.unexpected_keys)
        self._errors = []
        if unfit:
            raise RuntimeError(
                f'wrong pre-trained weights for {type(backbone).__name__}: {len(unfit)} frozen parameters have '
                f'another shape, among them: {unfit[0].strip()} Give the weights of the very architecture in the '
                'config.'
            )
        if missing and (len(missing) < len(needed) or unexpected):
            raise RuntimeError(
                f'wrong pre-trained weights for {type(backbone).__name__}: {len(missing)} of {len(needed)} frozen '
                f'parameters are missing, among them {_some(missing)}'
                + (f'; the file has {_some(unexpected)} instead' if unexpected else '')
                + '. They would stay at their random values for good. Convert the file to the names of this '
                "class, or give the right `prefix` in `init_cfg=dict(type='Pretrained', ...)`."
            )

    def release(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()


def _some(names: list[str], limit: int = 3) -> str:
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')

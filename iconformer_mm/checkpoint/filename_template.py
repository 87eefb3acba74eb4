"""Checkpoint file names: formatted from a template, and parsed again."""

from __future__ import annotations

import re
from pathlib import Path
from string import Formatter

_STEPS = (1, 7, 10, 99, 123, 1000, 40960, 1234567)  # every template is tried with these


class FilenameTemplate:
    """File names made by ``str.format`` from a template and the number of an epoch or iteration.

    Any integer format that can be parsed again is valid: ``epoch_{}``, ``epoch_{:03d}``, ``{0:>8}``, ``{:x}``.

    Args:
        template: The template, such as ``'epoch_{:03d}.safetensors'``. It may contain subfolders of the checkpoint
            folder.

    Raises:
        ValueError: The template cannot be formatted with a number, the number cannot be parsed again, or the name
            points outside the checkpoint folder.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        advice = "write it with one place for the number, as in 'epoch_{}.safetensors' or 'iter_{:06d}.safetensors'"
        try:
            parts = list(Formatter().parse(template))
            names = [template.format(step) for step in _STEPS]
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            raise ValueError(
                f"filename_tmpl '{template}' cannot be filled in with the number of an epoch or iteration "
                f'({type(error).__name__}: {error}); {advice}'
            ) from error
        if any(Path(name).is_absolute() or '..' in Path(name).parts for name in names):
            raise ValueError(f"filename_tmpl '{template}' leaves the folder of the checkpoints; {advice}")
        self.has_step = any(field is not None for _, field, *_ in parts)
        self._pattern = ''.join(re.escape(text) + ('(.+)' if field is not None else '') for text, field, *_ in parts)
        if self.has_step and [self.step(name) for name in names] != list(_STEPS):
            raise ValueError(f"filename_tmpl '{template}' makes names whose number cannot be read back; {advice}")

    def step(self, name: str) -> int | None:
        """Parse the number in a name.

        Returns:
            The number; 0 if the template has no field for one; None if the template cannot produce the name.
        """
        match = re.fullmatch(self._pattern, name, flags=re.DOTALL)
        if match is None:
            return None
        if not self.has_step:
            return 0
        digits = re.sub('[^0-9a-z]', '', match[1].lower())
        for base in (10, 16, 8, 2):
            try:
                step = int(digits, base)
            except ValueError:
                continue
            if self.template.format(step) == name:
                return step
        return None

    def find(self, folder: Path) -> dict[Path, int]:
        """Find the files in a folder that match the template, with the number of each."""
        depth = self.template.count('/') + 1
        found = {path: self.step(path.relative_to(folder).as_posix()) for path in folder.glob('/'.join('*' * depth))}
        return {path: step for path, step in found.items() if step is not None and path.is_file()}

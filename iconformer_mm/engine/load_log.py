"""What MMEngine logs of loaded weights, without the mismatch that is none."""

from __future__ import annotations

import logging

from iconformer_mm.tuning.freezing import is_adapter

_MISMATCH = 'The model and loaded state dict do not match exactly'
_MISSING = 'missing keys in source state_dict: '


class FreshAdapters(logging.Filter):
    """Turns MMEngine's warning that pre-trained weights lack the adapters into a note.

    Adapters are in no pre-trained weights. A warning that lacks anything else stays as it is.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record, if it is that warning."""
        first, _, rest = record.getMessage().partition('\n')
        body = rest.strip()
        if first == _MISMATCH and body.startswith(_MISSING) and '\n' not in body:
            names = body.removeprefix(_MISSING).split(', ')
            if all(map(is_adapter, names)):
                record.msg = f'the weights hold no adapters: {len(names)} tensors start as the method initialises them'
                record.args = None
                record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        return True


def note_fresh_adapters(logger: logging.Logger) -> None:
    """Have a logger say of missing adapters that they start fresh."""
    if not any(isinstance(each, FreshAdapters) for each in logger.filters):
        logger.addFilter(FreshAdapters())

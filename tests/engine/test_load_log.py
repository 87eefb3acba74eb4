import logging

import torch
from families import VIT
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from iconformer_mm import inject
from iconformer_mm.engine.load_log import note_fresh_adapters


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append((record.levelno, record.getMessage()))


def test_weights_without_adapters_are_no_mismatch(tmp_path):
    """What mmengine itself logs. Weights that lack more are still warned of."""
    init_default_scope('mmpretrain')
    model = MODELS.build(dict(type='VisionTransformer', arch=VIT, img_size=32))
    weights = model.state_dict()
    torch.save(weights, tmp_path / 'base.pth')
    inject(model, 'adaptformer')
    logger, records = MMLogger.get_instance('test_load_log'), Records()
    logger.addHandler(records)
    for _ in range(2):
        note_fresh_adapters(logger)
    assert len(logger.filters) == 1
    load_checkpoint(model, str(tmp_path / 'base.pth'), logger=logger)
    fresh = len(model.state_dict()) - len(weights)
    note = f'the weights hold no adapters: {fresh} tensors start as the method initialises them'
    assert [found for found in records.found if 'tensors' in found[1]] == [(logging.INFO, note)]
    records.found.clear()
    more = 'layers.0.adapter.down.weight, cls_token'
    logger.warning(
        f'The model and loaded state dict do not match exactly\n\nmissing keys in source state_dict: {more}\n'
    )
    ((level, warning),) = records.found
    assert level == logging.WARNING and 'cls_token' in warning

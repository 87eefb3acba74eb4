"""What hosts write to in a forward pass is safe among threads; test_towers.py runs models in threads."""

import copy
import threading

import pytest
import torch
import tower_models
from small_bert import write_bert
from torch import nn
from tower_models import same

from iconformer_mm import inject, remove
from iconformer_mm.tuning.shared_state import make_shareable


def test_values_that_ddq_shares_are_those_of_a_thread(tmp_path):
    """Also in copies and pickles. Without adapters it has its own dictionary again, with the last values."""
    model = tower_models.build('DDQ')
    stock, before = model.cache_dict, model.cache_dict['distinct_query_mask']
    inject(model, 'lora', where='decoder', rank=2)
    predictions = tower_models.predict('DDQ', model)
    assert model.cache_dict is model.bbox_head.cache_dict and stock['distinct_query_mask'] is before
    assert model.cache_dict['distinct_query_mask'] is not before
    own = model.cache_dict['distinct_query_mask']
    other_thread = threading.Thread(target=tower_models.predict, args=('DDQ', model))
    other_thread.start()
    other_thread.join()
    assert model.bbox_head.cache_dict['distinct_query_mask'] is own
    torch.save(model, tmp_path / 'model.pth')
    for other in (copy.deepcopy(model), torch.load(tmp_path / 'model.pth', weights_only=False)):
        assert other.cache_dict is other.decoder.cache_dict is not model.cache_dict
        assert other.cache_dict['cls_branches'] is other.bbox_head.cls_branches
        assert same(tower_models.predict('DDQ', other), predictions)
    masks = model.decoder.cache_dict['distinct_query_mask']
    remove(model)
    assert model.decoder.cache_dict is model.cache_dict is stock and stock['distinct_query_mask'] is masks


def test_threads_share_a_tokenizer(tmp_path):
    """Which each call sets to other padding and truncation."""
    transformers = pytest.importorskip('transformers', reason='the tokenizer is that of transformers (extra "text")')
    module = nn.Module()
    module.tokenizer = stock = transformers.AutoTokenizer.from_pretrained(write_bert(tmp_path))
    (shared,) = make_shareable(module)
    texts = ['a small circle .', 'square .']
    calls = [
        dict(padding='max_length', max_length=12, truncation=True),
        dict(padding='longest'),
        dict(padding='max_length', max_length=3, truncation=True),
    ]
    expected = [stock(texts, **options)['input_ids'] for options in calls]
    assert [len(ids[0]) for ids in expected] == [12, 6, 3]
    wrong = []

    def work(number):
        try:
            for _ in range(100):
                if module.tokenizer(texts, **calls[number])['input_ids'] != expected[number]:
                    wrong.append(number)
        except RuntimeError as error:  # 'Already borrowed'
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert module.tokenizer.mask_token == '[MASK]' and len(module.tokenizer) == len(stock)
    assert module.tokenizer.convert_tokens_to_ids(['circle']) == stock.convert_tokens_to_ids(['circle'])
    copied = copy.deepcopy(module)
    assert copied.tokenizer is not module.tokenizer and copied.tokenizer(texts) == module.tokenizer(texts)
    with pytest.raises(AttributeError, match='colour'):
        _ = module.tokenizer.colour
    shared.release()
    assert module.tokenizer is stock

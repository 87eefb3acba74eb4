"""A BERT of random weights with a small vocabulary, in a folder: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', 'a', 'small', 'large', 'circle', 'square', 'triangle']


def write_bert(folder: Path, width: int = 32, seed: int = 0) -> str:
    """Write configuration, weights and vocabulary; returns the folder as ``from_pretrained`` takes it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / 'vocab.txt'
    vocabulary.write_text('\n'.join(WORDS) + '\n')
    BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(seed)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)

"""Weights out of an ONNX file, by the names that they had in the model that was exported. Nothing in it is executed."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import Tensor

from iconformer_mm.extras import require_extra
from iconformer_mm.files import expanded

from .safetensors_io import DamagedFileError, shortened

# What PyTorch's exporter calls a constant that it made out of a parameter.
_ANONYMOUS = re.compile(r'(?:onnx::)?(?:MatMul|Concat|Reshape|Slice|Add|Mul|Transpose|Expand)_\d+|_?v_\d+|val_\d+')


def read_onnx(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the weights of an exported model.

    PyTorch's exporter folds the weights of linear layers into nameless (in, out) matrices. The bias that is
    added next to one names its layer, and the matrix is given as that layer's weight (out, in). Position embeddings
    that were cut into the class token's and the patches' are joined.

    Args:
        path: The file.

    Returns:
        Tensors by name. What stays nameless has the name of the file.

    Raises:
        DamagedFileError: It is truncated, no ONNX file, or has its weights in other files, which are not opened.
        FileNotFoundError: There is none.
        MissingExtraError: The package onnx is not installed.
    """
    require_extra('onnx', 'reading an ONNX file')
    import onnx
    from onnx import numpy_helper

    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} cannot be found')
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # damaged bytes raise anything
        raise DamagedFileError(f'{path} is not a valid ONNX file: {shortened(str(error))}') from error
    tensors: dict[str, Tensor] = {}
    for initializer in graph.initializer:
        if initializer.data_location == onnx.TensorProto.EXTERNAL:
            raise DamagedFileError(
                f'{path} has its weights in other files, which are not opened; save it as one file '
                '(onnx.save(model, path, save_as_external_data=False))'
            )
        try:
            array = numpy_helper.to_array(initializer)
        except Exception as error:  # of truncated data
            raise DamagedFileError(
                f'{path} is not a valid ONNX file: {initializer.name}: {shortened(str(error))}'
            ) from error
        tensors[initializer.name] = torch.from_numpy(array.copy())
    if not tensors:
        raise DamagedFileError(f'{path} is not a valid ONNX file: it holds no weights')
    _name_matrices(graph, tensors)
    _join_positions(tensors)
    return tensors


def _name_matrices(graph: Any, tensors: dict[str, Tensor]) -> None:
    """Give nameless matrices the name of the layer whose bias is added to their product."""
    adds = {given: node for node in graph.node if node.op_type == 'Add' for given in node.input}
    for node in graph.node:
        if node.op_type != 'MatMul' or not _ANONYMOUS.fullmatch(node.input[1]) or node.input[1] not in tensors:
            continue
        add = adds.get(node.output[0])
        names = [n for n in add.input if n.endswith('.bias') and n in tensors] if add is not None else []
        if len(names) == 1:
            tensors[names[0].removesuffix('bias') + 'weight'] = tensors.pop(node.input[1]).t().contiguous()


def _join_positions(tensors: dict[str, Tensor]) -> None:
    """Join the two parts of a position embedding."""
    token = next((n for n in tensors if n.endswith('cls_token')), None)
    if token is None:
        return
    width = tensors[token].shape[-1]
    loose = {n: v for n, v in tensors.items() if _ANONYMOUS.fullmatch(n) and v.dim() == 3 and v.shape[-1] == width}
    first = [n for n, v in loose.items() if v.shape[:2] == (1, 1)]
    patches = [n for n, v in loose.items() if v.shape[0] == 1 and v.shape[1] > 1]
    if len(first) == len(patches) == 1:
        joined = torch.cat([tensors.pop(first[0]), tensors.pop(patches[0])], 1)
        tensors[token.removesuffix('cls_token') + 'position_embeddings'] = joined

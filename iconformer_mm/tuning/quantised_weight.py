"""Matrices of frozen linear layers in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from iconformer_mm.compat import autocast_dtype

from .packing import Format


class _FrozenMap(torch.autograd.Function):
    """A linear layer or 1 x 1 convolution with a packed weight.

    Only the packed weight is kept for the backward pass. It is unpacked there again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Tensor, form: Format, dtype: torch.dtype) -> Tensor:
        """Run the layer."""
        ctx.save_for_backward(packed)
        ctx.form = form
        return _map(x, form.unpack(packed, dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Run the transposed layer on the gradient."""
        (packed,) = ctx.saved_tensors
        (gradient,) = gradients
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = _map(gradient, ctx.form.unpack(packed, gradient.dtype).transpose(0, 1), None)
        if ctx.needs_input_grad[1]:
            is_map = len(ctx.form.shape) > 2
            of_bias = gradient.sum((0, 2, 3) if is_map else 0)
        return of_input, of_bias, None, None, None


def _map(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias)


class QuantisedWeight:
    """Stands for the weight of a frozen layer, and lies where the layer has its weight.

    Linear layers run on the packed weight. Any other operation gets an unpacked copy in float32. So blocks that
    read a weight, and adapters that make one from it, work unchanged. It cannot be written to.

    The packed weight is a buffer under the parameter's name, so names in the state dict stay as they are.

    Args:
        module: The layer.
        name: Name of the weight in it.
        kind: How it is packed.
    """

    def __init__(self, module: nn.Module, name: str, kind: str) -> None:
        parameter = module._parameters[name]
        assert parameter is not None
        self.module = module
        self.name = name
        self.form = Format(kind, parameter.shape)
        self.dtype = parameter.dtype
        self.requires_grad = False
        self.order: list[str] = []  # of the layer's parameters

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.form.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.form.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Return the number of values."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Return True: it stands for a floating-point weight."""
        return True

    @property
    def device(self) -> torch.device:
        """Device of the packed weight."""
        return self.packed.device

    @property
    def packed(self) -> Tensor:
        """The packed weight."""
        packed = self.module._buffers[self.name]
        assert packed is not None
        return packed

    def unpacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight that it stands for, in the dtype that it had or another one."""
        return self.form.unpack(self.packed, dtype or self.dtype)

    def hold(self, packed: Tensor) -> None:
        """Put the packed weight in place of the layer's parameter."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        parameter.requires_grad_(False)
        self.order = list(self.module._parameters)
        del self.module._parameters[self.name]
        parameter.data = packed
        self.module._buffers[self.name] = parameter
        self.module.__dict__[self.name] = self

    def release(self) -> None:
        """Put the layer's parameter back. It has the values of the packed weight."""
        packed = self.module._buffers.pop(self.name)
        assert packed is not None
        value = self.form.unpack(packed, self.dtype)
        # After .to() it is another tensor.
        parameter = packed if isinstance(packed, nn.Parameter) else nn.Parameter(packed, requires_grad=False)
        parameter.data = value
        del self.module.__dict__[self.name]
        own = self.module._parameters
        own[self.name] = parameter
        for name in [n for n in self.order if n in own]:
            own[name] = own.pop(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        if name.endswith('_') or name == 'data':
            raise _no_writing(name, self.form.kind)
        if not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.unpacked(), name)

    def __repr__(self) -> str:
        return f'QuantisedWeight({self.form.kind}, shape={tuple(self.shape)}, bytes={self.form.nbytes})'

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        """Run a function of torch on weights of this kind."""
        kwargs = dict(kwargs or {})
        layer = _layer_of(func, args, kwargs)
        if layer is not None and isinstance(layer[1], cls):
            return _run(*layer)
        name = getattr(func, '__name__', '')
        if name.endswith('_') and not name.endswith('__'):
            kinds = [value.form.kind for value in (*args, *kwargs.values()) if isinstance(value, cls)]
            raise _no_writing(name, kinds[0] if kinds else 'packed')
        # Functions in Python may call linear layers, as attention does. Those run on the packed weight.
        inside = _LayersInside()
        args = tuple(inside.replaced(value) for value in args)
        kwargs = {name: inside.replaced(value) for name, value in kwargs.items()}
        with inside:
            return func(*args, **kwargs)


def _operator(name: str) -> Callable:
    def run(self: QuantisedWeight, *args: Any) -> Any:
        return getattr(self.unpacked(), name)(*(a.unpacked() if isinstance(a, QuantisedWeight) else a for a in args))

    return run


for _name in ('add', 'radd', 'sub', 'rsub', 'mul', 'rmul', 'truediv', 'matmul', 'rmatmul', 'getitem', 'neg', 'pow'):
    setattr(QuantisedWeight, f'__{_name}__', _operator(f'__{_name}__'))


def _no_writing(name: str, kind: str) -> RuntimeError:
    return RuntimeError(
        f'{name!r} would write to a weight that is held in {kind}. Load weights by load_state_dict, or set them before '
        'the injection'
    )


def _layer_of(func: Callable, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Any, Tensor | None] | None:
    """Return input, weight and bias of a call that a packed weight can run; None for any other call."""
    if func is not F.linear and func is not torch.conv2d:
        return None
    names = ('input', 'weight', 'bias', 'stride', 'padding', 'dilation', 'groups')
    values = {**dict(zip(names, args)), **kwargs}
    if isinstance(values.get('input'), QuantisedWeight):
        return None
    if func is torch.conv2d:
        is_map = (
            all(kernel == 1 for kernel in values['weight'].shape[2:])
            and values.get('stride', 1) in (1, (1, 1), [1, 1])
            and values.get('padding', 0) in (0, (0, 0), [0, 0], 'valid', 'same')
            and values.get('groups', 1) == 1
        )
        if not is_map:
            return None
    return values['input'], values['weight'], values.get('bias')


def _run(x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
    """Run a layer on its packed weight, in the dtype that autocast asks for."""
    dtype = autocast_dtype(x.device.type) or x.dtype
    bias = None if bias is None else bias.to(dtype)
    if weight.dim() > 2:
        return _FrozenMap.apply(x.to(dtype), bias, weight.packed, weight.form, dtype)
    # On rows, so that the result is no view: hosts may write to it.
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    return _FrozenMap.apply(rows, bias, weight.packed, weight.form, dtype).view(*x.shape[:-1], weight.shape[0])


class _LayersInside(TorchFunctionMode):
    """Finds the linear layers that a function calls with unpacked weights, and runs them on the packed ones."""

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, tuple[Tensor, QuantisedWeight]] = {}

    def replaced(self, value: Any) -> Any:
        """Return the unpacked weight for a packed one, and other values as they are."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.replaced(each) for each in value)
        if not isinstance(value, QuantisedWeight):
            return value
        unpacked = value.unpacked()
        self._weights[id(unpacked)] = unpacked, value
        return unpacked

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping | None = None) -> Any:
        """Run a function that was called inside."""
        kwargs = dict(kwargs or {})
        layer = _layer_of(func, args, kwargs)
        if layer is not None and id(layer[1]) in self._weights:
            return _run(layer[0], self._weights[id(layer[1])][1], layer[2])
        return func(*args, **kwargs)


def held_weights(module: nn.Module) -> Iterator[tuple[str, QuantisedWeight]]:
    """Yield the quantised weights of a module by name."""
    for path, part in module.named_modules():
        for name, value in part.__dict__.items():
            if isinstance(value, QuantisedWeight):
                yield f'{path}.{name}'.lstrip('.'), value


def stored_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter by name; for a quantised weight, the one that has its values once it is released."""
    path, _, local = name.rpartition('.')
    owner = module.get_submodule(path)
    if local in owner._parameters:
        return owner.get_parameter(local)
    packed = owner._buffers[local]
    if not isinstance(packed, nn.Parameter):  # it was moved to another device
        assert packed is not None
        packed = owner._buffers[local] = nn.Parameter(packed, requires_grad=False)
    return packed


def own_weights(module: nn.Module) -> dict[str, Any]:
    """Return a module's own parameters in their order, and quantised weights where they stand for one."""
    held = {name: value for name, value in module.__dict__.items() if isinstance(value, QuantisedWeight)}
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    order = [name for value in held.values() for name in value.order]
    values = {**own, **held}
    return {name: values[name] for name in dict.fromkeys((*order, *own)) if name in values}


def named_weights(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield parameters by name as ``named_parameters`` does, and quantised weights where they stand for one."""
    seen = set()
    for path, part in module.named_modules():
        for name, value in own_weights(part).items():
            if id(value) not in seen:
                seen.add(id(value))
                yield f'{path}.{name}'.lstrip('.'), value


def linear_weights(backbone: nn.Module, names: Iterable[str], kind: str) -> dict[str, QuantisedWeight]:
    """Return the weights of linear layers that packing makes smaller, by their names in a backbone.

    These are those of ``nn.Linear``, of 1 x 1 convolutions, and the input projections of ``nn.MultiheadAttention``.
    A parameter that several layers share is left out.

    Args:
        backbone: The backbone. It does not change.
        names: The names to choose from.
        kind: How they are to be packed.
    """
    chosen = set(names)
    users: dict[int, int] = {}
    found: dict[str, QuantisedWeight] = {}
    for path, module in backbone.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
        local = 'in_proj_weight' if isinstance(module, nn.MultiheadAttention) else 'weight'
        name = f'{path}.{local}'.lstrip('.')
        if name in chosen and isinstance(module._parameters.get(local), nn.Parameter) and _is_linear(module):
            found[name] = QuantisedWeight(module, local, kind)
    return {
        name: weight
        for name, weight in found.items()
        if weight.form.fits() and users[id(weight.module._parameters[weight.name])] == 1
    }


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return (
            module.kernel_size == (1, 1)
            and module.stride == (1, 1)
            and module.groups == 1
            and not any(module.padding if isinstance(module.padding, tuple) else ())
        )
    return isinstance(module, (nn.Linear, nn.MultiheadAttention))

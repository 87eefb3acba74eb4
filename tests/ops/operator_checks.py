"""What the tests of both operators share: how near results are, and how Triton's kernels run without a GPU."""

import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import product

import ptx
import pytest
import torch

from iconformer_mm.ops import backends

needs_triton = pytest.mark.skipif(backends.find('triton') is None, reason='no Triton here that the backend can use')

_TYPES = {torch.float32: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16'}


def assert_near(actual, expected, tolerance):
    """Each tensor lies within a part of the largest number of what is expected, which is in double precision."""
    for value, truth in zip(actual, expected, strict=True):
        assert (value.cpu().double() - truth).abs().max() <= tolerance * truth.abs().max()


def run_interpreted(file):
    """Run what is named ``interpreted_*`` in a file of tests, in a process that interprets kernels from the start."""
    environment = {**os.environ, 'TRITON_INTERPRET': '1'}
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'{file}::interpreted_triton']
    command += ['-o', 'python_functions=interpreted_*']
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def _memory_of(tensor):
    """From the first to the last number of a tensor, whatever its strides."""
    length = 1 + sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride()))
    # NumPy has no bfloat16.
    return tensor.detach().as_strided((length,), (1,)).view(getattr(torch, f'int{8 * tensor.itemsize}')).numpy()


class Compiled:
    """In place of a kernel: what is launched on tensors of the CPU is compiled for a GPU, and run without one."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        grid = (*grid, 1, 1)[:3]
        return lambda *args, num_warps, **constants: self.launch(grid, num_warps, args, constants)

    def launch(self, grid, num_warps, args, constants):
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        named = dict(zip((p.name for p in self.kernel.params if p.name not in constants), args)) | constants
        memory, signature, fixed, divisible, values = ptx.Memory(), {}, {}, {}, []
        # As Triton's launcher specialises: for None and 1, and for what is divisible by 16, as are tensors.
        for place, parameter in enumerate(self.kernel.params):
            name, value, general = parameter.name, named[parameter.name], parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[name], argument, aligned = '*' + _TYPES[value.dtype], memory.place(_memory_of(value)), True
            elif isinstance(value, float):
                signature[name], argument, aligned = 'fp32', value, False
            elif parameter.is_constexpr or value is None or value == 1 and not general:
                signature[name], fixed[name] = 'constexpr', value
                continue
            else:
                signature[name], argument, aligned = 'i32', value, value % 16 == 0 and not general
            values.append(argument)
            if aligned:
                divisible[(place,)] = [['tt.divisibility', 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=fixed, attrs=divisible)
        code = compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=num_warps))
        assert code.asm['cubin']
        kernel = ptx.parse(code.asm['ptx'])
        for z, y, x in product(*map(range, grid[::-1])):
            ptx.Block(kernel, values, (x, y, z), grid, 32 * num_warps, code.metadata.shared, memory).run()


def run_compiled(monkeypatch, backend, *kernels):
    """Let a backend's launches on tensors of the CPU run the code that is compiled for a GPU."""
    for name in kernels:
        monkeypatch.setattr(backend, name, Compiled(getattr(backend, name)))
    monkeypatch.setattr(backend, 'device_of', lambda tensor: nullcontext())

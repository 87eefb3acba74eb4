"""How Triton's kernels are checked without a GPU."""

import os
import subprocess
import sys


def run_interpreted(file):
    """Run what is named ``interpreted_*`` in a file of tests, in a process that interprets kernels from the start."""
    environment = {**os.environ, 'TRITON_INTERPRET': '1'}
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'{file}::interpreted_triton']
    command += ['-o', 'python_functions=interpreted_*']
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr


def compile_for_gpu(kernel, types, constants, num_warps):
    """What a kernel is compiled to for a GPU that need not be there, by stage; arguments without a type are counts."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, 'i32') for name in kernel.arg_names} | dict.fromkeys(constants, 'constexpr')
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return compile(source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=num_warps)).asm

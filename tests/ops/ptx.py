"""Runs compiled Triton kernels without a GPU: the instructions of PTX that come up in ours, by NumPy.

Triton's interpreter runs the Python of a kernel, not what its compiler makes of it, and that has been wrong once. The
threads of one block go in step; registers hold 64 bits of every thread. What is not known here fails by name.
Reference: NVIDIA, "PTX ISA", https://docs.nvidia.com/cuda/parallel-thread-execution.
"""

import re

import numpy as np

_OPERATIONS = {
    'add': np.add,
    'sub': np.subtract,
    'min': np.minimum,
    'max': np.maximum,
    'and': np.bitwise_and,
    'or': np.bitwise_or,
    'xor': np.bitwise_xor,
    'shl': np.left_shift,
    'shr': np.right_shift,
    'neg': np.negative,
    'not': np.invert,
    'sqrt': np.sqrt,
    'mov': np.copy,
}
_MODIFIERS = {'rn', 'approx', 'ftz', 'full', 'lo', 'wide'}  # how results are rounded, and which half is kept
_COMPARISONS = {
    'eq': np.equal,
    'ne': np.not_equal,
    'lt': np.less,
    'le': np.less_equal,
    'gt': np.greater,
    'ge': np.greater_equal,
}


def _dtype(kind):
    """NumPy's name of a type of PTX; untyped bits are unsigned."""
    return kind[0].replace('b', 'u').replace('s', 'i') + str(int(kind[1:]) // 8)


def _typed(bits, kind):
    """Registers as numbers of a type of PTX."""
    if kind == 'pred':
        return bits != 0
    if kind == 'bf16':
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.astype(f'u{int(kind[1:]) // 8}').view(_dtype(kind))


def _bits(values, kind):
    """Numbers, rounded to a type, as registers."""
    if kind == 'pred':
        return values.astype(np.uint64)
    if kind == 'bf16':
        bits = _bits(values, 'f32')
        return np.where(np.isnan(values), 0x7FFF, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint64)
    values = values.astype(_dtype(kind))
    return values.view(f'u{values.itemsize}').astype(np.uint64)


def _split(text):
    """Operands: at commas outside of braces."""
    return [part.strip() for part in re.findall(r'(?:\{[^}]*\}|[^,{])+', text)]


def parse(ptx):
    """The instructions of the one kernel in PTX, (guard, name with suffixes, operands), and where labels are."""
    instructions, labels = [], {}
    body = re.sub(r'//.*', '', ptx[ptx.index('\n{') + 2 : ptx.index('\n}')])
    for statement in re.split(r';|\n', body):
        if label := re.match(r'\s*(\$\w+):', statement):
            labels[label[1]] = len(instructions)
        elif found := re.match(r'\s*(?:@(!?%\w+)\s+)?([a-z][\w.]*)\s*(.*\S)?\s*$', statement):
            instructions.append((found[1], found[2], _split(found[3] or '')))
        elif not re.match(r'\s*(\.|$)', statement):  # neither a directive nor empty
            raise ValueError(f'not understood: {statement}')
    return instructions, labels


class Memory:
    """Arrays at made-up addresses; an access must lie within one."""

    def __init__(self):
        self.arrays = []

    def place(self, array):
        """An address for an array, (items,), which is read and written in place."""
        self.arrays.append(array.view(np.uint8))
        return len(self.arrays) - 1 << 40

    def bytes_at(self, addresses, size):
        """The array, and the places of the bytes in it, (threads, size)."""
        number = int(addresses[0]) >> 40
        array, places = self.arrays[number], (addresses.astype(np.int64) - (number << 40))[:, None] + np.arange(size)
        assert places.min() >= 0 and places.max() < len(array), 'access outside of a tensor'
        assert (places[:, 0] % size == 0).all(), 'access that is not aligned'
        return array, places


class Block:
    """One block of threads.

    Args:
        kernel: What :func:`parse` returned.
        arguments: In the kernel's order, integers (addresses among them) and floats.
        index, grid: This block and their number, (x, y, z).
        threads: Their number.
        shared: Bytes of shared memory.
        memory: The global memory.
    """

    def __init__(self, kernel, arguments, index, grid, threads, shared, memory):
        self.instructions, self.labels = kernel
        self.arguments, self.threads, self.memory = arguments, threads, memory
        self.shared = Memory()
        self.shared.place(np.full(shared, 0xFF, np.uint8))
        self.registers = {'%tid.x': np.arange(threads, dtype=np.uint64)}
        for axis, place, count in zip('xyz', index, grid):
            self.registers[f'%ctaid.{axis}'] = np.full(threads, place, np.uint64)
            self.registers[f'%nctaid.{axis}'] = np.full(threads, count, np.uint64)

    def read(self, operand, kind):
        """An operand, of each thread."""
        if operand.startswith('{'):  # halves of a register, the lower first
            low, high = (self.read(part, 'b16').astype(np.uint64) for part in _split(operand[1:-1]))
            return _typed(low | high << 16, kind)
        if operand.startswith('%'):
            # What was never written is no number.
            bits = self.registers.get(operand, np.full(self.threads, 0xFFFFFFFFFFFFFFFF, np.uint64))
        elif operand == 'global_smem':
            bits = np.zeros(self.threads, np.uint64)
        else:
            number = int(operand[2:], 16) if operand.startswith('0f') else int(operand, 0)
            bits = np.full(self.threads, number & 0xFFFFFFFFFFFFFFFF, np.uint64)
        return _typed(bits, kind)

    def write(self, operand, bits, active):
        """A register of the threads that are active."""
        if operand.startswith('{'):
            for part, shift in zip(_split(operand[1:-1]), (0, 16)):
                self.write(part, bits >> shift & 0xFFFF, active)
        elif operand != '_':
            self.registers[operand] = np.where(active, bits, self.read(operand, 'b64'))

    def run(self):
        """Executes the kernel."""
        place = 0
        while True:
            guard, name, operands = self.instructions[place]
            place += 1
            active = np.ones(self.threads, bool)
            if guard:
                active = self.read(guard.lstrip('!'), 'pred') ^ guard.startswith('!')
            first, *suffixes = name.split('.')
            if first in ('bra', 'ret'):
                assert active.all() or not active.any(), 'threads that part ways'
                if active.any():
                    if first == 'ret':
                        return
                    place = self.labels[operands[0]]
            elif first in ('ld', 'st') and suffixes[0] != 'param':
                if active.any():
                    self.access(first, suffixes, operands, active)
            elif first in ('ldmatrix', 'stmatrix'):
                self.access_matrices(first, suffixes, operands)
            elif first != 'bar':
                kind, values = self.compute(name, first, suffixes, operands)
                self.write(operands[0], _bits(values, kind), active)

    def operands_of_access(self, operands, is_load, suffixes):
        """The memory, the addresses of all threads, and the registers that go there or come from there."""
        registers, address = operands if is_load else operands[::-1]
        register, _, offset = address.strip('[ ]').partition('+')
        is_shared = 'shared' in suffixes
        addresses = self.read(register.strip(), 'u32' if is_shared else 'u64').astype(np.uint64)
        registers = _split(registers.strip('{ }'))
        return self.shared if is_shared else self.memory, addresses + np.uint64(int(offset or 0)), registers

    def access(self, first, suffixes, operands, active):
        """A load or a store."""
        memory, addresses, parts = self.operands_of_access(operands, first == 'ld', suffixes)
        size = int(suffixes[-1][1:]) // 8
        array, places = memory.bytes_at(addresses[active], size * len(parts))
        for i, part in enumerate(parts):
            here = places[:, i * size : (i + 1) * size]
            if first == 'st':
                values = self.read(part, f'u{8 * size}')[active]
                array[here] = values[:, None].view(np.uint8)
            else:
                bits = np.zeros(self.threads, np.uint64)
                bits[active] = np.ascontiguousarray(array[here]).view(f'u{size}')[:, 0]
                self.write(part, bits, active)

    def access_matrices(self, first, suffixes, operands):
        """Matrices of 8 x 8 halves: a thread of 32 holds two neighbours, and knows where a row of a matrix is."""
        memory, addresses, registers = self.operands_of_access(operands, first == 'ldmatrix', suffixes)
        for i, register in enumerate(registers):
            starts = addresses.reshape(-1, 32)[:, 8 * i : 8 * i + 8].reshape(-1)
            array, places = memory.bytes_at(starts, 16)
            values = self.read(register, 'u32') if first == 'stmatrix' else np.ascontiguousarray(array[places])
            matrices = values.view(np.uint16).reshape(-1, 8, 8)
            if 'trans' in suffixes:
                matrices = matrices.transpose(0, 2, 1)
            matrices = np.ascontiguousarray(matrices)
            if first == 'stmatrix':
                array[places] = matrices.view(np.uint8).reshape(places.shape)
            else:
                self.write(register, matrices.view(np.uint32).reshape(-1).astype(np.uint64), True)

    def compute(self, name, first, suffixes, operands):
        """The type and the values of an instruction's result."""
        kind = suffixes[-1]
        wide = kind[0] + '64' if 'wide' in suffixes else kind
        if name.startswith('ld.param'):
            argument = self.arguments[int(re.search(r'param_(\d+)', operands[1])[1])]
            is_float = isinstance(argument, float)
            return ('f32' if is_float else 's64'), np.full(self.threads, argument, 'f4' if is_float else 'i8')
        if first == 'shfl':
            values, other = self.read(operands[1], 'u32'), self.read(operands[2], 'u32')
            assert suffixes[1] in ('bfly', 'idx') and operands[3:] == ['31', '-1'], name
            threads = np.arange(self.threads)
            other = threads ^ other if suffixes[1] == 'bfly' else threads // 32 * 32 + other % 32
            return 'u32', values[other.astype(np.int64)]
        if first == 'cvt':
            target, source = suffixes[-2:]
            if target.endswith('x2'):
                high, low = (_bits(self.read(operand, source), target[:-2]) for operand in operands[1:])
                return 'u32', high << 16 | low
            return target, self.read(operands[1], source)
        if first == 'setp' and len(suffixes) == 2:
            return 'pred', _COMPARISONS[suffixes[0]](*(self.read(operand, kind) for operand in operands[1:]))
        if first == 'selp':
            yes, no = (self.read(operand, kind) for operand in operands[1:3])
            return kind, np.where(self.read(operands[3], 'pred'), yes, no)
        if first == 'bfe':
            values, start, length = (self.read(operand, kind) for operand in operands[1:])
            top = values.dtype.type(32)
            return kind, values << top - start - length >> top - length
        if first not in (*_OPERATIONS, 'mad', 'fma', 'mul', 'div') or not set(suffixes[:-1]) <= _MODIFIERS:
            raise NotImplementedError(f'instruction {name}: add it to {__file__}')
        if first in ('mad', 'fma', 'mul'):
            numbers = [self.read(operand, kind) for operand in operands[1:3]]
            # A product of single precision is exact in double precision.
            exact = {'f32': 'f8'}.get(kind, f'{numbers[0].dtype.kind}8')
            result = np.multiply(*(number.astype(exact) for number in numbers))
            return wide, result + self.read(operands[3], wide).astype(exact) if first != 'mul' else result
        if first == 'div':
            quotient = np.divide(*(self.read(operand, kind) for operand in operands[1:]))
            return kind, np.trunc(quotient) if kind == 's32' else quotient
        shifts = first in ('shl', 'shr')
        numbers = [self.read(operand, kind) for operand in operands[1 : 2 if shifts else None]]
        if shifts:
            numbers.append(self.read(operands[2], 'u32').astype(numbers[0].dtype))
        return kind, _OPERATIONS[first](*numbers)

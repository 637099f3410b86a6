"""Run a Gluon kernel's source in NumPy, emulating Hopper's asynchronous operations.

Gluon has no interpreter. Here its functions run as plain Python on NumPy arrays; layouts are ignored. The partitions of
a `warp_specialize` ("parts") and the completion of TMA loads are interleaved at random. Undefined behaviour on a GPU is
an error here:

- a load into a buffer that a matrix product is still reading or another load is still filling;
- a product that reads a buffer while it is being filled, or after a thread has written it without a fence;
- use of a product's result without waiting for it;
- one arrival too many at a barrier, a deadlock, or an address outside its tensor;
- overflow of a 32-bit scalar. Its `//` and `%` round towards zero, as the compiler's do.

A part is one thread here but four warps on the GPU: the compiler must synchronise a warpgroup's warps before one of
them arrives at a barrier (checked in `test_static.py`). None of this proves that the GPU agrees.
"""

import random
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
from triton.experimental.gluon import language as real_gl


class Broken(AssertionError):
    """Undefined behaviour on the hardware, or a deadlock."""


class Stopped(BaseException):
    """Raised in the remaining parts once one has failed."""


def check(holds: bool, words: str) -> None:
    if not holds:
        raise Broken(words)


class Int(int):
    """A 32-bit scalar, or a 64-bit one after `.to(int64)`."""

    bits = 32

    def __new__(cls, value: int, bits: int = 32) -> "Int":
        check(-(2 ** (bits - 1)) <= value < 2 ** (bits - 1), f"{value} does not fit in {bits} bits")
        self = super().__new__(cls, value)
        self.bits = bits
        return self

    def to(self, dtype: Any) -> "Int":
        return Int(self, 64 if dtype == real_gl.int64 else 32)


def _binary(compute: Callable[[int, int], int]) -> tuple[Any, Any]:
    def forward(self: Int, other: Any) -> Any:
        if isinstance(other, (np.ndarray, float)) or not isinstance(other, (int, np.integer)):
            return NotImplemented
        return Int(compute(int(self), int(other)), max(self.bits, getattr(other, "bits", 32)))

    def backward(self: Int, other: Any) -> Any:
        if not isinstance(other, (int, np.integer)):
            return NotImplemented
        return Int(compute(int(other), int(self)), max(self.bits, getattr(other, "bits", 32)))

    return forward, backward


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


for _name, _compute in {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "and": lambda a, b: a & b,
    "xor": lambda a, b: a ^ b, "floordiv": _quotient, "mod": lambda a, b: a - b * _quotient(a, b),
}.items():  # fmt: skip
    _forward, _backward = _binary(_compute)
    setattr(Int, f"__{_name}__", _forward)
    setattr(Int, f"__r{_name}__", _backward)


class Tensor(np.ndarray):
    """A tensor in registers."""

    def to(self, dtype: Any) -> "Tensor":
        return tensor(self.astype(_dtype(dtype)))

    type = types.SimpleNamespace(layout=None)


def tensor(x: Any) -> Tensor:
    return np.asarray(x).view(Tensor)


def _dtype(dtype: Any) -> Any:
    """Return the NumPy dtype; int64 for all integers, so that an overflow shows up as a bad address."""
    names = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    return names.get(getattr(dtype, "name", None), np.int64) if hasattr(dtype, "primitive_bitwidth") else dtype


class Pointer:
    """A pointer into a tensor's storage; adding an integer or a tensor of integers gives another."""

    def __init__(self, memory: np.ndarray, at: Any = 0) -> None:
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.at + more)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        at, mask = np.broadcast_arrays(np.asarray(self.at, np.int64), True if mask is None else mask)
        inside = (at >= 0) & (at < len(self.memory))
        check(bool((inside | ~mask).all()), "an address is outside its tensor")
        return np.where(mask, at, 0), mask


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """Return x as a NumPy view that shares its memory and strides."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def storage(x: torch.Tensor) -> np.ndarray:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return as_numpy(x.as_strided((last,), (1,)))


class Descriptor:
    """A TMA descriptor: boxes of a tensor, filled with zeros beyond its edges."""

    def __init__(self, given: Any) -> None:
        self.whole, self.box, self.layout = as_numpy(given.base), given.block_shape, given.layout
        self.dtype = self.whole.dtype
        self.block_type = types.SimpleNamespace(nbytes=int(np.prod(self.box)) * self.dtype.itemsize)

    def read(self, corner: list[int]) -> np.ndarray:
        box = np.zeros(self.box, self.dtype)
        there = [slice(max(at, 0), max(min(at + n, size), 0))
                 for at, n, size in zip(corner, self.box, self.whole.shape, strict=True)]  # fmt: skip
        here = [slice(part.start - at, part.start - at + max(part.stop - part.start, 0))
                for part, at in zip(there, corner, strict=True)]  # fmt: skip
        if all(part.stop > part.start for part in there):
            box[tuple(here)] = self.whole[tuple(there)]
        return box


class Place:
    """A shared-memory buffer that a single load fills; all NaN until then."""

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.data = np.full(shape, np.nan, dtype)
        self.filling, self.readers = False, 0
        self.unfenced: set[object] = set()  # parts with writes not yet fenced

    def check_readable(self) -> None:
        check(not self.filling, "a buffer is read while a load fills it")


class View:
    """A kernel's view of a buffer, or of part of one."""

    def __init__(self, machine: "Machine", place: Place, data: np.ndarray) -> None:
        self.machine, self.place, self.data = machine, place, data

    def reshape(self, shape: Any) -> "View":
        return View(self.machine, self.place, self.data.reshape(shape))

    def permute(self, order: Any) -> "View":
        return View(self.machine, self.place, self.data.transpose(order))

    def slice(self, start: int, length: int) -> "View":
        return View(self.machine, self.place, self.data[start : start + length])

    def load(self, layout: Any) -> Tensor:
        self.machine.switch()
        self.place.check_readable()
        return tensor(self.data.copy())

    def store(self, value: np.ndarray) -> None:
        self.machine.switch()
        self.place.check_readable()
        check(not self.place.readers, "a buffer is written while a product reads it")
        self.place.unfenced.add(self.machine.part())
        self.data[...] = value


class Places:
    def __init__(self, machine: "Machine", dtype: Any, shape: list[int]) -> None:
        self.machine, self.dtype = machine, np.dtype(dtype)
        self.places = [Place(dtype, shape[1:]) for _ in range(shape[0])]

    def index(self, i: int) -> View:
        return View(self.machine, self.places[i], self.places[i].data)


class Barrier:
    """An mbarrier: after `count` arrivals and all expected bytes, it flips to its next phase."""

    def __init__(self) -> None:
        self.count, self.pending, self.bytes, self.parity = 0, 0, 0, 0

    def arrive(self, count: int = 1) -> None:
        check(0 < count <= self.pending, "one arrival too many")
        self.pending -= count
        self.turn()

    def turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.parity = self.count, self.parity ^ 1


class Barriers(list):
    def index(self, i: int) -> Barrier:  # type: ignore[override]
        return self[i]


class Promise:
    """An asynchronous matrix product in flight."""

    def __init__(self, value: np.ndarray, places: list[Place]) -> None:
        self.value, self.places, self.done = value, places, False
        for place in places:
            place.readers += 1

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise Broken("a product is used before it is waited for")

    def finish(self) -> None:
        self.done = True
        for place in self.places:
            place.readers -= 1


class Machine:
    """One program: its shared memory, its parts (threads that run one at a time) and operations in flight."""

    def __init__(self, program: int, programs: int, seed: int) -> None:
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.turns: dict[threading.Thread, threading.Semaphore] = {}
        self.blocked: dict[threading.Thread, Callable[[], bool]] = {}
        self.places: list[Place] = []
        self.loads: list[Callable[[], None]] = []
        self.products: dict[object, list[Promise]] = {}
        self.failure: BaseException | None = None
        self.finished = threading.Event()

    def part(self) -> threading.Thread:
        return threading.current_thread()

    def run_parts(self, parts: list[tuple[Callable[..., None], tuple]]) -> None:
        def body(function: Callable[..., None], arguments: tuple) -> None:
            me = self.part()
            self.turns[me].acquire()
            try:
                if self.failure is None:
                    with np.errstate(all="ignore"):  # a GPU gives no warnings, and -∞ is intended
                        function(*arguments)
                    check(not self.products.get(me), "a part ends with products in flight")
            except Stopped:
                pass
            except BaseException as failed:
                self.failure = self.failure or failed
            del self.turns[me]
            self.hand_over()

        threads = [threading.Thread(target=body, args=part, daemon=True) for part in parts]
        self.turns = {thread: threading.Semaphore(0) for thread in threads}
        for thread in threads:
            thread.start()
        self.hand_over()
        self.finished.wait()
        for thread in threads:
            thread.join()
        if self.failure is None and self.loads:
            self.failure = Broken("the program ends with loads in flight")
        if self.failure is not None:
            raise self.failure

    def hand_over(self) -> None:
        """Resume a runnable part or complete a pending load, chosen at random."""
        while True:
            if not self.turns:
                self.finished.set()
                return
            if self.failure is not None:
                next(iter(self.turns.values())).release()
                return
            ready = [part for part in self.turns if part not in self.blocked or self.blocked[part]()]
            if not ready and not self.loads:
                self.failure = Broken("every part waits for another")
                continue
            choice = self.random.randrange(len(ready) + len(self.loads))
            if choice < len(ready):
                self.blocked.pop(ready[choice], None)
                self.turns[ready[choice]].release()
                return
            self.loads.pop(choice - len(ready))()

    def switch(self, until: Callable[[], bool] | None = None) -> None:
        me = self.part()
        if me not in self.turns:  # before the parts start there is only one thread
            return
        if until is not None:
            self.blocked[me] = until
        self.hand_over()
        self.turns[me].acquire()
        if self.failure is not None:
            raise Stopped

    # Called by kernels

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype == real_gl.int64:
            return Barriers(Barrier() for _ in range(shape[0]))
        made = Places(self, dtype, shape)
        self.places.extend(made.places)
        return made

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        self.switch()
        barrier.arrive(count)

    def expect(self, barrier: Barrier, size: int) -> None:
        self.switch()
        barrier.bytes += size
        barrier.arrive()

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.switch(lambda: barrier.parity != parity)

    def load_by_tma(self, descriptor: Descriptor, corner: list[int], barrier: Barrier, view: View) -> None:
        self.switch()
        place = view.place
        check(not place.filling, "two loads fill one buffer")
        check(not place.readers, "a load fills a buffer that a product reads")
        check(not place.unfenced, "a load fills a buffer that was written without a fence")
        place.filling, place.data[...] = True, np.nan
        box = descriptor.read([int(at) for at in corner])

        def land() -> None:
            place.data[...], place.filling = box, False
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.turn()

        self.loads.append(land)

    def multiply(self, a: Any, b: View, acc: np.ndarray, use_acc: bool = True, is_async: bool = False) -> Any:
        self.switch()
        places = [x.place for x in (a, b) if isinstance(x, View)]
        for place in places:
            place.check_readable()
            check(not place.unfenced, "a product reads what was written without a fence")
        left = a.data if isinstance(a, View) else a
        value = tensor(np.asarray(left, np.float32) @ np.asarray(b.data, np.float32))
        promise = Promise(acc + value if use_acc else value, places)
        self.products.setdefault(self.part(), []).append(promise)
        return promise if is_async else self.wait_for_products(0, [promise])

    def wait_for_products(self, outstanding: int, deps: list[Promise]) -> Any:
        self.switch()
        mine = self.products.get(self.part(), [])
        while len(mine) > outstanding:
            mine.pop(0).finish()
        check(all(dep.done for dep in deps), "a product is used before it is waited for")
        values = [dep.value for dep in deps]
        return values[0] if len(values) == 1 else tuple(values)

    def fence(self) -> None:
        """Fence this part's writes; a barrier makes them visible to the other parts."""
        for place in self.places:
            place.unfenced.discard(self.part())


def _reduce(function: Callable[..., Any]) -> Callable[..., Any]:
    def reduced(x: np.ndarray, axis: int) -> Any:
        out = function(np.asarray(x), axis=axis)
        return tensor(out) if out.ndim else Int(int(out)) if out.dtype.kind in "iub" else out

    return reduced


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Any:
    at, mask = pointer.places(mask)
    values = np.where(mask, pointer.memory[at], 0 if other is None else other)
    return tensor(values) if values.ndim else Int(int(values), 64)


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, mask = pointer.places(mask)
    pointer.memory[at[mask]] = np.broadcast_to(value, at.shape)[mask]


def _count(*bounds: int) -> Iterator[Int]:
    return map(Int, range(*map(int, bounds)))


def namespace(machine: Machine, kernel: Any, watched: dict[str, Callable[..., None]]) -> dict[str, Any]:
    """Return the kernel's globals, with Gluon replaced by this machine and jit functions by plain Python."""
    ignored = dict.fromkeys(("SliceLayout", "BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout"),
                            lambda *arguments: None)  # fmt: skip
    gl = types.SimpleNamespace(
        **ignored, constexpr=real_gl.constexpr, int32=real_gl.int32, int64=real_gl.int64, float32=real_gl.float32,
        program_id=lambda axis: Int(machine.program), num_programs=lambda axis: Int(machine.programs),
        num_warps=lambda: 4, static_range=range, allocate_shared_memory=machine.allocate_shared_memory,
        arange=lambda start, end, layout: tensor(np.arange(start, end)),
        zeros=lambda shape, dtype, layout: tensor(np.zeros(shape, _dtype(dtype))),
        full=lambda shape, value, dtype, layout: tensor(np.full(shape, value, _dtype(dtype))),
        zeros_like=np.zeros_like, convert_layout=lambda x, layout: x, where=lambda *x: tensor(np.where(*x)),
        maximum=np.maximum, exp2=np.exp2, log2=np.log2,
        max=_reduce(np.max), min=_reduce(np.min), sum=_reduce(np.sum), load=_load, store=_store,
        warp_specialize=lambda parts, warps, registers: machine.run_parts(parts),
    )  # fmt: skip
    mbarrier = types.SimpleNamespace(init=machine.init, arrive=machine.arrive, expect=machine.expect,
                                     wait=machine.wait, MBarrierLayout=lambda: None)  # fmt: skip
    scope = dict(kernel.fn.__globals__)
    scope.update(gl=gl, mbarrier=mbarrier, load_by_tma=machine.load_by_tma, multiply=machine.multiply, range=_count,
                 wait_for_products=machine.wait_for_products, fence_async_shared=machine.fence)  # fmt: skip
    for name, value in scope.items():
        if isinstance(value, type(kernel)):
            scope[name] = python(value, scope)
        elif isinstance(value, real_gl.constexpr):
            scope[name] = value.value
    for name, told in watched.items():
        scope[name] = _watched(scope[name], told)
    return scope


def _watched(function: Callable[..., Any], told: Callable[..., None]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        told(result, *arguments)
        return result

    return call


def python(jit: Any, scope: dict[str, Any]) -> Callable[..., Any]:
    return types.FunctionType(jit.fn.__code__, scope, jit.fn.__name__, jit.fn.__defaults__, jit.fn.__closure__)


class Emulated:
    """Stands in for a kernel: `kernel[grid](...)` runs its programs one after another.

    watched: callbacks by name of a jit function, called after it with its result and its arguments.
    """

    def __init__(self, kernel: Any, seed: int = 0, watched: dict[str, Callable[..., None]] | None = None) -> None:
        self.kernel, self.seed, self.watched = kernel, seed, watched or {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, enable_fp_fusion: bool, **constants: Any) -> None:
            given = [self.argument(x) for x in arguments]
            for program in range(grid[0]):
                machine = Machine(program, grid[0], self.seed + program)
                python(self.kernel, namespace(machine, self.kernel, self.watched))(*given, **constants)

        return launch

    @staticmethod
    def argument(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return Pointer(storage(x))
        if isinstance(x, int):
            return Int(x)
        return Descriptor(x) if hasattr(x, "block_shape") else x

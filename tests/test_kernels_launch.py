"""What all kernels share: reference namesakes, argument checks, torch.compile, determinism, offsets beyond 2³¹."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    DEVICE,
    DTYPES,
    assert_no_worse,
    exact,
    examples,
    int32_watched,
    integers,
    laid_out,
    layouts,
    normal,
    same_bits,
)
from torch import library
from torch._subclasses import FakeTensorMode

from llama import reference
from llama.kernels import launch
from llama.kernels.cross_entropy import cross_entropy, linear_cross_entropy
from llama.kernels.decode_attention import decode_attention
from llama.kernels.flash_attention import flash_attention
from llama.kernels.gemv import gemv, gemv_swiglu
from llama.kernels.rms_norm import add_rms_norm, rms_norm
from llama.kernels.rope import apply_rope, apply_rope_to_cache
from llama.kernels.swiglu import swiglu

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in (ROOT / "kernels").glob("*.py")}
KERNELS = sorted(name for name, path in FILES.items() if "@triton.jit" in path.read_text())
NO_NAMESAKE = {"check_heads"}  # shared by the kernels, not for users
ONLY_KERNELS, ONLY_REFERENCE = {"in_place"}, {"block_q", "block_k"}

B, H, K, T, S, D, E, V = 2, 4, 2, 3, 5, 8, 12, 7


def arguments(dtype=torch.float32) -> dict[str, tuple]:
    """Return small calls of every public function: name -> (function, *arguments)."""
    rng = np.random.default_rng(0)

    def some(*shape):
        return normal(rng, shape, dtype)

    def whole(high, *shape):
        return integers(rng.integers(0, high, shape))

    q, k, v, cache = some(B, H, T, D), some(B, K, T, D), some(B, K, T, D), some(2, B, K, S, D)
    angles, weight, token = (some(B, T, D), some(B, T, D)), some(E), some(B, H, 1, D)
    table = integers([[1, 0], [0, 1]])
    return {
        "rms_norm": (rms_norm, some(B, T, E), weight, 1e-5),
        "add_rms_norm": (add_rms_norm, some(B, T, E), some(B, T, E), weight, 1e-5),
        "swiglu": (swiglu, some(B, T, E), some(B, T, E)),
        "gemv": (gemv, some(B, E), some(H, E)),
        "gemv, three weights": (gemv, some(B, E), some(H, E), some(K, E), some(K, E)),
        "gemv_swiglu": (gemv_swiglu, some(B, E), some(V, E), some(V, E)),
        "apply_rope": (apply_rope, q, k, *angles),
        "apply_rope in place": (apply_rope, q.clone(), k.clone(), *angles, True),
        "apply_rope_to_cache": (apply_rope_to_cache, q, k, v, *angles, *cache.clone(), whole(S, B, T)),
        "flash_attention": (flash_attention, q, *cache, True, whole(2, B), whole(S, B), None, True),
        "flash_attention, first_keys": (
            flash_attention, q, *cache, True, None, None, None, False, whole(S, B, T), None, whole(2, B, S)
        ),
        "flash_attention, cu_seqlens": (
            flash_attention, q, k, v, True, None, None, None, False, None, integers([0, 1, T])
        ),
        "decode_attention": (decode_attention, token, *cache, whole(S, B), whole(2, B, S)),
        "decode_attention, pages": (decode_attention, token, *cache, None, whole(2, B, 2 * S), table),
        "cross_entropy": (cross_entropy, some(B, T, V), whole(V, B, T)),
        "linear_cross_entropy": (linear_cross_entropy, some(B, T, E), some(V, E), whole(V, B, T)),
    }  # fmt: skip


CALLS = sorted(arguments())
every_call = pytest.mark.parametrize("name", CALLS)


def tensors_of(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def assert_same(ours, theirs):
    assert all(map(same_bits, tensors_of(ours), tensors_of(theirs)))


@pytest.mark.parametrize("module", KERNELS)
def test_every_public_function_has_a_namesake_in_the_reference(module):
    tree = ast.parse(FILES[module].read_text())
    jitted = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list}
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[0] != "_"} - jitted - NO_NAMESAKE
    assert names
    assert names <= {function.__name__ for function, *_ in arguments().values()}, "not in arguments()"
    for name in names:
        ours = inspect.signature(getattr(importlib.import_module(f"llama.kernels.{module}"), name)).parameters
        theirs = inspect.signature(getattr(reference, name)).parameters
        shared = [p for p in ours if p not in ONLY_KERNELS]
        assert shared == [p for p in theirs if p not in ONLY_REFERENCE]
        assert [ours[p].default for p in shared] == [theirs[p].default for p in shared]


def test_every_operator_is_called_here():
    """The operators that the files define are those that the calls above reach."""
    reached = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "llama_triton":
                reached.add(op._schema.name.partition("::")[2])
            return op(*args, **(kwargs or {}))

    with Watch():
        for function, *args in arguments().values():
            function(*args)
    defined = {
        node.decorator_list[0].args[0].value.partition("(")[0]
        for module in KERNELS
        for node in ast.parse(FILES[module].read_text()).body
        if isinstance(node, ast.FunctionDef) and "launch.operator" in ast.unparse(node.decorator_list)
    }
    assert reached == defined


@every_call
def test_refusals_name_what_is_wrong(name):
    function, *args = arguments()[name]
    for i, arg in enumerate(args):
        if not isinstance(arg, torch.Tensor):
            continue
        for wrong, message in [
            (arg.to("meta"), f"{function.__name__}: all tensors must be on the same device, got .*meta"),
            (arg.double(), f"{function.__name__}: dtypes must be float32, float16 or bfloat16, got torch.float64"),
        ]:
            if arg.is_floating_point() or wrong.is_meta:
                with pytest.raises(ValueError, match=message):
                    function(*args[:i], wrong, *args[i + 1 :])
        if arg.is_floating_point():
            graded = [*args[:i], arg.clone().requires_grad_(), *args[i + 1 :]]
            with pytest.raises(ValueError, match=f"{function.__name__} has no backward kernel yet: .*llama.ops"):
                function(*graded)
            if name != "apply_rope in place" and not (function is apply_rope_to_cache and 5 <= i <= 6):
                with torch.no_grad():
                    function(*graded)
                with torch.inference_mode():
                    function(*graded)


@every_call
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_call_gives_the_same_bits(name, dtype):
    first, second = (function(*args) for function, *args in (arguments(dtype)[name], arguments(dtype)[name]))
    assert_same(first, second)


def without_interpreter(code):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_importing_kernels_touches_no_driver_and_a_cpu_tensor_is_refused_in_words():
    done = without_interpreter(f"""
import importlib, torch, triton
for name in {sorted(FILES)}:
    importlib.import_module("llama.kernels." + name)
assert not torch.cuda.is_initialized()
assert triton.runtime.driver._active is None
from llama.kernels.swiglu import swiglu
try:
    swiglu(torch.ones(2, 3), torch.ones(2, 3))
except ValueError as error:
    print(error)
""")
    assert done.stderr == ""
    assert done.stdout == (
        "swiglu: Triton kernels need a GPU, but the tensors are on cpu. To test them on a CPU, in Triton's "
        "interpreter, set TRITON_INTERPRET=1 before starting Python\n"
    )


def operator_calls(name, dtype=torch.float32):
    """The (operator, args, kwargs) that the public function calls."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "llama_triton":
                seen.append((op, args, kwargs or {}))
            return op(*args, **(kwargs or {}))

    function, *args = arguments(dtype)[name]
    with Watch():
        function(*args)
    return seen


@every_call
def test_operators_keep_their_word(name):
    """PyTorch's opcheck: the schema declares what is mutated, the fake returns the right shapes, strides and dtypes."""
    for op, args, kwargs in operator_calls(name):
        library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@given(st.sampled_from(CALLS), st.sampled_from(DTYPES), st.data())
@examples(150)
def test_fake_outputs_are_like_the_real_ones(name, dtype, data):
    for op, args, kwargs in operator_calls(name, dtype):
        args = [laid_out(x, data.draw(layouts)) if isinstance(x, torch.Tensor) else x for x in args]
        if data.draw(st.booleans()):  # an empty batch
            args = [x[:0] if isinstance(x, torch.Tensor) and x.dim() > 2 and len(x) == B else x for x in args]
            if "attention" in str(op) or "rope" in str(op):
                args = [x[:0] if isinstance(x, torch.Tensor) and len(x) == B else x for x in args]
            elif "loss" in str(op):
                args[-2] = args[-2][:0]
        if "rms" in str(op) or "swiglu" in str(op):  # mixed dtypes
            args[1] = args[1].to(data.draw(st.sampled_from(DTYPES)))
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args), **kwargs)
        real = op(*args, **kwargs)
        if real is None:
            assert fake is None
            continue
        for ours, theirs in zip(tensors_of(fake), tensors_of(real), strict=True):
            assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
            assert ours.device == theirs.device


@every_call
def test_torch_compile_sees_one_operator_and_no_break(name):
    function, *args = arguments()[name]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(function, fullgraph=True, backend=backend)(*args)
    assert_same(out, function(*arguments()[name][1:]))
    assert "llama_triton" in "".join(graph.code for graph in graphs)


def test_torch_compile_by_inductor_gives_the_same():
    weight = normal(np.random.default_rng(0), (E,), torch.float32)

    def layer(x, residual):
        x, residual = add_rms_norm(x * 2, residual, weight, 1e-5)
        return swiglu(x, residual) + 1

    x, residual = normal(np.random.default_rng(1), (2, B, T, E), torch.float32)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # PyTorch's, about its own code
        assert_same(torch.compile(layer, fullgraph=True)(x, residual), layer(x, residual))


def far(x: torch.Tensor, axis: int, stride: int) -> torch.Tensor:
    """Return x with the given stride along `axis`; the memory between its elements is never touched."""
    strides = list(x.new_empty([1 if i == axis else size for i, size in enumerate(x.shape)]).stride())
    strides[axis] = stride
    reach = sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True)) + 1
    view = torch.empty(reach, dtype=x.dtype, device=x.device).as_strided(x.shape, strides)
    return view.copy_(x)


FAR = [
    (name, i, axis)
    for name, (_, *args) in arguments(torch.float16).items()
    for i, x in enumerate(args)
    if isinstance(x, torch.Tensor) and x.is_floating_point()
    for axis in range(x.dim())
    if x.shape[axis] > 1
]


@pytest.mark.parametrize(("name", "index", "axis"), FAR, ids=lambda x: str(x).replace(" ", "_"))
def test_offsets_beyond_32_bits(name, index, axis):
    """No product with a stride is computed in 32 bits: an overflow raises in the interpreter, and on a GPU it would
    access the wrong memory."""
    _, *expected_args = arguments(torch.float16)[name]
    function, *args = arguments(torch.float16)[name]
    expected = function(*expected_args)
    x = args[index]
    stride = 2**31 // (x.shape[axis] - 1) + 64
    if "flash" in name and axis >= 2:
        stride = 2**23  # 32 bits must suffice, and do, within a tile of 128 keys or a head of 256 elements
    args[index] = far(x, axis, stride)
    with int32_watched():
        out = function(*args)
    assert_same(out, expected)
    for ours, theirs in zip(args, expected_args, strict=True):  # arguments modified in place
        assert not isinstance(ours, torch.Tensor) or same_bits(ours, theirs)


@given(st.integers(0, 2**31), st.integers(1, 2**20))
def test_the_hosts_arithmetic_is_tritons(a, b):
    import triton

    assert launch.cdiv(a, b) == triton.cdiv(a, b)
    assert launch.power_of_2(b) == triton.next_power_of_2(b)


def test_the_length_of_a_text_changes_no_compiled_kernel():
    """One head size and one kind of padding share one prefill kernel, whatever the lengths are divisible by."""
    done = without_interpreter("""
import torch
from llama import static
from llama.kernels import flash_attention
built = []
for new, past, rows in ((32, 0, 2), (33, 0, 2), (31, 2, 1), (17, 47, 16)):
    with torch.device("meta"), static.pretending(static.TARGETS["sm_90"], built):
        q, k = (torch.empty(rows, n, 2, 64, dtype=torch.bfloat16).transpose(1, 2) for n in (new, new + past))
        ends, first = torch.empty(rows, dtype=torch.int32), torch.empty(rows, new, dtype=torch.int32)
        mask = torch.empty(rows, new + past, dtype=torch.bool)
        flash_attention._flash_attention.launch(q, k, k, True, ends, ends, first, mask, past, True)
print(len(built), len({compiled.hash for compiled, *_ in built}))
""")
    assert done.stderr == ""
    assert done.stdout == "4 1\n"


@every_call
def test_no_32_bit_overflow_in_ordinary_calls(name):
    function, *args = arguments()[name]
    with int32_watched():
        assert_same(function(*args), function(*arguments()[name][1:]))


def test_the_watch_sees_an_overflow():
    if DEVICE.type != "cpu":
        pytest.skip("only the interpreter detects overflow")
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, stride):
        tl.store(x_ptr, (tl.program_id(0) + 3) * stride * 0)

    x = torch.ones(1, dtype=torch.int64)
    kernel[(1,)](x, 2**30)
    with int32_watched(), pytest.raises(Exception, match="int32 overflow detected"):
        kernel[(1,)](x, 2**30)


@pytest.mark.needs_gpu
@pytest.mark.parametrize("function", [rms_norm, swiglu])
def test_more_than_two_to_the_31_elements(function):
    width = 4096
    x = torch.empty(2**31 // width + 9, width, dtype=torch.bfloat16, device=DEVICE)
    tail = x[-16:]
    tail.copy_(normal(np.random.default_rng(0), (16, width), torch.bfloat16))
    rest = (torch.ones(width, dtype=torch.bfloat16, device=DEVICE), 1e-5) if function is rms_norm else ()
    other = () if function is rms_norm else (x,)
    y = function(x, *other, *rest)
    assert same_bits(y[-16:], function(tail.clone(), *([tail.clone()] if other else []), *rest))


@pytest.mark.needs_gpu
def test_more_than_two_to_the_31_logits():
    vocabulary = 131_072
    logits = torch.empty(2**31 // vocabulary + 9, vocabulary, dtype=torch.bfloat16, device=DEVICE)
    logits[-4:] = normal(np.random.default_rng(0), (4, vocabulary), torch.bfloat16)
    labels = torch.full((len(logits),), -100, device=DEVICE)
    labels[-4:] = integers([0, 5, vocabulary - 1, 7])
    assert same_bits(cross_entropy(logits, labels), cross_entropy(logits[-4:].clone(), labels[-4:]))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_prompts_are_as_close_as_pytorchs_attention(dtype):
    rng = np.random.default_rng(0)
    tokens = 8192
    q, k, v = (normal(rng, (1, heads, tokens, 128), dtype) for heads in (8, 2, 2))
    attend = torch.nn.functional.scaled_dot_product_attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wide_k, wide_v = (x.float().repeat_interleave(4, dim=1) for x in (k, v))
        truth = attend(q.float(), wide_k, wide_v, is_causal=True)
    plain = attend(q, k.repeat_interleave(4, dim=1), v.repeat_interleave(4, dim=1), is_causal=True)
    ours = flash_attention(q, k, v)
    assert_no_worse(ours, plain, exact(truth), terms=float(v.abs().max()))
    last = decode_attention(q[:, :, -1:], k, v, None)
    assert_no_worse(last, plain[:, :, -1:], exact(truth)[:, :, -1:], terms=float(v.abs().max()))


@pytest.mark.needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_bits_depend_on_neither_the_batch_nor_the_run(dtype):
    rng = np.random.default_rng(0)
    rows, tokens, width = 5, 700, 2048
    x, weight = normal(rng, (rows, tokens, width), dtype), normal(rng, (width,), dtype)
    logits, labels = normal(rng, (rows * 7, 32_000), dtype), integers(rng.integers(0, 32_000, rows * 7))
    q, k, v = (normal(rng, (rows, heads, tokens, 128), dtype) for heads in (8, 2, 2))
    lengths = integers([1, tokens, 333, 64, 65])
    for _ in range(3):
        row = slice(2, 3)
        assert_same(rms_norm(x[row], weight, 1e-5), rms_norm(x, weight, 1e-5)[row])
        assert_same(swiglu(x[row], x[row]), swiglu(x, x)[row])
        assert_same(flash_attention(q[row], k[row], v[row]), flash_attention(q, k, v)[row])
        one = q[:, :, -1:]
        assert_same(decode_attention(one[row], k[row], v[row], lengths[row]), decode_attention(one, k, v, lengths)[row])
        assert_same(cross_entropy(logits, labels), cross_entropy(logits, labels))

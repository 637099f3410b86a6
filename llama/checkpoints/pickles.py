"""Read files written by torch.save, without torch.

Such a file is a zip archive of the tensors' bytes and a pickle that describes the tensors. A pickle is a program: the
reader here implements the few opcodes that a state dict needs, rejects all others, and calls nothing.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .stored import MappedFile, Stored, unreadable

LARGEST, LONGEST = 1 << 22, 1 << 19  # a pickle's bytes and opcodes: 405B's has about a tenth of either
STORAGES = {"DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
            "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
            "BoolStorage": np.bool_}  # fmt: skip

KNOWN = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("collections", "OrderedDict")}


class Storage(NamedTuple):
    """The zip member that holds a tensor's data; `length` counts elements."""

    key: str
    dtype: np.dtype
    length: int


class View(NamedTuple):
    """A tensor as a view of its storage; the offset and strides are in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchZip:
    """The tensors of a file, memory-mapped. `folder` is the archive's top-level folder, which torch.save names after
    the file, without its suffix, if it knows the name.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.is_file() and _is_legacy(path):
            raise ValueError(f"{path} has the format from before PyTorch 1.6; torch.load it, and torch.save it again")
        try:
            views, self._offsets, self.folder = _contents(path)
            self._data = MappedFile(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist, though the model's index names it") from error
        except IsADirectoryError as error:
            raise ValueError(f"{path} is a folder; it should be a file written by torch.save") from error
        except Exception as error:  # zipfile and pickletools raise all kinds of exceptions
            raise unreadable(path, "holds more than tensors", error) from error
        if not isinstance(views, dict) or not all(
            isinstance(name, str) and isinstance(view, View) for name, view in views.items()
        ):
            raise ValueError(f"{path} should hold tensors by name, as a state dict does")
        for name, (storage, _, shape, _) in views.items():
            if math.prod(shape) > storage.length:
                raise ValueError(
                    f"{path}: {name} of shape {shape} repeats its {storage.length} elements, as expand() does; "
                    "call contiguous() and save it again"
                )
        self._views: dict[str, View] = views
        self.tensors = {name: Stored(view.storage.dtype, view.shape) for name, view in views.items()}

    def read(self, name: str) -> np.ndarray:
        storage, offset, shape, strides = self._views[name]
        size, start = storage.dtype.itemsize, self._offsets[storage.key]
        if strides == contiguous(shape):
            return self._data.array(Stored(storage.dtype, shape), start + offset * size)
        flat = self._data.array(Stored(storage.dtype, (storage.length,)), start)
        return np.lib.stride_tricks.as_strided(flat[offset:], shape, [size * stride for stride in strides])


def is_zip(path: Path) -> bool:
    """Whether this is the format of PyTorch 1.6 and later; only PyTorch can read the format before it."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _is_legacy(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x80\x02"  # pickle protocol 2, as torch.save has always written


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous array of this shape, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _contents(path: Path) -> tuple[Any, dict[str, int], str]:
    """What the pickle describes, with every tensor checked against its storage; each storage's offset in the file; the
    archive's top-level folder.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        members = {}
        for info in archive.infolist():
            _, _, name = info.filename.partition("/")  # without the top-level folder
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
                raise ValueError(f"its member {name} is compressed, which PyTorch never does")
            if name in members:
                raise ValueError(f"its member {name} appears twice")
            members[name] = info
        if "data.pkl" not in members:
            raise ValueError("it has no data.pkl")
        if members["data.pkl"].file_size > LARGEST:
            raise ValueError("its data.pkl is too large")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError("its data is big-endian, which is not supported")
        reader = PickleReader()
        contents = reader.run(archive.read(members["data.pkl"]))
        size = file.seek(0, io.SEEK_END)
        offsets = {}
        for view in reader.views:
            storage = view.storage
            if storage.key not in offsets:
                if f"data/{storage.key}" not in members:
                    raise ValueError(f"its member data/{storage.key} is missing")
                info = members[f"data/{storage.key}"]
                file.seek(
                    info.header_offset + 26
                )  # the lengths of the name and the extra field, which come before the data
                offsets[storage.key] = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            held = members[f"data/{storage.key}"].file_size
            last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True))
            if storage.length * storage.dtype.itemsize > held or offsets[storage.key] + held > size:
                raise ValueError(f"its member data/{storage.key} is cut short")
            if math.prod(view.shape) and last >= storage.length:
                raise ValueError(f"a tensor of shape {view.shape} does not fit into its storage")
    return contents, offsets, members["data.pkl"].filename.partition("/")[0]


class PickleReader:
    """An interpreter for the opcodes of a pickled state dict."""

    def __init__(self) -> None:
        self.views: list[View] = []
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickle: bytes) -> Any:
        """Return what the pickle describes.

        Raises:
            ValueError: it holds anything but dictionaries, lists, strings, numbers and tensors. LookupError, TypeError:
                it is damaged.
        """
        for number, (code, argument, _) in enumerate(pickletools.genops(pickle)):
            if number == LONGEST:
                raise ValueError("the pickle in it is too long")
            if code.name == "STOP":
                return self._stack.pop()
            self._step(code.name, argument)
        raise ValueError("the pickle in it has no end")

    def _step(self, code: str, argument: Any) -> None:
        stack = self._stack
        match code:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[code])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._marks.append(len(stack))
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = 0 if code == "EMPTY_TUPLE" else int(code[-1])
                stack.append(tuple(self._popped(len(stack) - count)))
            case "TUPLE":
                stack.append(tuple(self._popped(self._marks.pop())))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                items = self._popped(len(stack) - 2 if code == "SETITEM" else self._marks.pop())
                stack[-1].update(pairs(items[::2], items[1::2]))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                items = self._popped(len(stack) - 1 if code == "APPEND" else self._marks.pop())
                stack[-1].extend(items)
            case "GLOBAL" | "STACK_GLOBAL":
                name = argument.replace(" ", ".") if code == "GLOBAL" else ".".join(self._popped(len(stack) - 2))
                stack.append(named(name))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                function, arguments = self._popped(len(stack) - 2)
                stack.append(self._made(function, arguments))
            case "BUILD":  # a state dict's _metadata
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise ValueError("it sets attributes of an object")
            case _:
                raise ValueError(f"the pickle in it uses {code}")

    def _popped(self, start: int) -> list[Any]:
        if not 0 <= start <= len(self._stack):
            raise ValueError("the pickle in it is damaged")
        popped = self._stack[start:]
        del self._stack[start:]
        return popped

    def _storage(self, said: Any) -> Storage:
        kind, (_, name), key, _, length = said
        texts = isinstance(name, str) and isinstance(key, str)
        if kind != "storage" or not texts or name not in STORAGES or not natural(length):
            raise ValueError("it points to an invalid storage")
        return Storage(key, np.dtype(STORAGES[name]), length)

    def _made(self, function: Any, arguments: tuple) -> Any:
        if function == ("torch._utils", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            sizes = (offset, *shape, *strides)
            if not isinstance(storage, Storage) or not len(shape) == len(strides) <= 8 or not all(map(natural, sizes)):
                raise ValueError("a tensor in it is damaged")
            self.views.append(View(storage, offset, tuple(shape), tuple(strides)))
            return self.views[-1]
        if function == ("torch._utils", "_rebuild_parameter") and isinstance(arguments[0], View):
            return arguments[0]
        if function == ("collections", "OrderedDict"):
            return dict(pairs(*zip(*arguments[0], strict=True))) if arguments and arguments[0] else {}
        raise ValueError("it makes a call that is not allowed")


def named(name: str) -> tuple[str, str]:
    """A global that a pickle names, as (module, name): never the object itself.

    Raises:
        ValueError: a state dict does not need it.
    """
    module, _, last = name.rpartition(".")
    if (module, last) in KNOWN or (module == "torch" and last in STORAGES):
        return module, last
    raise ValueError(f"it asks for {name}, which is neither a tensor nor a number")


def pairs(keys: Iterable[Any], values: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The items of a dictionary. Keys must be strings or integers: hashing deeply nested tuples crashes Python."""
    for key, value in zip(keys, values, strict=True):
        if not isinstance(key, str | int):
            raise ValueError(f"a key in it is a {type(key).__name__}")
        yield key, value


def natural(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63

"""torch.save's file format, written without torch: a zip of a pickled state dict and a plain member per tensor.

`pickles.py` reads it, and so does torch.load, with `mmap=True` and `weights_only=True` too.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

import numpy as np

from .pickles import contiguous
from .stored import Stored
from .write import Sink, pieces

STORAGES = {"float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
            "bfloat16": "BFloat16Storage"}  # fmt: skip
ALIGNMENT = 64  # bytes: where a tensor's data begins in the file, so that it can be used where it is mapped
HEADER, ZIP64 = 30, 20  # bytes of a zip member's header before its name, and of the field that long members add
LONG = 2**30  # bytes; zip itself needs the longer sizes from 2³² on, zipfile a little earlier


def torch_zip(sink: Sink, tensors: Mapping[str, Stored], read: Callable[[str], np.ndarray]) -> None:
    """The layout of torch.save's files, from front to back: checksums and sizes follow each member."""
    with zipfile.ZipFile(cast(IO[bytes], sink), "w") as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), pickled(tensors))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        for number, (name, stored) in enumerate(tensors.items()):
            with _member(archive, f"archive/data/{number}", stored.nbytes) as member:
                for piece in pieces(read(name), stored, name):
                    member.write(piece)
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def _member(archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
    """An uncompressed member whose data begins at a multiple of ALIGNMENT, behind a field of padding."""
    info = zipfile.ZipInfo(name)
    long = size >= LONG
    begins = cast(Any, archive.fp).tell() + HEADER + len(name) + 4 + (ZIP64 if long else 0)
    padding = -begins % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)  # "FB" is what torch.save calls it
    return archive.open(info, "w", force_zip64=long)


def pickled(tensors: Mapping[str, Stored]) -> bytes:
    """The state dict without the data: for each tensor a call of PyTorch's on the storage of its number.

    Written opcode by opcode, since pickling those calls in the usual way would need PyTorch to be there.
    """
    out = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK]
    for number, (name, stored) in enumerate(tensors.items()):
        if stored.dtype.name not in STORAGES:
            raise ValueError(f"{name} is {stored.dtype}, which is not written here; writable are {', '.join(STORAGES)}")
        out += [
            _plain(name),
            pickle.GLOBAL, b"torch._utils\n_rebuild_tensor_v2\n", pickle.MARK,
            # the storage: ("storage", its class, its number, where to, how many elements)
            pickle.MARK, _plain("storage"), pickle.GLOBAL, f"torch\n{STORAGES[stored.dtype.name]}\n".encode(),
            _plain(str(number)), _plain("cpu"), _plain(math.prod(stored.shape)), pickle.TUPLE, pickle.BINPERSID,
            # where in it, shape, strides, requires_grad, hooks
            _plain(0), _plain(stored.shape), _plain(contiguous(stored.shape)), pickle.NEWFALSE,
            pickle.GLOBAL, b"collections\nOrderedDict\n", pickle.EMPTY_TUPLE, pickle.REDUCE,
            pickle.TUPLE, pickle.REDUCE,
        ]  # fmt: skip
    return b"".join([*out, pickle.SETITEMS, pickle.STOP])


def _plain(value: str | int | tuple[int, ...]) -> bytes:
    """The opcodes of a value of Python's own, without a pickle's beginning and end."""
    return pickle.dumps(value, 2)[2:-1]

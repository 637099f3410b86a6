"""What a compiled kernel is made of: its registers, its spills, its matrix instructions, the width of its loads.

Read from the machine code itself, with the tools that come inside Triton's wheel (NVIDIA) or from the assembly that
LLVM leaves behind (AMD). It says nothing about whether a kernel is right, or how fast: only what it was built into.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.knobs import nvidia
from triton.runtime.cache import get_cache_manager

# The most shared memory that one program may have, in bytes.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_MEMORY = 512  # columns, on sm_100
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
_SEEN = "seen-4.json"  # another number where `inspect` learns to see something else


def inspect(kernel: Any, target: str) -> dict[str, Any]:
    """The facts about a `CompiledKernel`. They are kept beside it in Triton's cache: disassembling takes a while."""
    cache = get_cache_manager(kernel.hash)
    if kept := cache.get_file(_SEEN):
        facts = json.loads(Path(kept).read_text())
    else:
        facts = _amd(kernel) if target.startswith("gfx") else _nvidia(kernel, target)
        cache.put(json.dumps(facts), _SEEN, binary=False)
    metadata = kernel.metadata
    return facts | {
        "shared_bytes": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "scratch_bytes": getattr(metadata, "global_scratch_size", None) or 0,
    }


def _nvidia(kernel: Any, target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        usage = _tool(nvidia.cuobjdump.path, "--dump-resource-usage", path)
        count = Counter(_INSTRUCTION.findall(_tool(nvidia.nvdisasm.path, "-c", path)))
    resources = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    families: Counter[str] = Counter()
    for instruction, times in count.items():
        families[instruction.partition(".")[0]] += times
    matrix = [name for name in ("UTCHMMA", "HGMMA", "HMMA") if families[name]]
    loads = {name: times for name, times in count.items() if name.startswith(("LDG", "LDGSTS"))}
    return {
        "registers": resources["REG"],
        "spills": resources["STACK"] + resources["LOCAL"] + families["STL"] + families["LDL"],
        "mma": matrix[0] if matrix else None,
        "fp64": sum(families[name] for name in ("DADD", "DMUL", "DFMA", "DSETP", "DMMA")),
        "wide_loads": sum(times for name, times in loads.items() if ".128" in name) + families["UTMALDG"],
        "narrow_loads": sum(times for name, times in loads.items() if re.search(r"\.[US](8|16)\b", name)),
        "serialized": "HGMMA" in matrix and _is_serialized(kernel, target),
        "instructions": sum(count.values()),
    }


def _is_serialized(kernel: Any, target: str) -> bool:
    """Whether ptxas makes Hopper's asynchronous products wait for one another; it says so only when asked again."""
    architecture = int(target.removeprefix("sm_"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        name = f"--gpu-name={sm_arch_from_capability(architecture)}"
        return "serialized" in _tool(get_ptxas(architecture).path, "-v", name, source, "-o", source.with_suffix(".o"))


def _tool(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {done.stderr.strip()[-300:]}")
    return done.stdout + done.stderr


def _amd(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    # Scalars that spill go to lanes of a vector register, not to memory: they do not count.
    loads = Counter(re.findall(r"^\s+(?:global|buffer)_load_(\w+)", code, re.MULTILINE))
    return {
        "registers": note("vgpr_count"),
        "spills": note("vgpr_spill_count") + note("private_segment_fixed_size"),
        "mma": "MFMA" if re.search(r"^\s+v_mfma", code, re.MULTILINE) else None,
        "fp64": len(re.findall(r"^\s+v_\w+_f64\b", code, re.MULTILINE)),
        "wide_loads": loads["dwordx4"],
        "narrow_loads": sum(times for name, times in loads.items() if "short" in name or "byte" in name),
        "serialized": False,
        "instructions": len(re.findall(r"^\s+[vs]_", code, re.MULTILINE)),
    }

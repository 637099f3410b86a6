"""Inspect a compiled kernel: its registers, its spills, its matrix instructions, the width of its loads.

The facts come from the machine code, read with the tools in Triton's wheel (NVIDIA), or from LLVM's assembly (AMD).
They say how a kernel was compiled, not whether it is correct or fast.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.knobs import nvidia
from triton.runtime.cache import get_cache_manager

# The maximum shared memory of one program, in bytes.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
TENSOR_MEMORY = 512  # columns, on sm_100


class Chip(NamedTuple):
    """The resources of one multiprocessor (SM, CU), and the peak rates of the whole GPU from its data sheet.

    warps, programs: the maximum resident at once. shared: bytes, of which each program takes `reserved` more than it
    requests. halves, floats: TFLOP/s of dense products in bfloat16, and in float32. memory: TB/s.
    """

    name: str
    warps: int
    programs: int
    shared: int
    reserved: int
    halves: float
    floats: float
    memory: float


# CUDA C++ Programming Guide, "Technical specifications per compute capability"; CDNA 3's ISA; the vendors' data sheets.
CHIPS = {
    "sm_80": Chip("A100 80GB SXM", 64, 32, 167936, 1024, 312, 19.5, 2.039),
    "sm_89": Chip("L40S", 48, 24, 102400, 1024, 362, 91.6, 0.864),
    "sm_90": Chip("H100 SXM", 64, 32, 233472, 1024, 989, 67, 3.35),
    "sm_100": Chip("B200", 64, 32, 233472, 1024, 2250, 80, 8.0),
    "gfx942": Chip("MI300X", 32, 32, 65536, 0, 1307, 163.4, 5.3),
}


def occupancy(target: str, registers: int, warps: int, shared_bytes: int) -> float:
    """The warps that fit on a multiprocessor, given their registers and shared memory, as a fraction of the maximum.

    NVIDIA: 65,536 registers of 4 bytes, allocated in units of 256 per warp, warps in fours. AMD: 512 vector registers
    per lane of a SIMD, in units of 8, four SIMDs.
    """
    chip = CHIPS[target]
    if target.startswith("gfx"):
        by_registers = 4 * (512 // (-(-max(registers, 1) // 8) * 8))
    else:
        by_registers = 65536 // (-(-max(registers, 1) * 32 // 256) * 256) // 4 * 4
    programs = min(by_registers // warps, chip.warps // warps, chip.programs)
    if shared_bytes + chip.reserved:
        programs = min(programs, chip.shared // (shared_bytes + chip.reserved))
    return programs * warps / chip.warps


def roofline(target: str, moved: int, flops: int, halves: bool) -> dict[str, Any]:
    """A call's place in the data sheet's roofline model (Williams et al. 2009): its FLOP per byte, and its bound."""
    chip = CHIPS[target]
    peak, intensity = chip.halves if halves else chip.floats, flops / moved
    return {
        "chip": chip.name, "intensity": round(intensity, 3), "ridge": round(peak / chip.memory, 1),
        "bound": "memory" if intensity < peak / chip.memory else "arithmetic",
        "floor_us": float(f"{max(moved / chip.memory, flops / peak) / 1e6:.4g}"),
    }  # fmt: skip


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
_SEEN = "seen-5.json"  # increment when `inspect` reports something new


def inspect(kernel: Any, target: str) -> dict[str, Any]:
    """The facts about a `CompiledKernel`, stored next to it in Triton's cache because disassembling is slow."""
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
        # -ndf skips data-flow analysis, which is slow and changes no instruction
        code = _INSTRUCTION.findall(_tool(nvidia.nvdisasm.path, "-c", "-ndf", path))
        count = Counter(code)
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
        **_asynchrony(kernel.asm["ptx"]),
        "instructions": sum(count.values()),
    }


def _asynchrony(ptx: str) -> dict[str, Any]:
    """What a Hopper kernel does asynchronously, judged by the order of its instructions.

    overlapped: whether exponentials come between a wait that leaves a product in flight and the next product or wait.
    register_moves: how often warps reallocate registers. unguarded_arrivals: arrivals at barriers in shared memory, by
    one thread on behalf of several warps, that do not directly follow a synchronisation of those warps.
    """
    words = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+\d|wgmma\.mma_async|ex2\.approx|setmaxnreg|bar\.sync"
                       r"|mbarrier\.arrive\.shared|mbarrier\.try_wait", ptx)  # fmt: skip
    pairs = list(pairwise(words))
    work = pairwise(word for word in words if word.startswith(("wgmma", "ex2")))
    return {
        "overlapped": any(re.search(r"wait_group.*[1-9]", a) and b == "ex2.approx" for a, b in work),
        "register_moves": words.count("setmaxnreg"),
        "unguarded_arrivals": sum(b == "mbarrier.arrive.shared" and a != "bar.sync" for a, b in pairs),
    }


def _is_serialized(kernel: Any, target: str) -> bool:
    """Whether ptxas serialises Hopper's asynchronous products, which it only reports when run again with -v."""
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

    # Scalar registers spill to lanes of a vector register, not to memory: they do not count.
    loads = Counter(re.findall(r"^\s+(?:global|buffer)_load_(\w+)", code, re.MULTILINE))
    return {
        "registers": note("vgpr_count"),
        "spills": note("vgpr_spill_count") + note("private_segment_fixed_size"),
        "mma": "MFMA" if re.search(r"^\s+v_mfma", code, re.MULTILINE) else None,
        "fp64": len(re.findall(r"^\s+v_\w+_f64\b", code, re.MULTILINE)),
        "wide_loads": loads["dwordx4"],
        "narrow_loads": sum(times for name, times in loads.items() if "short" in name or "byte" in name),
        "serialized": False,
        **_asynchrony(""),
        "instructions": len(re.findall(r"^\s+[vs]_", code, re.MULTILINE)),
    }

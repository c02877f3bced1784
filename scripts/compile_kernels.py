"""Compile every Triton kernel ahead of time for sm_80 and sm_90; needs no GPU. Run by `make kernels`.

Each module of kernels/ lists its configurations in ``compile_targets()``. For each one the table shows the shared
memory it needs against what a block may have, and registers and spilled bytes a thread. Exit status 1 if one does not
compile, does not fit, or spills more than a few values.

"capabilities" among the options of a configuration: the targets it is meant for, all of them where it is absent.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Bytes of shared memory a block may use, CUDA C programming guide, table of technical specifications.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
# Registers a thread may have; beyond them values spill to local memory. Eight four-byte values, loaded once a tile
# outside the loop of the products, cost nothing that counts; more would.
REGISTER_LIMIT = 255
SPILL_LIMIT = 32
LAUNCH = ("num_warps", "num_stages")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_one(kernel, signature, constants, options, capability):
    """The compiled kernel; pointers that are None in ``signature`` are absent."""
    absent = {name: None for name, kind in signature.items() if kind is None}
    tuning = {name: value for name, value in options.items() if name not in (*LAUNCH, "capabilities")}
    values = {**absent, **constants, **tuning}
    full = {name: "constexpr" if name in values else signature[name] for name in kernel.arg_names}
    # Pointers, row strides and widths are multiples of 16, as the allocator, tile_shape and models make them; counts
    # that vary from batch to batch are not specialised.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in values and name.endswith(("_ptr", "_stride")) and not kernel.params[i].do_not_specialize
    }
    source = ASTSource(fn=kernel, signature=full, constexprs=values, attrs=attributes)
    launch = {name: value for name, value in options.items() if name in LAUNCH}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def resources(compiled):
    """(registers, spilled bytes) a thread, from the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as stream:
        stream.write(compiled.asm["cubin"])
        stream.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", stream.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]  # ptxas puts what it spills on the stack


def main() -> int:
    failures = 0
    print(f"{'kernel':<86} {'target':<7} {'shared':>8} {'limit':>8} {'registers':>9} {'spilled':>8}")
    for path in sorted(Path(__file__).resolve().parent.parent.joinpath("kernels").glob("*.py")):
        module = importlib.import_module(f"hiexp.kernels.{path.stem}")
        for kernel, signature, constants, options in module.compile_targets():
            flags = " ".join(name.lower() for name, value in constants.items() if value is True)
            label = f"{path.stem}.{kernel.__name__} {next(iter(signature.values())).lstrip('*')} {flags}".strip()
            for capability in options.get("capabilities", SHARED_LIMIT):
                limit = SHARED_LIMIT[capability]
                try:
                    compiled = compile_one(kernel, signature, constants, options, capability)
                except Exception as error:  # whatever the compiler raises, the others are still worth trying
                    print(f"{label:<86} sm_{capability}   FAILED: {error}")
                    failures += 1
                    continue
                shared, (registers, spilled) = compiled.metadata.shared, resources(compiled)
                fits = shared <= limit and registers <= REGISTER_LIMIT and spilled <= SPILL_LIMIT
                failures += not fits
                row = f"{label:<86} sm_{capability:<4} {shared:>8} {limit:>8} {registers:>9} {spilled:>8}"
                print(row if fits else f"{row}  TOO MUCH", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

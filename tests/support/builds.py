"""What the GPU compilers make of every kernel, found out without a GPU: `python -m tests.support.builds [--all]`.

The operations run on CPU tensors as they would on CUDA tensors, but every launch only compiles, for a chip that is not there:
so each kernel is built with the very arguments, constants and alignments that a real call gives it. Nothing is computed, and
what the operations return means nothing. One JSON object for every build goes to standard output.

It needs a process of its own: Triton's interpreter, which the tests run in, is chosen when a kernel is defined.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

CHIPS = {80: "A100", 90: "H100", 100: "B200"}
MODULES = (
    *("attention_forward", "attention_backward", "ghost_norm_triton"),
    *("clipped_sum_triton", "linear_cross_entropy_triton", "keystream_triton"),
)
# Matrix instructions by what PTX calls them, newest first.
MATRIX_UNITS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}
Call = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Build:
    """One kernel, compiled. registers: of a thread. stack: bytes of a thread in local memory. spills: bytes that it moves there
    and back for want of registers.

    shared: bytes of a block. units: matrix instructions in it. default: of the configuration that has to work everywhere.
    """

    call: str
    kernel: str
    configuration: str
    chip: int
    registers: int
    stack: int
    spills: int
    shared: int
    units: str
    default: bool


class Chip:
    """What Triton asks of a device: one of this compute capability, that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


def attention(
    dim: int, dtype: torch.dtype, *, words: int = 0, backward: bool = True, value_dim: int | None = None, **options: Any
) -> None:
    """Forward and backward pass of attention; words: of a privatised one's key."""
    from dp_flash_hf.kernels.attention import flash_attention
    from dp_flash_hf.kernels.types import Release, SegmentTable

    heads, kv_heads, length, value_dim = 4, 2, 512, value_dim or dim
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    # As models lay them out: (batch, length, heads, width).
    query, key, value = (torch.zeros(1, length, *size, dtype=dtype).requires_grad_() for size in sizes)
    release = Release(torch.ones(kv_heads), torch.ones(heads), tuple(range(words))) if words else None
    out = flash_attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        segments=SegmentTable.whole(1, length, length, "cpu"),
        release=release,
        **options,
    )
    if backward:
        out.backward(torch.zeros_like(out))


def attention_calls(everything: bool) -> Iterator[tuple[str, Call]]:
    for dim in (64, 128):
        plain = partial(attention, dim, torch.bfloat16, causal=True)
        yield f"attention {dim}", plain
        yield f"attention {dim}, Philox", partial(plain, words=2)
        yield f"attention {dim}, ChaCha20", partial(plain, words=8, backward=False)  # which noise it was is nothing to it
    if not everything:
        return
    features = {
        "not causal": {},
        "window": {"causal": True, "window": 128},
        "window, not causal": {"window": 128},
        "softcap": {"causal": True, "softcap": 30.0},
        "dropout": {"causal": True, "dropout": 0.1, "dropout_key": (1, 2)},
        "sinks": {"causal": True, "sinks": torch.zeros(4)},
        "value of 64": {"causal": True, "value_dim": 64},
    }
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for dim in (16, 24, 32, 64, 80, 96, 128, 192, 256):
            yield f"attention {dim} {name}", partial(attention, dim, dtype, causal=True)
            yield f"attention {dim} {name}, Philox", partial(attention, dim, dtype, causal=True, words=2)
    for feature, options in features.items():
        for dim in (64, 128):
            yield f"attention {dim}, {feature}", partial(attention, dim, torch.bfloat16, **options)  # type: ignore[arg-type]


def recorded_calls(everything: bool) -> Iterator[tuple[str, Call]]:
    """Norms and clipped sums of what layers record, and cross entropies, as the dispatching modules launch them."""
    from dp_flash_hf.kernels import clipped_sum_triton, ghost_norm_triton, keystream_triton, linear_cross_entropy_triton
    from dp_flash_hf.kernels.types import Head

    sizes, factors = (512, 500), torch.zeros(2)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32"), *([(torch.float16, "fp16")] if everything else [])):
        a, g = torch.zeros(sum(sizes), 1024, dtype=dtype), torch.zeros(sum(sizes), 2048, dtype=dtype)
        ids, table = torch.zeros(sum(sizes), dtype=torch.long), torch.zeros(4096, 2048)
        for count in (1, 3):  # output gradients of layers that share an input
            yield f"ghost norm of {count}, {name}", partial(ghost_norm_triton.linear_squared_norms, a, [g] * count, sizes, 505)
        yield f"gradients of units, {name}", partial(ghost_norm_triton.unit_gradients, a, g, sizes)
        yield f"embedding norm, {name}", partial(ghost_norm_triton.embedding_squared_norms, ids, g, sizes)
        yield f"clipped sum, {name}", partial(clipped_sum_triton.add_linear_, torch.zeros(2048, 1024), a, g, factors, sizes)
        yield f"clipped embedding, {name}", partial(clipped_sum_triton.add_embedding_, table, ids, g, factors, sizes)
        # Under autocast the weights stay in float32.
        for weight in dict.fromkeys((dtype, torch.float32)):
            head = Head(torch.zeros(4096, 1024, dtype=weight))
            logits = (a, head, ids, torch.zeros(len(a)), torch.zeros(len(a)))
            kind = name if weight == dtype else f"{name}, weights fp32"
            yield f"log-sum-exp, {kind}", partial(linear_cross_entropy_triton.log_sum_exp, a, head)
            yield f"logit gradients, {kind}", partial(linear_cross_entropy_triton.logit_gradients, *logits, 0, 4096)
    gradients = torch.zeros(2, 64, 64)
    yield "keystream", partial(keystream_triton.chacha_stream, [0] * 8, 1, 2**16, torch.device("cpu"))
    yield "clipped per-unit gradients", partial(clipped_sum_triton.add_per_unit_, gradients[0].clone(), gradients, factors)


def compile_call(call: str, capability: int, everything: bool) -> list[Build]:
    """Every kernel that a call launches: in its default configuration, or in each that could be chosen."""
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    found: list[Build] = []
    default = True
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        found.append(_described(call, kernel, compiled, kwargs, capability, default))
        return compiled

    def each_configuration(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal default
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        configurations = tuner.prune_configs(kwargs)
        for number, configuration in enumerate(configurations if everything else configurations[:1]):
            default = number == 0
            compiled = tuner.fn.run(*args, **kwargs, **configuration.all_kwargs())
        default = True
        return compiled

    JITFunction.run, Autotuner.run = compile_only, each_configuration
    driver.set_active(Chip(capability))
    try:
        dict([*attention_calls(everything), *recorded_calls(everything)])[call]()
    except Exception:  # Triton's errors cannot be sent to another process, which would wait for them in vain
        raise RuntimeError(f"{call} for {CHIPS[capability]}:\n{traceback.format_exc()}") from None
    finally:
        JITFunction.run = launch
    return list(dict.fromkeys(found))


def _described(call: str, kernel: Any, compiled: Any, kwargs: dict[str, Any], capability: int, default: bool) -> Build:
    usage = _resource_usage(compiled.asm["cubin"])
    options = ("num_warps", "num_stages", "maxnreg")
    blocks = {name: value for name, value in kwargs.items() if name.isupper() and type(value) is int}
    chosen = {**blocks, **{name: getattr(compiled.metadata, name) for name in options if getattr(compiled.metadata, name)}}
    return Build(
        call=call,
        kernel=kernel.__name__,
        configuration=" ".join(f"{name}={value}" for name, value in chosen.items()),
        chip=capability,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        spills=_spills(compiled.asm["ptx"], capability) if usage["STACK"] + usage["LOCAL"] else 0,
        shared=compiled.metadata.shared,
        units=next((unit for name, unit in MATRIX_UNITS.items() if name in compiled.asm["ptx"]), ""),
        default=default,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL, ... of the one kernel in a cubin."""
    from triton import knobs

    return {
        name: int(number)
        for name, number in re.findall(r"\b([A-Z]+):(\d+)", _asked(knobs.nvidia.cuobjdump, cubin, "-res-usage"))
    }


def _spills(ptx: str, capability: int) -> int:
    """Bytes that spills store and load: other things stand on the stack too."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    printed = _asked(get_ptxas(capability), ptx.encode(), "-v", f"--gpu-name={target}", "--output-file=/dev/stdout")
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", printed))


def _asked(tool: Any, code: bytes, *options: str) -> str:
    """What one of NVIDIA's tools, as Triton carries them, says of some code."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(code)
        file.flush()
        done = subprocess.run([tool.path, *options, file.name], capture_output=True, check=True)
    return (done.stdout + done.stderr).decode(errors="replace")


def kernels() -> set[str]:
    """Names of the kernels of all modules: Triton functions that no other Triton function calls."""
    from triton.runtime.jit import JITFunction

    defined: dict[str, Any] = {}
    for name in MODULES:
        for value in vars(importlib.import_module(f"dp_flash_hf.kernels.{name}")).values():
            while hasattr(value, "fn") and not isinstance(value, JITFunction):
                value = value.fn  # an autotuner around it
            if isinstance(value, JITFunction):
                defined[value.__name__] = value
    used = {
        node.func.id
        for function in defined.values()
        for node in ast.walk(ast.parse(function.src))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return defined.keys() - used


def main() -> None:
    """Compile everything on every core, and print a line for every build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration, head width, dtype and feature")
    everything = parser.parse_args().all
    assert "TRITON_INTERPRET" not in os.environ, "kernels are not compiled in the interpreter"
    calls = [name for name, _ in [*attention_calls(everything), *recorded_calls(everything)]]
    print(json.dumps(sorted(kernels())))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        work = [(name, chip) for chip in sorted(CHIPS, reverse=True) for name in calls]
        for builds in pool.map(compile_call, *zip(*work, strict=True), [everything] * len(work)):
            for build in builds:
                print(json.dumps(asdict(build)))
    sys.stdout.flush()


if __name__ == "__main__":
    main()

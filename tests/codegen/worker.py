"""Compiles every case for the card in a process of its own, and reports what was generated.

    python worker.py check OUT.json        the checker's verdict on every kernel
    python worker.py run OUT.json          the kernels run by Triton's interpreter, beside eager (TRITON_INTERPRET=1)
"""

import json
import sys
import traceback

import torch
from cases import CASES
from torch._subclasses import FakeTensorMode

from gcu_compile.backend import LoweringPass
from gcu_compile.codegen import cross_private, device, sources_private
from gcu_compile.kernels.tolerance import tolerance
from gcu_compile.options import resolve
from gcu_compile.targets.legality import Specimen, check_kernel

OPTIONS = resolve({"target": "gcu300"})


def source_of(function, shapes):
    with FakeTensorMode():
        arguments = {
            name: torch.empty(shape, dtype=torch.int64 if dtype == "distinct" else dtype, device="gcu")
            for name, (shape, dtype) in zip(function.__code__.co_varnames, shapes, strict=False)
        }
        gm, inputs = cross_private.capture(function, arguments)
        source = cross_private.generate(gm, inputs, LoweringPass(OPTIONS, "gcu300")).source
        order = [node.target.strip("_")[2:] for node in gm.graph.nodes if node.op == "placeholder"]
        return source, order


def values(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape, dtype in shapes:
        if dtype == "distinct":
            made.append(torch.randperm(20, generator=generator)[: shape[0]])
        elif dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator).to(dtype))
        elif dtype == torch.bool:
            made.append(torch.rand(shape, generator=generator) < 0.7)
        else:
            made.append(torch.randint(0, 8, shape, generator=generator, dtype=dtype))
    return made


def check(source):
    kernels = sources_private.kernels_of(source)
    calls = sources_private.calls_of(source)
    found = []
    for kernel in kernels.values():
        types = {name: kind for name, kind in kernel.signature.items() if name not in kernel.constexprs}
        specimen = Specimen(
            kernel.function, types, kernel.constexprs, kernel.grid, kernel.num_warps, 3, kernel.values, kernel.name
        )
        found.append(check_kernel(specimen, device.current().profile).as_dict() | {"text": kernel.text})
    return {"kernels": found, "calls": [call.target for call in calls]}


def run(source, arguments):
    """The wrapper's result with its device replaced by the CPU."""
    text = source.replace("device='gcu'", "device='cpu'").replace("device='gcu:0'", "device='cpu'")
    text = text.replace("import gcu_compile.codegen.runtime as gcu_runtime", "import interpreted as gcu_runtime")
    text = text.replace("from gcu_compile.codegen.runtime import", "from interpreted import")
    text = text.replace("device(type='gcu', index=0)", "device(type='cpu')")
    text = text.replace("async_compile = AsyncCompile()", "import interpreted; async_compile = interpreted.Compile()")
    scope = {"__name__": "generated"}
    exec(compile(text, "generated", "exec"), scope)
    return scope["call"](arguments)


def compare(source, order, function, shapes):
    """Against float64: the same function on the same values, widened."""
    arguments = dict(zip(function.__code__.co_varnames, values(shapes), strict=False))
    wide = [a.double() if a.is_floating_point() else a for a in arguments.values()]
    expected = function(*wide)
    expected = expected if isinstance(expected, tuple) else (expected,)
    actual = run(source, [arguments[at].clone() for at in order])
    found = []
    for want, got in zip(expected, actual, strict=True):
        assert want.shape == got.shape, (want.shape, got.shape)
        if not got.dtype.is_floating_point:
            assert got.dtype == want.dtype, (got.dtype, want.dtype)
            if got.dtype == torch.int8:
                # A value halfway between two steps may round either way.
                assert (got.int() - want.int()).abs().max() <= 1
            else:
                assert torch.equal(got, want), (got, want)
        else:
            length = max(shape[-1] if shape else 1 for shape, _ in shapes)
            length = max(length, *(shape[0] if shape else 1 for shape, _ in shapes))
            scale = max(1.0, float(want[want.isfinite()].abs().max()))
            floats = [a.dtype for a in (*arguments.values(), got) if a.is_floating_point()]
            bound = tolerance(min(floats, key=lambda dtype: dtype.itemsize), length, scale)
            torch.testing.assert_close(got.double(), want.double(), **bound)
        found.append(str(got.dtype))
    return found


def main(mode, out, names):
    device.register("gcu300")
    results = {}
    if mode == "check":
        try:
            source_of(CASES["scalar"][0], [((70000, 40000), torch.bfloat16)])
        except Exception:
            results["too_large"] = {"error": traceback.format_exc()}
    for name in names or CASES:
        function, shapes = CASES[name]
        try:
            source, order = source_of(function, shapes)
            results[name] = check(source) if mode == "check" else compare(source, order, function, shapes)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    with open(out, "w") as stream:
        json.dump(results, stream)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

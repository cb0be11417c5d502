"""Where the pointers are in the C++ functions' structures, read from their sources."""

import re

import pytest

from gcu_compile.kernels.host import build
from gcu_compile.kernels.host.calls import layouts

# (library, function) -> the source that declares its structure, and the structure's name.
SOURCES = {
    ("attention", "gcu_attention"): ("attention/arguments.h", "Arguments"),
    ("rope", "gcu_rope_and_cache"): ("rope.cpp", "Arguments"),
    ("linear", "gcu_linear"): ("linear.cpp", "Arguments"),
    ("dequant_gemm", "gcu_dequant_gemm"): ("gemm/layer.h", "Arguments"),
    ("int8_gemm", "gcu_int8_gemm"): ("gemm/int8_product.h", "Arguments"),
    ("int8_gemm", "gcu_quantize"): ("int8_gemm.cpp", "Quantize"),
    ("prologues", "gcu_prologue"): ("prologues.cpp", "Arguments"),
}
BYTES = {"int64_t": 8, "double": 8, "int32_t": 4}


def fields(text, name):
    """(bytes, whether it is a pointer) of each field of `struct name`, those of structures within in their place."""
    (body,) = re.findall(rf"^struct {name} \{{\n(.*?)^\}};", text, re.MULTILINE | re.DOTALL)
    body = re.sub(r"//.*", "", body)
    for statement in filter(str.strip, body.split(";")):
        first, *more = statement.replace("const ", "").strip().split(",")
        kind, _, variable = re.fullmatch(r"(\w+)(\s*)(\**\s*\w+)", first.strip(), re.DOTALL).groups()
        for one in (variable, *more):
            if "*" in one:
                yield 8, True
            elif kind in BYTES:
                yield BYTES[kind], False
            else:
                yield from fields(text, kind)


@pytest.mark.parametrize("key", layouts(), ids=lambda key: key[1])
def test_layouts_are_those_of_the_sources(key):
    file, name = SOURCES[key]
    at, addresses = 0, []
    for size, pointer in fields((build.HERE / file).read_text(), name):
        assert at % size == 0, "the compiler would leave a hole here"
        addresses += [at] if pointer else []
        at += size
    layout = layouts()[key]
    assert sorted(layout.addresses) == addresses
    assert layout.size in (at, at + -at % 8)
    returns = re.search(rf'extern "C" (\w+) {key[1]}\(', (build.HERE / f"{key[0]}.cpp").read_text())[1]
    assert layout.returns_status == (returns == "int32_t")

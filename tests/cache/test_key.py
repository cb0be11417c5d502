"""The cache key: one test per ingredient, each of which must change the key and be named by `differences`."""

import pytest
import torch

import gcu_compile
from gcu_compile import torch_private
from gcu_compile.cache import key
from gcu_compile.options import resolve


def gated(x, y):
    return torch.nn.functional.silu(x) * y


def traced(fn=gated, *args, **options):
    """The key's ingredients of the graph that Dynamo makes of `fn`."""
    found = []

    def backend(gm, inputs):
        effective = resolve(options, {})
        found.append(key.code_ingredients(effective, "host") | key.graph_ingredients(gm, inputs))
        return gm

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*(args or (torch.ones(2, 3), torch.ones(2, 3))))
    return found[-1]


def changed(other, base=None):
    base = base or traced()
    assert (key.key_of(base) == key.key_of(other)) == (not key.differences(base, other))
    return set(key.differences(base, other))


class Wrapped(torch.Tensor):
    """A tensor that stands for another, as quantised weights do."""

    @staticmethod
    def __new__(cls, inner, how):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner, how):
        self.inner, self.how = inner, how

    def __repr__(self):
        return "Wrapped"

    def __tensor_flatten__(self):
        return ["inner"], {"how": self.how}

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wrapped(inner["inner"], context["how"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function}: a description reads no numbers")


class Other(Wrapped):
    pass


def test_what_a_wrapper_holds_and_how():
    """Two kinds of quantised weights look alike from outside: one graph of Dynamo's, and not one of ours."""
    one, eight = torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.int8)
    made = [Wrapped(one, "a"), Wrapped(eight, "a"), Wrapped(one, "b"), Other(one, "a"), one]
    texts = {key.describe(value) for value in made}
    assert len(texts) == len(made), texts
    assert key.describe(Wrapped(torch.ones(3, 4), "a")) in texts


def test_the_same_graph_has_the_same_key():
    assert not changed(traced())


def test_package(monkeypatch):
    base = traced()
    monkeypatch.setattr(gcu_compile, "__version__", "9")
    assert changed(traced(), base) == {"package"}


def test_torch(monkeypatch):
    base = traced()
    monkeypatch.setattr(torch, "__version__", "9")
    assert changed(traced(), base) == {"torch"}


def test_triton(monkeypatch):
    base = traced()
    monkeypatch.setattr(torch_private, "triton_version", lambda: "9")
    assert changed(traced(), base) == {"triton"}


def test_target():
    options = resolve({}, {})
    found = key.differences(key.code_ingredients(options, "host"), key.code_ingredients(options, "cuda"))
    assert found == {"target": ("host", "cuda")}


def test_target_profile(tmp_path):
    override = tmp_path / "mine.yaml"
    keys = []
    for value in (1, 2):
        override.write_text(f"default_warps: {value}\n")
        options = resolve({"target_profile": str(override)}, {})
        keys.append(key.code_ingredients(options, "gcu300"))
    assert set(key.differences(*keys)) == {"target_profile"}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("disable_rules", ["noop_view"]),
        ("disable_steps", ["canonicalise"]),
        ("disable_matches", ["noop_view@0"]),
        ("post_processing_dtype", "float32"),
        ("shadow", "float64"),
        ("host_isa", "portable"),
        ("attention", "gcu"),
    ],
)
def test_options_that_change_code(option, value):
    assert {name.split(".")[1] for name in changed(traced(**{option: value}))} == {option}


def test_options_that_do_not_change_code():
    assert not changed(traced(log_stats=True, shadow_dir="x", check_invariants=False))


def test_sources(monkeypatch):
    base = traced()
    assert "lowering/pipeline.py" in base["sources"] and "kernels/host/sample.cpp" in base["sources"]
    monkeypatch.setattr(key, "source_hashes", lambda: base["sources"] | {"kernels/host/sample.cpp": "edited"})
    assert changed(traced(), base) == {"sources.kernels/host/sample.cpp"}


def test_inductor_settings():
    base = traced()
    with torch._inductor.config.patch(max_fusion_size=7):
        assert changed(traced(), base) == {"inductor.max_fusion_size"}


def test_graph():
    assert changed(traced(lambda x, y: torch.nn.functional.silu(x) + y)) >= {"graph.hash"}


def test_graph_at_another_line_is_another_entry():
    """The report names source lines."""
    source = "import torch\n\ndef gated(x, y):\n    return torch.sin(x) * y\n"
    found = []
    for text in (source, "\n" + source):
        space = {}
        exec(compile(text, "somewhere.py", "exec"), space)
        found.append(traced(space["gated"]))
    assert found[0]["graph"] != found[1]["graph"]


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 3).bfloat16(), torch.ones(3, 2).t(), torch.ones(2, 3, requires_grad=True), torch.ones(1, 3)],
    ids=["dtype", "strides", "gradient", "shape"],
)
def test_inputs(x):
    assert any(name.startswith("inputs.") for name in changed(traced(gated, x, torch.ones(2, 3))))


def test_range_of_a_symbol():
    found = []
    for limit in (64, 128):
        x, y = torch.ones(8, 3), torch.ones(8, 3)
        for value in (x, y):
            torch._dynamo.mark_dynamic(value, 0, min=2, max=limit)
        found.append(traced(gated, x, y))
    assert changed(found[1], found[0])


def test_mode():
    base = traced()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert changed(traced(), base) == {"mode.grad"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "mode.autocast" in changed(traced(), base)


def test_differences_name_what_is_missing():
    assert key.differences({"a": {"b": 1}}, {"a": {}}) == {"a.b": (1, None)}
    assert key.differences([1, 2], [1, 3], "x") == {"x.1": (2, 3)}
    assert key.differences([1], [1, 3], "x") == {"x": ([1], [1, 3])}


def test_layers_of_one_kind_share_a_key():
    class Layer(torch.nn.Module):
        def forward(self, x):
            return x.sin() * 2

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer() for _ in range(3)])

        def forward(self, x, index):
            return self.layers[index](x)

    found = []

    def backend(gm, inputs):
        found.append((key.key_of(key.graph_ingredients(gm, inputs)), key.layers_of(gm)))
        return gm

    for index in (0, 2):
        torch._dynamo.reset()
        torch.compile(Model(), backend=backend)(torch.ones(2), index)
    assert found[0][0] == found[1][0]
    assert [layers for _, layers in found] == [["layers.0"], ["layers.2"]]


def test_an_input_without_a_text_of_its_own_is_told_without_its_address():
    """vLLM hands a layer's name to a compiled piece as such an object; layers that are alike share an entry."""

    class Name:
        pass

    held = [Name(), Name()]
    assert key.describe(held[0]) == key.describe(held[1]) and "Name" in key.describe(held[0])

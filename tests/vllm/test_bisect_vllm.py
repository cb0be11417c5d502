"""`gcu-compile bisect MODEL --through vllm`: a wrong rule is named, with its layer, in O(log) engine starts."""

import json
import math
import subprocess
import sys

import pytest
from tiny import save_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
LAYERS = 3
PLANTED = """
import json
import sys

import torch

from gcu_compile.debug.bisect import script
from gcu_compile.lowering import pipeline
from gcu_compile.lowering.provenance import layer_of
from gcu_compile.lowering.rule import Rule
from gcu_compile.lowering.rules import all_rules
from vllm_integration.bisect import bisect

aten = torch.ops.aten


def build(graph, node, match):
    wrong = layer_of(node).endswith("layers.2.post_attention_layernorm")
    new = graph.call_function(aten.rsqrt.default, node.args)
    new.meta.update(node.meta)
    if not wrong:
        return new
    twice = graph.call_function(aten.mul.Tensor, (new, 2))
    twice.meta.update(node.meta)
    return twice


if __name__ == "__main__":
    rule = Rule("wrong_norm", "canonicalise", (aten.rsqrt.default,), lambda node: node, build, torch.rsqrt)
    pipeline.all_rules = lambda: (*all_rules(), rule)
    found = bisect(sys.argv[1], 16)
    again = bisect(sys.argv[1], 16, options=found.remedy)
    open(sys.argv[2], "w").write(json.dumps([found.to_json(), again.to_json()]))
"""


def test_a_planted_rule_is_named_with_its_layer(tmp_path):
    model = save_llama(tmp_path / "model", num_hidden_layers=LAYERS, eos_token_id=None, pad_token_id=None)
    (tmp_path / "planted.py").write_text(PLANTED)
    words = [sys.executable, str(tmp_path / "planted.py"), str(model), str(tmp_path / "found.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found, again = json.loads((tmp_path / "found.json").read_text())
    assert (found["kind"], found["rule"], found["step"]) == ("match", "wrong_norm", "canonicalise")
    assert found["layer"].endswith("layers.2.post_attention_layernorm") and found["error"] > 0
    # Steps, rules of a step, and places: six rules fire at most, the planted one twice a layer and once at the end.
    assert found["runs"] <= math.ceil(math.log2(3)) + math.ceil(math.log2(6)) + math.ceil(math.log2(2 * LAYERS + 1)) + 3
    assert again["kind"] == "nothing" and again["runs"] == 1

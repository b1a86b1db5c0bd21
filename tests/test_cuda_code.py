"""
What the compiler writes for a GPU, on a machine without one: few kernels, no copy of a transposed
tensor, few saved activations, no product computed twice, few bytes per logit.
"""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton"),
    pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler (install g++)"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What tests/cuda_code.py prints, by its arguments."""
    folder = tmp_path_factory.mktemp("guard")

    def run(*words: str) -> dict:
        command = [sys.executable, str(ROOT / "tests" / "cuda_code.py"), str(folder), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_chunk_of_the_loss_is_one_kernel(written):
    """Two passes over the logits and one over their gradients, 2 bytes each."""
    found = written("loss")
    code = found["forward"]
    assert (code["triton"], code["products"]) == (1, 1), code["names"]
    assert code["bytes_per_logit"] == 6
    assert found["peak"] < 4.1, "logits and their gradients at a time, in bytes per logit"


# config fields; Triton kernels forward and backward, products forward; units that are saved, that
# the backward pass needs besides them, and that kernels move
BLOCKS = {
    "dense": ({}, (11, 8), 6, (9.5, 4.2, 67)),
    "grouped, swiglu": ({"activation": "swiglu", "n_kv_head": 2}, (13, 9), 7, (12, 16.2, 74)),
    "looks back": ({"copy_heads": 1, "convolutions": True}, (21, 17), 6, (11.5, 6, 114)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_few_kernels_and_saves_few_activations(written, kind):
    """Units of activations: B * T * C in bfloat16. Every product has two in the backward pass."""
    fields, kernels, products, units = BLOCKS[kind]
    found = written("block", json.dumps(fields))
    forward, backward = found["forward"], found["backward"]
    names = forward["names"] + backward["names"]
    assert forward["triton"] <= kernels[0] and backward["triton"] <= kernels[1], names
    assert not [name for name in names if re.search("clone", name)]
    assert (forward["products"], backward["products"]) == (products, 2 * products)
    measured = found["units"], found["peak"], sum(found["moved"])
    assert all(a <= b for a, b in zip(measured, units, strict=True)), measured

"""llama4.py and reference.py: the same classes and methods, and what the thin one must not have."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llama4_triton.model import llama4, reference

pytestmark = pytest.mark.no_kernels


def _tree(module):
    return ast.parse(Path(module.__file__).read_text(encoding="utf-8"))


def _methods(module):
    return {
        node.name: [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
        for node in _tree(module).body
        if isinstance(node, ast.ClassDef)
    }


def test_the_same_classes_and_methods_in_the_same_order():
    assert list(_methods(llama4).items()) == list(_methods(reference).items())


def test_the_forward_pass_is_thin():
    assert len(Path(llama4.__file__).read_text(encoding="utf-8").splitlines()) <= 350
    nodes = list(ast.walk(_tree(llama4)))
    assert not any(isinstance(node, ast.Try) for node in nodes)
    words = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    words |= {node.id for node in nodes if isinstance(node, ast.Name)}
    branches = {
        "dtype",
        "bfloat16",
        "float16",
        "is_cuda",
        "is_available",
        "capability",
        "interpret",
    }
    assert not words & branches  # no branch on data type, architecture or executor


def test_state_dicts_are_interchangeable():
    from support.tiny_configs import CASES

    for config in CASES.values():
        shapes = [
            {name: value.shape for name, value in module.Llama4(config).state_dict().items()}
            for module in (llama4, reference)
        ]
        assert shapes[0] == shapes[1]

"""What the tests of the command share."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from conversion.cli import main
from tests.conversion import toy

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def assert_same_tensors(given, expected):
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert given[name].dtype == value.dtype, name
        np.testing.assert_array_equal(given[name], value, err_msg=name)


def read_folder(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def tree_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def corrupt(file, change):
    """Rewrite a file's tensors."""
    tensors = load_file(file)
    change(tensors)
    toy.save(file, tensors)

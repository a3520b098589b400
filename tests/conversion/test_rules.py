"""The rule machinery: reading, writing, cutting, joining, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clvr_jax import tree
from conversion.lazy import Joined
from conversion.rules import Bound, Extra, Pattern, Rule, Table, TableError, file_specs


def shapes(**leaves):
    flat = {path.replace("__", "/"): shape for path, shape in leaves.items()}
    return tree.unflatten({k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in flat.items()})


def numbers(*shape, start=0):
    return np.arange(start, start + np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def test_a_pattern_gives_the_shape_in_the_file():
    assert Pattern("(part h k) i -> i part h k").file_shape((5, 3, 2, 4)) == (24, 5)
    assert Pattern("o i 1 1 -> i o").file_shape((5, 7)) == (7, 5, 1, 1)
    assert Pattern("o i kh kw -> kh kw i o").file_shape((3, 1, 5, 7)) == (7, 5, 3, 1)
    assert Pattern("d -> d").file_shape((5,)) == (5,)


@pytest.mark.parametrize(
    "text", ["o i -> i", "o i -> (i o)", "o i, i o", "o o -> o", "o i -> i o p", "i -> i i"]
)
def test_a_pattern_that_is_no_permutation_of_named_axes_is_refused(text):
    with pytest.raises(TableError, match="same named axes"):
        Pattern(text)


FUSED = Rule("x.{layer}.w", [("b/qkv", "(part h) i -> i part h"), ("b/mlp", "o i -> i o")])
FUSED_TREE = shapes(b__qkv=(2, 5, 3, 4), b__mlp=(2, 5, 7))


def test_one_source_is_cut_by_rows_into_several_targets():
    bound = Bound(Table((FUSED,), ("b",)), FUSED_TREE)
    assert bound.shapes == {"x.0.w": (19, 5), "x.1.w": (19, 5)}
    files = {name: numbers(19, 5, start=1000 * i) for i, name in enumerate(bound.shapes)}
    entry, target = bound.at("b/qkv", 1)
    qkv = entry.read(target, files.__getitem__)
    # rows: part outermost, then h
    np.testing.assert_array_equal(qkv[:, 2, 1], files["x.1.w"][2 * 4 + 1])
    entry, target = bound.at("b/mlp", 1)
    np.testing.assert_array_equal(entry.read(target, files.__getitem__), files["x.1.w"][12:].T)


def test_one_source_is_cut_by_columns():
    rule = Rule("x", [("attn", "o i -> i o"), ("mlp", "o i -> i o")], axis=1)
    bound = Bound(Table((rule,)), shapes(attn=(3, 5), mlp=(7, 5)))
    assert bound.shapes == {"x": (5, 10)}
    file = numbers(5, 10)
    leaf = [bound.at(path, None) for path in ("attn", "mlp")]
    read = [entry.read(target, {"x": file}.__getitem__) for entry, target in leaf]
    np.testing.assert_array_equal(read[0], file[:, :3].T)
    np.testing.assert_array_equal(read[1], file[:, 3:].T)
    ((name, back),) = bound.entries[0].write(read)
    assert name == "x"
    np.testing.assert_array_equal(np.asarray(back), file)


def test_several_sources_are_joined_without_a_copy_until_indexed():
    rule = Rule(["q", "k", "v"], "qkv", "(part h k) i -> i part h k")
    bound = Bound(Table((rule,)), shapes(qkv=(5, 3, 2, 4)))
    files = {name: numbers(8, 5, start=100 * i) for i, name in enumerate("qkv")}
    entry, target = bound.at("qkv", None)
    leaf = entry.read(target, files.__getitem__)
    assert isinstance(leaf, Joined) and leaf.shape == (5, 3, 2, 4)
    assert all(np.shares_memory(part, files[name]) for part, name in zip(leaf.parts, "qkv"))
    for i, name in enumerate("qkv"):
        expected = files[name].reshape(2, 4, 5).transpose(2, 0, 1)
        np.testing.assert_array_equal(np.asarray(leaf)[:, i], expected)
        np.testing.assert_array_equal(leaf[1:3, i : i + 1, :, 2:][:, 0], expected[1:3, :, 2:])
    back = {name: np.asarray(x) for name, x in entry.write([np.asarray(leaf)])}
    assert back.keys() == files.keys()
    for name in files:
        np.testing.assert_array_equal(back[name], files[name])


def test_reading_a_single_source_is_a_view():
    bound = Bound(
        Table((Rule("w", "w", "(part o) i -> i part o", swap="part"),)), shapes(w=(5, 2, 3))
    )
    file = numbers(6, 5)
    entry, target = bound.at("w", None)
    leaf = entry.read(target, {"w": file}.__getitem__)
    assert np.shares_memory(leaf, file)
    np.testing.assert_array_equal(leaf[:, 0], file[3:].T)
    np.testing.assert_array_equal(leaf[:, 1], file[:3].T)


@pytest.mark.parametrize("swap", ["", "part"])
def test_writing_inverts_reading(swap):
    table = Table(
        (
            FUSED,
            Rule("m", "m", "(part o) i -> i part o", swap=swap),
            Rule("c", "c", "o i 1 1 -> i o"),
        ),
        ("b",),
    )
    abstract = shapes(b__qkv=(2, 5, 3, 4), b__mlp=(2, 5, 7), m=(5, 2, 3), c=(4, 6))
    bound = Bound(table, abstract)
    rng = np.random.default_rng(0)
    files = {name: rng.standard_normal(shape) for name, shape in bound.shapes.items()}
    back = {}
    for entry in bound.entries:
        leaves = [np.asarray(entry.read(target, files.__getitem__)) for target in entry.targets]
        assert [leaf.shape for leaf in leaves] == [target.shape for target in entry.targets]
        back |= {name: np.asarray(x) for name, x in entry.write(leaves)}
    assert back.keys() == files.keys()
    for name in files:
        np.testing.assert_array_equal(back[name], files[name])


def test_tables_use_every_source_and_target_once():
    a, b = Rule("x", "a", "i -> i"), Rule("y", "b", "i -> i")
    with pytest.raises(TableError, match="source used by more than one rule: x"):
        Table((a, Rule("x", "b", "i -> i")))
    with pytest.raises(TableError, match="target used by more than one rule: a"):
        Table((a, Rule("y", "a", "i -> i")))
    with pytest.raises(TableError, match="source used by more than one rule: x"):
        Table((a, b), extras=(Extra("x"),))
    with pytest.raises(TableError, match="no rule for c"):
        Bound(Table((a, b)), shapes(a=(3,), b=(3,), c=(3,)))
    with pytest.raises(TableError, match="no leaf b"):
        Bound(Table((a, b)), shapes(a=(3,)))
    clash = Table((Rule("x.{layer}", "r/a", "i -> i"), Rule("x.1", "b", "i -> i")), ("r",))
    with pytest.raises(TableError, match="one tensor name twice"):
        Bound(clash, shapes(r__a=(2, 3), b=(3,)))


def test_rules_must_fit_the_tree():
    linear = "o i -> i o"
    with pytest.raises(TableError, match="belongs in rules of stacked leaves"):
        Bound(Table((Rule("x", "r/a", linear),), ("r",)), shapes(r__a=(2, 3, 4)))
    with pytest.raises(TableError, match="belongs in rules of stacked leaves"):
        Bound(Table((Rule("x.{layer}", "a", linear),)), shapes(a=(3, 4)))
    with pytest.raises(TableError, match="does not have the axes"):
        Bound(Table((Rule("x", "a", linear),)), shapes(a=(3, 4, 5)))
    pair = Rule("x.{layer}", [("r/a", linear), ("r/b", linear)])
    with pytest.raises(TableError, match=r"\[2, 3\] layers"):
        Bound(Table((pair,), ("r",)), shapes(r__a=(2, 3, 4), r__b=(3, 3, 4)))
    with pytest.raises(TableError, match="do not fit together"):
        Bound(Table((pair,), ("r",)), shapes(r__a=(2, 3, 4), r__b=(2, 5, 4)))
    halves = Rule(["x", "y"], "a", linear)
    with pytest.raises(TableError, match="do not fit together"):
        Bound(Table((halves,)), shapes(a=(3, 5)))
    inside = Rule(["x", "y"], "a", "(part o) i -> i part o")
    with pytest.raises(TableError, match="2 parts cut a inside"):
        Bound(Table((inside,)), shapes(a=(3, 3, 4)))
    with pytest.raises(TableError, match="swap needs one source"):
        Rule(["x", "y"], "a", "(part o) i -> i part o", swap="part")


def test_extras_are_written_when_they_have_a_value():
    counter = Extra("count", write=np.zeros((), np.int64))
    table = Table((Rule("x", "a", "i -> i"),), extras=(counter, Extra("other")))
    assert file_specs(table, shapes(a=(3,))) == {"x": (3,), "count": ()}

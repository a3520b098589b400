"""Programs lowered from shapes and shardings alone, for `launch.compile`."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clvr_jax import parallel
from clvr_jax.tree import flatten, unflatten
from clvr_jax.typing import Params


def placed(tree: Params, mesh: Mesh) -> Params:
    """Return the shapes of a tree of parameters where the rules place them."""
    places = flatten(parallel.shardings(tree, mesh))
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
            for path, leaf in flatten(tree).items()
        }
    )


def whole(tree, mesh: Mesh):
    """Return the shapes of a tree of arrays, each of them whole on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    return jax.tree.map(shape, tree)

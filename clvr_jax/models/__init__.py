"""Networks as Flax linen functions; the only room that imports flax.linen."""

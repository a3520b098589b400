"""Training: optimiser, state, step, loop, metrics. Knows no model."""

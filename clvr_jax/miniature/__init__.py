"""A world of coloured shapes whose truth can be computed, with all that is special about it."""

"""ml_collections configs; they import nothing of this project."""

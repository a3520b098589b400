"""What `python -m launch.evaluate` runs: a module for each benchmark, and what they share."""

"""From a config to a training run: what `python -m launch.train` puts together."""

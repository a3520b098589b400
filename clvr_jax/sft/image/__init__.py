"""Supervised fine-tuning of the image model on the pictures of trajectories."""

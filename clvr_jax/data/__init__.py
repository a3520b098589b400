"""Trajectories, what is trained on in them, and the order in which it is read."""

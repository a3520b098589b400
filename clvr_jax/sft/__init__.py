"""Supervised fine-tuning: the losses of the two models and the batches they read."""

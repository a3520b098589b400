"""Supervised fine-tuning of Qwen3-VL on conversations with pictures."""

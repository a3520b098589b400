"""Qwen3-VL: a vision tower, and a Qwen3 decoder that reads its features."""

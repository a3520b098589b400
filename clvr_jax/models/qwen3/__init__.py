"""Qwen3 decoder: klein's text encoder and the language half of Qwen3-VL."""

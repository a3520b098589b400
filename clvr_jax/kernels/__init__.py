"""Attention entry point and its implementations."""

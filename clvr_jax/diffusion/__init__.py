"""Schedules and samplers over arrays and callables."""

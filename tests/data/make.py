"""Toy datasets for tests."""

from launch.toy_data import SIZES, make, trajectory

__all__ = ["SIZES", "make", "trajectory"]

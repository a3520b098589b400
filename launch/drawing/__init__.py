"""Prompts drawn with the closed loop, or what it is compared with, into folders and pages."""

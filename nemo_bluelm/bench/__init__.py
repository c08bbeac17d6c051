"""Measurements beside the tools that people know, behind ``nemo-bluelm bench``."""

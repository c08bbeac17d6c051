"""Lets other projects' evaluation harnesses drive our model."""

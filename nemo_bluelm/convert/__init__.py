"""Weights between our checkpoints and Hugging Face's layout: one table, used in both directions."""

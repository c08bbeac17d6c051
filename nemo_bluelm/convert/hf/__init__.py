"""The files that an export carries: they know torch, transformers, numpy and Pillow, and nothing of this package."""

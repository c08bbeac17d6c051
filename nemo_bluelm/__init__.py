"""Training stack of BlueLM-2.5-3B as plugins on NVIDIA NeMo and Megatron-Core."""

__version__ = "0.1.0"

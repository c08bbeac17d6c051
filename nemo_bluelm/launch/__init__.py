"""Runs recipes and pipelines as jobs of a Slurm cluster."""

"""Curation: records in, better records out, by datatrove's pipelines on this machine or on Slurm."""

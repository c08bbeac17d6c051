"""Files that ``export vllm`` puts into a folder; they stand alone and import nothing of this package."""

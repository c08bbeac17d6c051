"""Files that ``export trtllm`` puts into a folder; they stand alone and import nothing of nemo_bluelm."""

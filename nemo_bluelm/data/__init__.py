"""From shards to packs: index, mixture plan, decoding, chat format, packing. Never imports Megatron or NeMo."""

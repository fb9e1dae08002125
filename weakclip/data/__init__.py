"""How does a sample reach the network? Index, tar reading, storage, cache, codecs, plan, augmentation, stream of batches."""

"""Parts of torch models that training, pruning and quantization share."""

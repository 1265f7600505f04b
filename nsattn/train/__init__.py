"""A byte-level language model whose attention is NSA: data, training, checkpoints, pictures (`pip install nsattn[train]`)."""

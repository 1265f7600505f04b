"""A byte-level language model whose attention is NSA: training, checkpoints, pictures.

Needs `pip install nsattn[train]`.
"""

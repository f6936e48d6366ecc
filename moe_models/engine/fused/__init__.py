"""A faster AutoEP layer: ``"moe": {"kernels": "fused"}``. Begin to read at ``layer.py``."""

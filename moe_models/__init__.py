"""Nouns of moe-recipes: families, layout, config, checkpoint, trainer. Import what you need; nothing runs on import.

Shape legend, used as suffixes or comments in the whole package:
    T tokens, D hidden size, F expert FFN size, E experts, K top-k, L layers, V vocabulary.
"""

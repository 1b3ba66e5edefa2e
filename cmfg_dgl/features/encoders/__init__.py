"""Frozen backbones: images to patch nodes, texts to token nodes."""

"""Attention over relations, the layers and the CMFG model."""

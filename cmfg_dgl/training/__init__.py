"""Objectives, hard negatives, the trainer and its checkpoints."""

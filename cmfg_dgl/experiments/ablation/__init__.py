"""The ablation: what a relation or a setting is worth, with intervals and a test."""

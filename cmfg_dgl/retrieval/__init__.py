"""Two-stage retrieval: the independent first stage and the joint re-ranking."""

"""Ranking metrics and the audit."""

"""The work behind each command, from a configuration or a run directory to its results."""

"""The errors that a person can mend, each with the exit code of the command that meets it."""

__all__ = ["CheckpointError", "CmfgError", "ConfigError", "DataError", "Interrupted"]


class CmfgError(Exception):
    """An error told in one line: what is wrong, where, and the remedy."""

    exit_code = 1


class ConfigError(CmfgError):
    """A key, a value or an option that cannot be used."""

    exit_code = 2


class DataError(CmfgError):
    """A data set, an image, a caption or a feature store that cannot be used."""

    exit_code = 3


class CheckpointError(CmfgError):
    """A checkpoint or a run directory that cannot be used."""

    exit_code = 4


class Interrupted(CmfgError):
    """The person stopped the run, and its state is saved."""

    exit_code = 130

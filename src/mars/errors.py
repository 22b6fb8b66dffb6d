"""Every error that MARS raises on purpose, as a tree.

    MarsError
    ├── ConfigError       a configuration file or an override is wrong
    ├── CheckpointError   a file of weights is missing, truncated or does not fit its configuration
    ├── ModelError        a model or language model cannot be found or opened
    ├── DataError         a data set or a shard is wrong
    ├── ImageError        a picture cannot be read or has a size that cannot be used
    ├── TrainingError     a run cannot go on: a loss or a gradient is not finite
    └── RequestError      what was asked for cannot be done (size, count, sampling)
        └── PromptError   the prompt itself is empty or too long

A message is one line: what must hold, what was got, what to do. The command line prints it and exits with `exit_code`.
"""


class MarsError(Exception):
    """The root of all errors raised on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1


class ConfigError(MarsError):
    """A configuration file, key or value is wrong."""

    exit_code = 2


class CheckpointError(MarsError):
    """Weights are missing, truncated, of the wrong shape, or not finite."""


class ModelError(MarsError):
    """A model, or the language model that it builds on, cannot be found or opened."""


class DataError(MarsError):
    """A data set or a shard is missing or malformed."""


class ImageError(MarsError):
    """A picture cannot be read, or its size cannot be used."""


class TrainingError(MarsError):
    """A run cannot go on: a loss or a gradient is NaN or infinite."""


class RequestError(MarsError):
    """What was asked for cannot be done."""

    exit_code = 2


class PromptError(RequestError):
    """The prompt is empty or longer than the model can read."""

"""What can go wrong in the engine. Every message says what was, what is allowed, what to change."""


class EngineError(Exception):
    """Root of the engine's errors. Picklable: a message and nothing else."""


class ConfigError(EngineError):
    """A setting, a checkpoint's config or a plan that cannot be served."""


class WeightsError(ConfigError):
    """A checkpoint file that is missing, damaged or contradicts its config."""


class TokenizerError(ConfigError):
    """A tokenizer or chat template that is missing, broken or does not fit the model."""


class ShapeError(EngineError):
    """Arrays whose shapes contradict each other."""


class InvalidJob(EngineError):
    """A job that can never run: empty or too long prompt, sampling out of range."""


class FormFailed(EngineError):
    """A form that an answer could not be kept to: it turned out too costly, or a dead end."""


class DuplicateJob(EngineError):
    """A job whose request_id is already running."""


class QueueFull(EngineError):
    """More waiting jobs than the plan admits. Retry after `retry_s`."""

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message, retry_s)
        self.retry_s = retry_s

    def __str__(self) -> str:
        return str(self.args[0])


class DeadlinePassed(EngineError):
    """A job that could not be finished in time and was not begun."""


class EngineStopped(EngineError):
    """The engine thread has ended; nothing more will be served."""

"""What can go wrong in the service. A message says what was, what is allowed, what to change."""


class SonaError(Exception):
    """Root of the service's errors. Picklable: a message and nothing else."""


class InvalidRequest(SonaError):
    """A request that can never succeed as it stands."""


class Overloaded(SonaError):
    """A bounded queue is full. Retry later."""


class ShuttingDown(SonaError):
    """The part that was asked has been closed, or is closing."""


class DataDirError(SonaError):
    """The data directory cannot be used."""


class DataDirLocked(DataDirError):
    """Another process holds the data directory."""


class DataDirUnwritable(DataDirError):
    """The data directory is missing and cannot be made, or cannot be written."""


class JournalError(SonaError):
    """The journal refused or failed. Root of its errors."""


class RequestNotFound(JournalError):
    """No such request within retention: unknown, expired, or sent with learn=false."""


class RequestExists(JournalError):
    """The tenant has used this request_id within retention."""


class ForeignRequest(JournalError):
    """The request was made by another principal of the tenant."""


class FeedbackNotFound(JournalError):
    """No such feedback, or its content has been removed."""


class FeedbackConflict(JournalError):
    """The tenant has used this feedback_id for other content."""


class DiskFull(JournalError):
    """The disk took no more. Nothing of the refused call was stored or acknowledged."""


class JournalCorrupt(JournalError):
    """journal.db does not hold what was written to it."""


class InvalidField(InvalidRequest):
    """One field of a request is out of range. Carries the field's name on the wire."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field

    def __str__(self) -> str:
        return str(self.args[1])


class NotBuilt(SonaError):
    """A method or a field that the contract names and this version does not have."""


class ModelNotFound(SonaError):
    """A request names a model that is not served here."""


class Unauthenticated(SonaError):
    """No key, or one that is not known."""


class PermissionDenied(SonaError):
    """The caller's role does not allow it."""


class PortInUse(SonaError):
    """A port that the server was told to listen on is taken."""


class NotReady(SonaError):
    """The server is still loading. Retry later."""

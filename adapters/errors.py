"""What can go wrong with adapters. A message says what was, what is allowed, what to change."""


class AdapterError(Exception):
    """Root of the adapters' errors. Picklable: a message and nothing else."""


class AdapterNotFound(AdapterError):
    """No such pattern, slot or version, or a version whose arrays were compacted away."""


class IncompatibleAdapter(AdapterError):
    """An adapter of another base model than the one being served, or larger than its slots."""


class InvalidAdapter(AdapterError):
    """Adapter files that are missing, damaged, or ask for what is not built."""


class CandidateRejected(AdapterError):
    """A new version that must not be published. The one before it stays."""


class StaleCandidate(CandidateRejected):
    """A new version made from one that is no longer live. Make it again from the live one."""


class SnapshotCorrupt(AdapterError):
    """adapters.db does not hold what was written to it."""


class StoreUnwritable(AdapterError):
    """The disk took no more, or the store may not be written. Nothing was stored."""

"""The errors that cross module boundaries. Whoever handles one logs it; whoever passes it on does not."""


class NeonError(Exception):
    """Base of all errors that this project raises on purpose."""


class ConfigError(NeonError):
    """The operator's input is wrong. The text is one line: what is wrong and how to mend it."""


class ProtocolViolation(NeonError):
    """The peer sent something that the protocol does not allow. The connection ends; nothing else does."""


class CorruptionError(NeonError):
    """Stored bytes fail their checksum or make no sense. The text names the object and the repair."""


class StaleGeneration(NeonError):
    """The other side works with another membership or attachment generation than ours."""


class Cancelled(NeonError):
    """The operation ended because its timeline, tenant or process is shutting down."""

"""Which errors can cross the migration package's boundary?"""

from __future__ import annotations


class MigrationError(Exception):
    """Base of the errors a caller of this package may meet."""


class ChannelClosed(MigrationError):
    """The peer of a control channel is known to be gone."""


class CopyFailed(MigrationError):
    """A push of blocks did not land: the peer refused, died, or the deadline passed."""


class EngineFault(MigrationError):
    """A visit to an engine failed for a reason of its own. What it should have done may or may not be done."""


class LocalProtocolError(MigrationError):
    """We asked a machine for something its state does not allow: a bug on this side. Nothing has changed."""


class RemoteProtocolError(MigrationError):
    """The peer sent something its state does not allow. Nothing has changed."""


class MalformedMessage(MigrationError):
    """Bytes from the wire are no message of this version."""

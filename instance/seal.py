"""Who may speak to an inbox? Whoever holds the fleet's token: every frame carries a keyed MAC that proves it.

The proof is of membership, not of a person: all members share one token. It covers the frame's version, the inbox it is
meant for and every byte of its body, so a frame for one inbox is worth nothing at another one. It does not hide the
body, and it does not notice a frame that is said twice: `replay.py` does.
"""

from __future__ import annotations

import hashlib
import hmac

MAC_BYTES = 16
_INBOX = b"kvferry-inbox-3"
"""Purpose and wire version of this MAC (blake2b's `person`): no other use of the token gives the same bytes."""
_CARRIER = b"kvferry-carrier"


def carrier_token(token: str) -> str:
    """What opens a connection between block carriers. It is sent there in the clear, so it is not the fleet's token:
    who overhears it cannot speak to an inbox."""
    return hashlib.blake2b(_key(token), digest_size=16, person=_CARRIER).hexdigest()


class Seal:
    """The fleet's MAC over frames. Never shows its key."""

    def __init__(self, token: str) -> None:
        """Raises ValueError for an empty token: that would be no secret at all."""
        if not token:
            raise ValueError("the fleet's token is empty: every instance, gateway and orchestrator needs the same one")
        self._keyed = hashlib.blake2b(key=_key(token), digest_size=MAC_BYTES, person=_INBOX)

    def mac(self, address: str, body: bytes | memoryview) -> bytes:
        """MAC_BYTES bytes for this body on its way to the inbox at `address`."""
        keyed = self._keyed.copy()
        keyed.update(address.encode() + b"\0")
        keyed.update(body)
        return keyed.digest()

    def is_genuine(self, mac: bytes | memoryview, address: str, body: bytes | memoryview) -> bool:
        """In a time that does not depend on how much of the MAC is right."""
        return hmac.compare_digest(mac, self.mac(address, body))


def _key(token: str) -> bytes:
    """A token of any length as one of the length blake2b takes."""
    return hashlib.blake2b(token.encode(), digest_size=32).digest()

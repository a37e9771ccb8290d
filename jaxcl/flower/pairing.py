"""Secrets of pairs of clients, which the server passes the public halves of (X25519, HKDF)."""

from __future__ import annotations


class KeyPair:
    """A client's key pair, new for every start of its process."""

    def __init__(self) -> None:
        """Draws the private key."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._private = X25519PrivateKey.generate()

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def secret(self, other: bytes) -> bytes:
        """The secret with another client, 32 bytes; the same for both.

        Args:
          other: its public key.
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        agreed = self._private.exchange(X25519PublicKey.from_public_bytes(other))
        return HKDF(SHA256(), 32, None, b"jaxcl federated").derive(agreed)

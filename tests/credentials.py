"""Keys, tokens and certificates for tests, made on the spot."""

import datetime
import ipaddress
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from neon_services.ground.auth import sign_token
from neon_services.ground.ids import TenantId


@dataclass
class TokenKey:
    """A private key that signs tokens."""

    key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public_pem(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def private_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def token(self, scope: str, tenant: TenantId | None = None, **claims: Any) -> str:
        named = {} if tenant is None else {"tenant_id": str(tenant)}
        return sign_token(self.key, {"scope": scope, **named, **claims})

    def expired(self, scope: str) -> str:
        return self.token(scope, exp=int(time.time()) - 3600)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    """A certificate authority. ``ca_file`` is what clients are to trust."""

    def __init__(self, directory: Path, name: str = "tests") -> None:
        self.directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _name(f"authority {name}")
        self.certificate = self._sign(
            self._subject,
            self._key.public_key(),
            (x509.BasicConstraints(ca=True, path_length=None), True),
            (
                x509.KeyUsage(
                    digital_signature=True,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                True,
            ),
            (x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), False),
        )
        self.ca_file = directory / f"ca-{name}.pem"
        self.ca_file.write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def _sign(self, subject: x509.Name, public_key: Any, *extensions: tuple[Any, bool]) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(self._key, SHA256())

    def issue(self, *names: str) -> tuple[bytes, bytes, int]:
        """Key and certificate, PEM, for these host names and addresses, and its serial number."""
        alternatives: list[x509.GeneralName] = []
        for name in names or ("localhost", "127.0.0.1"):
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternatives.append(x509.DNSName(name))
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(
            _name("service"),
            key.public_key(),
            (x509.SubjectAlternativeName(alternatives), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False),
        )
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key_pem, certificate.public_bytes(Encoding.PEM), certificate.serial_number

    def install(self, directory: Path, *names: str) -> int:
        """Write server.key and server.crt, the key first; the serial number."""
        key, certificate, serial = self.issue(*names)
        (directory / "server.key").write_bytes(key)
        (directory / "server.crt").write_bytes(certificate)
        return serial

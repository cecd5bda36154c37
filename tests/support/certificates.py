"""Certificates for tests, made by the openssl program."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_CURVE = {"ec": ("-pkeyopt", "ec_paramgen_curve:P-256")}


@dataclass(frozen=True)
class Identity:
    """Paths of a certificate and its key."""

    certificate: str
    key: str


class Authority:
    """A certificate authority in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.certificate = str(directory / "ca.pem")
        self._key = str(directory / "ca.key")
        _openssl(
            "req", "-x509", "-newkey", "ec", *_CURVE["ec"], "-nodes",
            "-keyout", self._key, "-out", self.certificate, "-days", "2",
            "-subj", f"/CN={directory.name}",
        )  # fmt: skip

    def issue(self, name: str, *addresses: str, kind: str = "ec") -> Identity:
        """A certificate of `name`, valid as a server's for `addresses` and as a client's."""
        own = Identity(str(self._directory / f"{name}.pem"), str(self._directory / f"{name}.key"))
        request = str(self._directory / f"{name}.csr")
        extensions = self._directory / f"{name}.ext"
        names = "".join(f",IP:{address}" for address in addresses)
        extensions.write_text(
            f"subjectAltName=DNS:{name}{names}\nextendedKeyUsage=serverAuth,clientAuth\n"
        )
        _openssl(
            "req", "-newkey", kind, *_CURVE.get(kind, ()), "-nodes",
            "-keyout", own.key, "-out", request, "-subj", f"/CN={name}",
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key,
            "-CAcreateserial", "-out", own.certificate, "-days", "2", "-extfile", str(extensions),
        )  # fmt: skip
        return own


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)

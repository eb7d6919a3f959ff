"""TLS: what a client trusts and shows, and what it means when no connection comes about."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from groundglass.errors import ServerUnreachable, SettingError, TlsFailed

TLS_VARIABLE: Final = "GROUNDGLASS_TLS"
CA_VARIABLE: Final = "GROUNDGLASS_TLS_CA"
CERTIFICATE_VARIABLE: Final = "GROUNDGLASS_TLS_CERT"
KEY_VARIABLE: Final = "GROUNDGLASS_TLS_KEY"

_NO: Final = frozenset({"", "0", "false", "no", "off"})

_DEBIAN_BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")
"""OpenSSL looks into the folder around it; gRPC wants one file."""

_MISMATCHES: Final = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"})

# What gRPC says (1.85, November 2026), and what it means to whoever asked for the connection.
_EXPIRED: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED: certificate (has expired|is not yet valid)")
_UNTRUSTED: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:]+)")
_OTHER_NAME: Final = re.compile(r"Hostname Verification Check failed")
_NOT_TLS: Final = re.compile(r"WRONG_VERSION_NUMBER")
_REFUSES_US: Final = re.compile(r"Unwrap failed|_ALERT_")
_FAILED: Final = re.compile(r"(?:Tls handshake failed|Cannot check peer)(.*)", re.DOTALL)
_CUT_OFF: Final = re.compile(r"failed to connect.*(Socket closed|Connection reset|Broken pipe)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """What a client trusts, and what it shows of itself. All files are PEM.

    ca: certificates of who may sign the server's; None for those that this system trusts.
    certificate: the client's own, followed by what leads to its CA; None where the server asks for none.
    key: the private key of that certificate, without a pass phrase.

    Raises SettingError for a file that can't be used, and for a certificate or a key without the other.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if self.ca is not None:
            _require_certificates(self.ca, "CA")
        if self.certificate is None and self.key is None:
            return
        if self.certificate is None:
            raise SettingError(f"TLS key {self.key} comes without its certificate (--tls-cert)")
        if self.key is None:
            raise SettingError(f"TLS certificate {self.certificate} comes without its key (--tls-key)")
        _require_certificates(self.certificate, "certificate")
        _require_key(self.key, self.certificate)

    @classmethod
    def of_environment(cls, variables: Mapping[str, str]) -> TlsSettings | None:
        """What the ``GROUNDGLASS_TLS*`` variables ask for, where the command line is not ours; None for plain gRPC."""
        files = [variables.get(name) for name in (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE)]
        if variables.get(TLS_VARIABLE, "").lower() in _NO and not any(files):
            return None
        return cls(*(Path(file) if file else None for file in files))

    def client_options(self) -> dict[str, Any]:
        """As arguments of tritonclient's ``InferenceServerClient`` for gRPC."""
        trusted = self.ca or _system_bundle()
        return {
            "ssl": True,
            "root_certificates": None if trusted is None else str(trusted),
            "certificate_chain": None if self.certificate is None else str(self.certificate),
            "private_key": None if self.key is None else str(self.key),
        }


def tls_failure(server: str, said: str, tls: TlsSettings | None) -> ServerUnreachable | None:
    """What gRPC's words ``said`` about a failed connection to ``server`` mean, where TLS has to do with it.

    TlsFailed where another try fails as well. None where TLS has nothing to do with it.
    """
    if _CUT_OFF.search(said):
        return ServerUnreachable(f"{server} closed the connection at once: {_if_it_speaks_tls(tls)}")
    meaning = None if tls is None else _meaning(said, tls)
    return None if meaning is None else TlsFailed(f"{server} {meaning}")


def _meaning(said: str, tls: TlsSettings) -> str | None:
    if expired := _EXPIRED.search(said):
        return f"shows a certificate that {expired[1]}: it must be renewed there, unless a clock is wrong"
    if untrusted := _UNTRUSTED.search(said):
        whose = "the system's CAs" if tls.ca is None else f"the CA in {tls.ca}"
        return f"shows a certificate that {whose} did not sign ({untrusted[1]}): name the file of its CA with --tls-ca"
    if _OTHER_NAME.search(said):
        return "shows a certificate for another name: connect by a name that stands in it"
    if _NOT_TLS.search(said):
        return "does not speak TLS: leave the TLS options away, or connect to the port that does"
    if _REFUSES_US.search(said):
        return f"refused the connection as it came about: {_if_it_speaks_tls(tls)}"
    if failed := _FAILED.search(said):
        return f"can't be connected to over TLS{failed[1].removesuffix(': OK')}"
    return None


def _if_it_speaks_tls(tls: TlsSettings | None) -> str:
    if tls is None:
        return "does it speak TLS? Then name the file of its CA with --tls-ca"
    if tls.certificate is None:
        return "does it ask for a client certificate? Then give it with --tls-cert and --tls-key"
    return f"does it trust the CA of {tls.certificate}, and is that certificate still valid?"


def _system_bundle() -> Path | None:
    """The file of all CAs that this system trusts; None where gRPC's own list has to do."""
    known = ssl.get_default_verify_paths().cafile
    if known is not None:
        return Path(known)
    return _DEBIAN_BUNDLE if _DEBIAN_BUNDLE.is_file() else None


def _require_certificates(file: Path, what: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except ssl.SSLError as error:
        raise SettingError(f"TLS {what} {file} holds no certificate in PEM") from error
    except OSError as error:
        raise SettingError(f"TLS {what} {file} can't be read: {error.strerror}") from error


def _require_key(key: Path, certificate: Path) -> None:
    def refuse_pass_phrase() -> NoReturn:
        raise SettingError(f"TLS key {key} has a pass phrase: it is needed without one")

    try:
        key.read_bytes()  # for an error that names this file: the next line reads both
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, refuse_pass_phrase)
    except ssl.SSLError as error:
        if error.reason in _MISMATCHES:
            raise SettingError(f"TLS key {key} is not the key of certificate {certificate}") from error
        raise SettingError(f"TLS key {key} holds no private key in PEM") from error
    except OSError as error:
        raise SettingError(f"TLS key {key} can't be read: {error.strerror}") from error

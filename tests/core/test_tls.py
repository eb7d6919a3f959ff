"""TLS files are looked at before anything is sent, and what is wrong with them is told by name."""

from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from groundglass.errors import SettingError
from groundglass.tls import TlsSettings


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: ca.pem, client.pem and client.key, the key of another certificate, and files that are none of these."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("client", "other"):
        issued = authority.issue_cert(f"{name}@groundglass.test")
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
    key = load_pem_private_key((folder / "client.key").read_bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (folder / "locked.key").write_bytes(locked)
    (folder / "empty.pem").touch()
    (folder / "text.pem").write_text("no certificate")
    return folder


def test_good_files_are_what_the_client_is_given(files: Path) -> None:
    """CA, certificate and key reach tritonclient as the files that they are."""
    tls = TlsSettings(files / "ca.pem", files / "client.pem", files / "client.key")
    assert tls.client_options() == {
        "ssl": True,
        "root_certificates": str(files / "ca.pem"),
        "certificate_chain": str(files / "client.pem"),
        "private_key": str(files / "client.key"),
    }


def test_without_a_ca_the_systems_own_are_trusted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC would take a list of its own: it is given the file that this system names."""
    monkeypatch.setenv("SSL_CERT_FILE", str(files / "ca.pem"))
    assert TlsSettings().client_options()["root_certificates"] == str(files / "ca.pem")


def test_the_environment_may_ask_for_tls(files: Path) -> None:
    """For programs whose command line is not ours; what is empty or "0" asks for nothing."""
    ca, certificate, key = (str(files / name) for name in ("ca.pem", "client.pem", "client.key"))
    found = TlsSettings.of_environment(
        {"GROUNDGLASS_TLS_CA": ca, "GROUNDGLASS_TLS_CERT": certificate, "GROUNDGLASS_TLS_KEY": key}
    )
    assert found == TlsSettings(Path(ca), Path(certificate), Path(key))
    assert TlsSettings.of_environment({"GROUNDGLASS_TLS": "1", "GROUNDGLASS_TLS_CA": ""}) == TlsSettings()
    assert TlsSettings.of_environment({"GROUNDGLASS_TLS": "0", "GROUNDGLASS_TLS_CA": ""}) is None
    assert TlsSettings.of_environment({}) is None


@pytest.mark.parametrize(
    ("ca", "certificate", "key", "words"),
    [
        ("absent.pem", None, None, "TLS CA .*absent.pem can't be read: No such file"),
        ("", None, None, "TLS CA .* can't be read"),
        ("empty.pem", None, None, "TLS CA .*empty.pem holds no certificate"),
        ("text.pem", None, None, "TLS CA .*text.pem holds no certificate"),
        ("client.key", None, None, "TLS CA .*client.key holds no certificate"),
        (None, "client.pem", None, r"client.pem comes without its key \(--tls-key\)"),
        (None, None, "client.key", r"client.key comes without its certificate \(--tls-cert\)"),
        (None, "client.key", "client.key", "TLS certificate .*client.key holds no certificate"),
        (None, "client.pem", "absent.key", "TLS key .*absent.key can't be read: No such file"),
        (None, "client.pem", "text.pem", "TLS key .*text.pem holds no private key"),
        (None, "client.pem", "other.key", "TLS key .*other.key is not the key of certificate .*client.pem"),
        (None, "client.pem", "locked.key", "TLS key .*locked.key has a pass phrase"),
    ],
)
def test_files_that_can_not_be_used_are_told_by_name(
    files: Path, ca: str | None, certificate: str | None, key: str | None, words: str
) -> None:
    """A missing, foreign or mismatched file is an error of the setting, with the file's name."""
    paths = [None if name is None else files / name for name in (ca, certificate, key)]
    with pytest.raises(SettingError, match=words):
        TlsSettings(*paths)

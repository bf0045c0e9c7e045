"""The archives file: which archives a job may name, how they are reached, and who looks at what they hold.

The site keeps it. It holds no secret: passwords and tokens are in private files or the environment, so that neither a
job nor a copy of this file gives one away.

    archives:
      pacs:
        clinical: true                      # takes results of `purpose: care` only
        timeout: 30s                        # of each answer
        dicomweb:
          url: https://pacs.example.org/dicom-web
          user: permed
          password_file: pacs.password      # or password_env: NAME; or token_file, token_env (Bearer)
          ca: hospital-ca.pem               # default: the system's
        dicom:                              # for C-STORE
          host: pacs.example.org
          port: 2762
          called: PACS                      # the AE titles that both sides know
          calling: PERMED
          tls: {ca: hospital-ca.pem, certificate: permed.pem, key: permed.key}
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from permed_compute.errors import NotFoundError, PermissionDeniedError, Problem, SettingsError, SpecError, WorkloadError
from permed_compute.spec import Purpose, parse_duration

SendBy = Literal["stow", "c-store"]
_TIMEOUT_S = 30
_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e](?:[\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?")


class ArchiveRefusedError(WorkloadError):
    """The archive answered no: wrong credentials, AE title not allowed, no such service. Asking again changes nothing
    (and locks accounts), so its `code` is the one that is not retried."""


@dataclass(frozen=True, slots=True)
class Web:
    """A DICOMweb service; secrets by where they are."""

    url: str
    user: str = ""
    password_file: str = ""
    password_env: str = ""
    token_file: str = ""
    token_env: str = ""
    ca: str = ""


@dataclass(frozen=True, slots=True)
class Tls:
    """DICOM TLS (PS3.15 B.9): who signs the peers, and our own certificate."""

    ca: str
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Dimse:
    """A C-STORE provider."""

    host: str
    port: int
    called: str
    calling: str
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One archive as the file has it. clinical: what it holds is looked at by those who treat."""

    name: str
    clinical: bool
    timeout: int
    web: Web | None
    dimse: Dimse | None

    def accept(self, purpose: Purpose) -> None:
        """Raise `PermissionDeniedError` where results of that purpose must not come here."""
        if self.clinical and purpose is not Purpose.CARE:
            raise PermissionDeniedError(
                f"Archive {self.name} is clinical and takes results of purpose care only; this is {purpose.value}.",
                remedy="Return research to an archive that is not clinical, or keep it with the job's results.",
            )

    def way(self, wanted: str = "") -> SendBy:
        """How results are sent: as asked, else STOW where there is DICOMweb. Raises `SettingsError`."""
        ways: dict[str, Any] = {"stow": self.web, "c-store": self.dimse}
        for way in [wanted] if wanted else ways:
            if ways[way] is not None:
                return way  # type: ignore[return-value]
        raise SettingsError(
            f"Archive {self.name} cannot be sent to{f' by {wanted}' if wanted else ''}.",
            remedy="Its entry in the archives file needs dicomweb (stow) or dicom (c-store).",
        )


def read_archives(path: Path) -> dict[str, Entry]:
    """The archives of that file, by name. Relative files in it start at its folder.

    Raises `NotFoundError`; `SpecError` naming all that is wrong, a secret that stands in it among them.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise NotFoundError("There is no archives file.", remedy="Name it as the job's input `archives`.") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise SpecError("archives file", [Problem("file", "is not YAML", line=line)]) from None
    rows = data.get("archives") if isinstance(data, dict) else None
    if not isinstance(rows, dict) or not rows:
        raise SpecError("archives file", [Problem("archives", "is not a mapping of names to archives")])
    reader = _Reader(path.resolve().parent)
    entries = {str(name): reader.entry(str(name), row) for name, row in rows.items()}
    if reader.problems:
        raise SpecError("archives file", reader.problems)
    return entries


@dataclass(slots=True)
class _Reader:
    """Turns rows into entries and gathers every problem. Values are never quoted: one may be a misplaced password."""

    folder: Path
    problems: list[Problem] = field(default_factory=list)

    def entry(self, name: str, row: Any) -> Entry:
        row = self._mapping(name, row, {"clinical", "timeout", "dicomweb", "dicom"})
        clinical = row.get("clinical")
        if not isinstance(clinical, bool):
            self._wrong(f"{name}.clinical", "is not true or false", "Say which: true takes results of care only.")
        try:
            timeout = parse_duration(row.get("timeout", f"{_TIMEOUT_S}s"))
        except ValueError:
            timeout = 0
        if not 0 < timeout <= 3600:
            self._wrong(f"{name}.timeout", "is not a time such as 30s")
        if "dicomweb" not in row and "dicom" not in row:
            self._wrong(name, "has neither dicomweb nor dicom")
        web = self._web(f"{name}.dicomweb", row["dicomweb"]) if "dicomweb" in row else None
        dimse = self._dimse(f"{name}.dicom", row["dicom"]) if "dicom" in row else None
        return Entry(name, clinical is True, timeout, web, dimse)

    def _web(self, where: str, row: Any) -> Web:
        keys = {"url", "user", "password_file", "password_env", "token_file", "token_env", "ca"}
        row = self._mapping(where, row, keys)
        url = urlsplit(str(row.get("url") or ""))
        if url.scheme not in ("http", "https") or not url.hostname:
            self._wrong(f"{where}.url", "is not a http(s) address")
        elif url.username or url.password or url.query:
            self._wrong(f"{where}.url", "holds credentials or a query", "Write user and password_file beside it.")
        elif url.scheme == "http" and not is_loopback(url.hostname):
            self._wrong(f"{where}.url", "is http beyond this machine", "Use https: images and password would be read.")
        values = {key: str(row[key]) for key in keys if row.get(key)}
        return Web(**{"url": ""} | {key: self._path(key, value) for key, value in values.items()})

    def _dimse(self, where: str, row: Any) -> Dimse:
        row = self._mapping(where, row, {"host", "port", "called", "calling", "tls"})
        port = row.get("port")
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
            self._wrong(f"{where}.port", "is not a port")
            port = 0
        if not row.get("host"):
            self._wrong(f"{where}.host", "is missing")
        for title in ("called", "calling"):
            if not is_title(str(row.get(title) or "")):
                self._wrong(f"{where}.{title}", "is not an AE title: 1 to 16 characters, no backslash")
        tls = None
        if "tls" in row:
            given = self._mapping(f"{where}.tls", row["tls"], {"ca", "certificate", "key"})
            if not given.get("ca"):
                self._wrong(f"{where}.tls.ca", "is missing", "Without it nobody knows who answers.")
            tls = Tls(**{"ca": ""} | {key: self._path("ca", str(value)) for key, value in given.items()})
        return Dimse(str(row.get("host")), port, str(row.get("called")), str(row.get("calling")), tls)

    def _mapping(self, where: str, row: Any, keys: set[str]) -> dict[str, Any]:
        if not isinstance(row, dict):
            self._wrong(where, "is not a mapping")
            return {}
        for key in sorted(set(map(str, row)) - keys):
            secret = key.lower() in ("password", "token", "secret", "passwd")
            remedy = f"Write {key}_file or {key}_env." if secret else f"Keys are {', '.join(sorted(keys))}."
            self._wrong(
                f"{where}.{key}", "holds a secret, which no file of ours may" if secret else "is no key", remedy
            )
        return {str(key): value for key, value in row.items() if str(key) in keys}

    def _path(self, key: str, value: str) -> str:
        return str(self.folder / value) if key.endswith("_file") or key == "ca" else value

    def _wrong(self, where: str, what: str, remedy: str = "") -> None:
        self.problems.append(Problem(where, what, remedy=remedy))


def is_title(text: str) -> bool:
    """An AE title (PS3.5 6.2): 1 to 16 characters without backslash, no leading or trailing space."""
    return bool(_TITLE.fullmatch(text))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def secret(file: str, variable: str, name: str) -> str:
    """A password or token from a private file or the environment. The words of errors are ours."""
    if variable:
        value = os.environ.get(variable, "")
        if not value:
            raise ArchiveRefusedError(f"The environment variable with the secret of archive {name} is not set.")
        return value
    try:
        mode = Path(file).stat().st_mode
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ArchiveRefusedError(f"The file with the secret of archive {name} cannot be read.") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ArchiveRefusedError(f"Others may read the secret of archive {name}.", remedy="chmod 600 FILE")
    return text

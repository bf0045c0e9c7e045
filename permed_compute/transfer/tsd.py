"""TSD's file API: import by the resumable protocol of `tsd-api-client`, export by ranged downloads.

The client is USIT's own library. It prints, it draws bars and it leaves by `sys.exit`, with file names in all of it:
here its words go nowhere, and what becomes of each request is seen by the session that it is given.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from permed_compute.errors import NoRoomError, NotFoundError, PermissionDeniedError, TransferError
from permed_compute.transfer.destinations import TsdDestination, permit
from permed_compute.transfer.folder import of_os, require_room
from permed_compute.transfer.port import CHUNK, Moved, Volume

if TYPE_CHECKING:
    from requests import Response

_PART = 50_000_000
"""Bytes per request, as tacl sends them: what a cut costs at most."""
_SPOOLED = 1 << 30
"""Largest volume: the client sends files, so one volume at a time stands in a private folder of the home."""
_TIMEOUT_S = (10, 300)


class Tsd:
    """One project's file API."""

    largest = _SPOOLED

    def __init__(self, entry: TsdDestination, spool: Path) -> None:
        self._entry = entry
        self._spool = spool
        self._group = entry.group or f"{entry.project}-member-group"
        self._token = ""
        self._session: Any = None

    def __enter__(self) -> Self:
        try:
            import tsdapiclient.fileapi  # noqa: F401 - is it there?
        except ImportError:
            raise TransferError(
                "TSD's file API needs tsd-api-client, which is not installed.",
                remedy="pip install 'permed-compute[transfer]'",
            ) from None
        self._token = _token(self._entry)
        self._session = _session()
        return self

    def __exit__(self, *exc: object) -> None:
        self._session.close()

    def put(self, volume: Volume, moved: Moved) -> None:
        from tsdapiclient import fileapi

        permit("This TSD project", self._entry, "send")
        if self._imported().get(volume.name) == volume.size:
            moved(volume.size)
            return
        with self._file(volume) as file:
            held, upload = self._held(volume.name)
            for tried in range(2):
                self._session.begin(held, moved)
                done = self._call(
                    fileapi.initiate_resumable, filename=str(file), chunksize=_PART, group=self._group, verify=True,
                    set_mtime=False, new=not held,
                )  # fmt: skip
                if done or not held or tried or self._session.failure or self._session.status >= 400:
                    break
                # The client found that what lies there is not this file's beginning.
                self._cancel(volume.name, upload)
                held = 0
            self._judge(done)
        # Not every project may list what it imports: what is not listed was taken at the server's word.
        if self._imported().get(volume.name, volume.size) != volume.size:
            raise TransferError(
                "TSD's file API took the volume but does not list it in full.", remedy="Send it again with --anew."
            )

    def forget(self, name: str) -> None:
        from tsdapiclient import fileapi

        permit("This TSD project", self._entry, "send")
        held, upload = self._held(name)
        if held:
            self._cancel(name, upload)
        if name in self._imported():
            self._judge(self._call(fileapi.import_delete, filename=f"/{name}", group=self._group))

    def sizes(self) -> Mapping[str, int]:
        from tsdapiclient import fileapi

        permit("This TSD project", self._entry, "receive")
        return self._listed(fileapi.export_list)

    def read(self, name: str, offset: int) -> Iterator[bytes]:
        """By our own ranged request: the client's download goes on only in the folder that it was started in."""
        from tsdapiclient.tools import file_api_url

        permit("This TSD project", self._entry, "receive")
        url = file_api_url(self._entry.env, self._entry.project, "files", endpoint=f"export/{name}")
        headers = {"Authorization": f"Bearer {self._token}", "Accept-Encoding": "*", "Range": f"bytes={offset}-"}
        with self._answering():
            answer = self._session.get(url, headers=headers, stream=True)
            self._judge(answer.ok)
            with answer:
                yield from answer.iter_content(CHUNK)

    # --------------------------------------------------------------------------------- the client, made quiet

    def _call(self, function: Callable[..., Any], **named: Any) -> Any:
        """What the client's function returns; None where it gave up."""
        with redirect_stdout(io.StringIO()), self._answering():
            try:
                return function(self._entry.env, self._entry.project, token=self._token, session=self._session, **named)
            except SystemExit as end:
                if end.code is None:  # how the client takes Ctrl-C
                    raise KeyboardInterrupt from None
                return None

    def _listed(self, function: Callable[..., Any], **named: Any) -> dict[str, int]:
        found: dict[str, int] = {}
        page = None
        while True:
            answer = self._call(function, page=page, **named)
            if answer is None or self._session.status != 404:  # no folder yet: the client makes an empty list of it
                self._judge(answer)
            found |= {str(row["filename"]): int(row["size"] or 0) for row in answer["files"]}
            page = answer.get("page")
            if not page:
                return found

    def _imported(self) -> dict[str, int]:
        from tsdapiclient import fileapi

        return self._listed(fileapi.import_list, group=self._group)

    def _held(self, name: str) -> tuple[int, str]:
        """(bytes that an upload which was cut left there, its id)."""
        from tsdapiclient import fileapi

        found = self._call(fileapi.get_resumable, filename=name)
        if self._session.status >= 400 and self._session.status != 404:
            self._judge(None)
        row = (found or {}).get("overview", {})
        offset = row.get("next_offset")
        return (int(offset) if isinstance(offset, int) else 0), str(row.get("id") or "")

    def _cancel(self, name: str, upload: str) -> None:
        from tsdapiclient import fileapi

        self._judge(self._call(fileapi.delete_resumable, filename=name, upload_id=upload))

    @contextmanager
    def _file(self, volume: Volume) -> Iterator[Path]:
        """The volume as a private file, for as long as it is sent."""
        file = self._spool / volume.name
        try:
            self._spool.mkdir(parents=True, exist_ok=True, mode=0o700)
            require_room(self._spool, volume.size)
            # Always the same name, so that what a killed sender left is written over and never piles up.
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as out:
                out.writelines(volume.read(0))
            yield file
        except OSError as error:
            raise of_os(error) from None
        finally:
            file.unlink(missing_ok=True)

    # --------------------------------------------------------------------------------- what went wrong

    @contextmanager
    def _answering(self) -> Iterator[None]:
        import requests

        try:
            yield
        except requests.RequestException as error:
            raise _unreachable(error) from None
        except _CutError:
            raise _unreachable(self._session.failure) from None

    def _judge(self, good: Any) -> None:
        """Raise what the last answer means, unless all is good."""
        if self._session.failure is not None:
            raise _unreachable(self._session.failure)
        status, why = self._session.status, self._session.reason
        if good and status < 400:
            return
        if status in (401, 403):
            raise PermissionDeniedError(
                "TSD does not accept the token for this.",
                remedy="Tokens last an hour: get a new one for this project, of the right kind (import or export).",
            )
        if status == 404:
            raise NotFoundError(
                "TSD has no such volume.", remedy="Has its export been approved, and is it still there?"
            )
        if status in (413, 507) or "quota" in why.lower():
            raise NoRoomError("The TSD project's storage is full.", remedy="Have room made there, then run it again.")
        raise TransferError(
            f"TSD's file API answered {status}.", remedy="Run it again later: it goes on from what is there."
        )


class _CutError(Exception):
    """A request that got no answer: not one of requests' errors, which the client would retry for half a minute."""


def _session() -> Any:
    import requests

    class Session(requests.Session):
        """Sees every request: counts what has arrived, keeps the last answer. No proxies, no .netrc, no redirects."""

        def __init__(self) -> None:
            super().__init__()
            self.trust_env = False
            self.status, self.reason = 0, ""
            self.failure: Exception | None = None
            self._there = 0
            self._moved: Moved = lambda there: None

        def begin(self, there: int, moved: Moved) -> None:
            self._there, self._moved = there, moved

        def request(self, method: Any, url: Any, *args: Any, **named: Any) -> Response:
            named |= {"timeout": named.get("timeout") or _TIMEOUT_S, "allow_redirects": False}
            self.failure = None
            try:
                answer = super().request(method, url, *args, **named)
            except (requests.ConnectionError, requests.Timeout) as error:
                self.failure = error
                raise _CutError from None
            self.status, self.reason = answer.status_code, answer.reason or ""
            data = named.get("data")
            if str(method).upper() == "PATCH" and answer.ok and isinstance(data, bytes):
                self._there += len(data)
                self._moved(self._there)
            return answer

    return Session()


def _unreachable(error: Exception | None) -> TransferError:
    return TransferError(
        f"TSD's file API was not reached, or the line was cut ({type(error).__name__}).",
        remedy="Are you on a network that TSD lets in? Run it again: it goes on from what is there.",
    )


def _token(entry: TsdDestination) -> str:
    if entry.token_env:
        return _jwt(os.environ.get(entry.token_env, ""))
    try:
        mode = Path(entry.token_file).stat().st_mode
        token = Path(entry.token_file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise PermissionDeniedError(
            "There is no token for TSD.", remedy="Name it by token_file or token_env in the destinations file."
        ) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PermissionDeniedError("Others may read TSD's token.", remedy="chmod 600 FILE")
    return _jwt(token)


def _jwt(token: str) -> str:
    if token.count(".") != 2:
        raise PermissionDeniedError(
            "The token for TSD is missing, or no token at all.",
            remedy="It is a JWT: three words with dots between them.",
        )
    return token

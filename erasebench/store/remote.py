"""Shared store of several machines, behind the local store.

Entries lie on an object store, or on any file system that fsspec knows.

    <url>/<kind>/<key>/<sha256>        a file of the entry, named by its content
    <url>/<kind>/<key>/manifest.json   {name: sha256}, written last: without it there is no entry
    <url>/leases/<key>/<n>             the maker's lease: a token of the holder's, and a counter

An object store has no rename, and two machines may make the same entry (see below) with different bytes. As files
are named by content, neither overwrites the other's, and the last manifest written names files that are all present
and of one maker.

A lease keeps several machines from making the same entry. Its holder counts in it; a machine that has seen it
unchanged for `lease` seconds of its own monotonic clock takes over by creating number n + 1, which only one can if
the store creates exclusively (S3, file systems). So no machine's clock is compared with another's, and each lease is
written by its holder alone: a holder that was only slow cannot undo a takeover. Then two make the entry, which costs
time and nothing else.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fsspec.core import url_to_fs

from ..contracts import ErasebenchError
from ..redaction import masked, redact
from .manifest import MANIFEST, Damaged, files_of

log = logging.getLogger("erasebench")
S3 = {"config_kwargs": {"retries": {"mode": "standard", "max_attempts": 8}}}
OPTIONS = {"file": {"auto_mkdir": True}, "s3": S3, "s3a": S3}
DAY = 86400
# paths that the store writes below its root: files by content or half copied, manifests, leases
OWN = re.compile(
    rf"[\w-]+/[0-9a-f]{{64}}/([0-9a-f]{{64}}|{re.escape(MANIFEST)})(\.[0-9a-f]+)?|leases/[0-9a-f]{{64}}/\d+"
)


class Remote:
    """Store at `url`; `lease` is in seconds.

    Every error of the remote store is raised as ErasebenchError.
    """

    def __init__(self, url: str, lease: float):
        self.url, self.seconds = url, lease
        self._seen: dict[str, tuple[tuple[int, bytes | None], float]] = {}
        protocol, separator, _ = url.partition("://")
        if not separator:
            raise self._refused("a URL is needed, such as s3://bucket/folder or file:///folder")
        try:
            self.fs, root = url_to_fs(url, use_listings_cache=False, **OPTIONS.get(protocol, {}))
        except ImportError as error:
            raise self._refused("pip install 'erasebench[s3]'" if protocol in ("s3", "s3a") else error) from None
        except Exception as error:
            raise self._refused(error) from None
        self.root = root.rstrip("/")

    def manifest(self, entry: str) -> bytes | None:
        """Return the manifest of <kind>/<key>, or None without such an entry."""
        return self._read(f"{self.root}/{entry}/{MANIFEST}")

    def download(self, entry: str, files: dict[str, str], folder: Path) -> None:
        """Download the entry's files into the folder.

        Raises Damaged if one is missing, OSError if the disk is full.
        """
        for name, checksum in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                self.fs.get_file(f"{self.root}/{entry}/{checksum}", str(folder / name))
            except FileNotFoundError as error:
                raise Damaged(f"{name} is missing") from error
            except Exception as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise self._refused(error) from None

    def upload(self, entry: str, folder: Path) -> None:
        with self._asking():
            for name, checksum in files_of((folder / MANIFEST).read_bytes()).items():
                self._put(folder / name, f"{self.root}/{entry}/{checksum}")
            self._put(folder / MANIFEST, f"{self.root}/{entry}/{MANIFEST}")

    def forget(self, entry: str) -> None:
        self._delete(f"{self.root}/{entry}/{MANIFEST}")

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder below the root."""
        with self._asking():
            try:
                return [path.rpartition("/")[2] for path in self.fs.ls(f"{self.root}/{folder}", detail=False)]
            except FileNotFoundError:
                return []

    @contextmanager
    def lease(self, key: str, token: str, wait: bool, gone: str = "") -> Iterator[bool]:
        """Yield whether we may make the entry; renew the lease within the context.

        Yields False at once if another machine holds the lease and `wait` is False. `token` is ours alone; the
        holder of token `gone` is known to be dead.
        """
        waited = False
        while (number := self._claim(key, token, gone)) is None:
            if not wait:
                yield False
                return
            if not waited:
                log.info("store: another machine is making %s, waiting for it", key[:12])
            waited = True
            time.sleep(self.seconds / 20)
        done = threading.Event()
        beats = threading.Thread(target=self._renew, args=(key, number, token, done), daemon=True)
        beats.start()
        try:
            yield True
        finally:
            done.set()
            beats.join()
            self._release(key, number)

    def gc(self) -> tuple[int, int]:
        """Remove old leftovers -> (number of objects, bytes).

        Leftovers are objects older than a day in entries without a manifest, and leases.
        """
        removed = freed = 0
        ours = re.compile(rf"{re.escape(self.root)}/({OWN.pattern})")
        with self._asking():
            found = {path: info for path, info in self.fs.find(self.root, detail=True).items() if ours.fullmatch(path)}
            whole = {path.rpartition("/")[0] for path in found if path.endswith(f"/{MANIFEST}")}
            for path, info in found.items():
                with suppress(FileNotFoundError):  # an upload or a lease that has ended
                    if path.rpartition("/")[0] not in whole and time.time() - self.fs.modified(path).timestamp() > DAY:
                        self.fs.rm_file(path)
                        removed, freed = removed + 1, freed + info["size"]
        return removed, freed

    def _claim(self, key: str, token: str, gone: str) -> int | None:
        """Return the number of the lease that we now hold.

        None if another holder may be alive.
        """
        before = time.monotonic()  # the time between two looks counts from after the first to before the second
        newest = max((int(name) for name in self.names(f"leases/{key}") if name.isdigit()), default=-1)
        if newest >= 0:
            look = newest, self._read(self._lease(key, newest))
            last, since = self._seen.get(key, (None, 0.0))
            dead = bool(gone) and (look[1] or b"").startswith(gone.encode())
            if look != last and not dead:
                self._seen[key] = look, time.monotonic()
                return None
            if before - since < self.seconds and not dead:
                return None
            log.warning("store: who was making %s is gone, taking over", key[:12])
        return newest + 1 if self._create(self._lease(key, newest + 1), f"{token} 0".encode()) else None

    def _renew(self, key: str, number: int, token: str, done: threading.Event) -> None:
        count = 0
        while not done.wait(self.seconds / 6):
            count += 1
            try:
                self.fs.pipe_file(self._lease(key, number), f"{token} {count}".encode())
            except Exception as error:  # the next renewal may succeed; if none does, another machine takes over
                log.warning("store: a lease could not be renewed (%s)", redact(str(error), self.url))

    def _release(self, key: str, number: int) -> None:
        """Delete our lease, after those that it took over.

        Never deletes one that took over ours.
        """
        try:
            for n in sorted(int(name) for name in self.names(f"leases/{key}") if name.isdigit()):
                if n <= number:
                    self._delete(self._lease(key, n))
        except ErasebenchError as error:  # the lease expires anyway
            log.warning("%s", error)

    def _lease(self, key: str, number: int) -> str:
        return f"{self.root}/leases/{key}/{number}"

    def _create(self, path: str, content: bytes) -> bool:
        """Create a file exclusively; return whether it did not exist."""
        with self._asking():
            try:
                with self.fs.open(path, "xb") as stream:
                    stream.write(content)
            except FileExistsError:  # the file is ours too if the response was lost and the client retried
                return self._read(path) == content
            except OSError as error:
                if "ConditionalRequestConflict" in str(error.__cause__):  # S3: two requests at once
                    return False
                raise
            return True

    def _read(self, path: str) -> bytes | None:
        with self._asking():
            try:
                return self.fs.cat_file(path, start=0)  # with a start s3fs does not ask for the size first
            except FileNotFoundError:
                return None

    def _put(self, file: Path, path: str) -> None:
        if not getattr(self.fs, "local_file", False):
            self.fs.put_file(str(file), path)
            return
        beside = f"{path}.{secrets.token_hex(8)}"  # a reader can see half a copy, but not half a rename
        try:
            self.fs.put_file(str(file), beside)
            self.fs.mv(beside, path)
        except BaseException:
            with suppress(Exception):  # it may not exist
                self.fs.rm_file(beside)
            raise

    def _delete(self, path: str) -> None:
        with self._asking(), suppress(FileNotFoundError):
            self.fs.rm_file(path)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except ErasebenchError:
            raise
        except Exception as error:  # from any client: no access, no bucket, no network
            raise self._refused(error) from None

    def _refused(self, why: Exception | str) -> ErasebenchError:
        """Return the error to raise, `from None`.

        A client's own error may hold the URL with its password.
        """
        said = " ".join(str(why).split()) or type(why).__name__
        return ErasebenchError(f"store.url={masked(self.url)}: {redact(said, self.url)}")

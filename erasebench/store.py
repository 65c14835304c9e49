"""Content-addressed get-or-make on a folder: nothing is computed twice, nothing half-made is ever read.

An entry is a folder <kind>/<key>: `identity.json` (the exact text whose sha256 is the key), the payload, and
`manifest.json` (sha256 of every payload file), written last. It is made in a sibling temporary folder and
renamed, so a process killed anywhere leaves only rubbish that `gc` removes.

Several machines share one store as a folder or by a URL. A shared folder must rename atomically, as NFS, Lustre and the like
do. If it also has flock across machines (NFS 4 has, Lustre when mounted with `flock`), an entry is made once; if not,
two may make the same one, and the first to rename it wins. With a URL (`remote.Remote`) the folder is this machine's cache.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .contracts import ErasebenchError

if TYPE_CHECKING:
    from .remote import Remote

log = logging.getLogger("erasebench")
MANIFEST, IDENTITY = "manifest.json", "identity.json"
CHECKSUM = re.compile("[0-9a-f]{64}")  # a key is one too
LEASE = 30.0  # seconds without a sign of life after which another machine may make an entry
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def home() -> Path:
    """$ERASEBENCH_HOME, or ~/.cache/erasebench."""
    return Path(os.environ.get("ERASEBENCH_HOME") or Path.home() / ".cache" / "erasebench")


def canonical(value: Any) -> str:
    """JSON with sorted keys; dataclasses become {type, fields}. Raises TypeError for anything without a text form."""

    def plain(x: Any) -> Any:
        if is_dataclass(x) and not isinstance(x, type):
            return {"type": f"{type(x).__module__}.{type(x).__qualname__}", **asdict(x)}
        raise TypeError(f"{type(x).__name__} has no canonical text")

    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=plain, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Damaged(Exception):
    """An entry whose files do not match its manifest."""


class Store:
    """A folder, by default of $ERASEBENCH_HOME; with a `url`, by default $ERASEBENCH_STORE, the cache of what lies there.
    `lease`: seconds after which another machine may make what a silent one was making."""

    def __init__(self, root: Path | None = None, url: str | None = None, lease: float = LEASE):
        self.root = Path(root or home()) / "store"
        self.url = url or os.environ.get("ERASEBENCH_STORE") or None
        self.lease = lease
        self._verified: set[Path] = set()
        self._shared: set[Path] = set()

    @cached_property
    def remote(self) -> Remote | None:
        """Raises ErasebenchError where the URL is not of a file system that is installed."""
        if self.url is None:
            return None
        from .remote import Remote

        return Remote(self.url, self.lease)

    def path(self, kind: str, identity: Any) -> Path:
        return self.root / kind / digest(identity)

    def has(self, kind: str, identity: Any) -> bool:
        """Whether the entry is there, without reading it."""
        path = self.path(kind, identity)
        return path.is_dir() or bool(self.remote and self.remote.manifest(entry_of(path)))

    def get(self, kind: str, identity: Any) -> Path | None:
        """The entry's folder if it is there and whole, else None; a damaged entry is reported and removed. With a URL it
        is fetched if it is not here, and uploaded if it is only here."""
        return self.find(kind, digest(identity))

    def find(self, kind: str, key: str) -> Path | None:
        """The entry of a key, as `get` returns it."""
        if not CHECKSUM.fullmatch(key):
            return None
        path = self.root / kind / key
        if not path.is_dir():
            return self._fetch(path)
        try:
            if path not in self._verified:
                check(path, key)
                self._verified.add(path)
        except Damaged as error:
            log.warning("store: %s/%s is damaged (%s) and will be made again", kind, key[:12], error)
            self._discard(path)
            return self._fetch(path)
        if self.remote and path not in self._shared:
            if self.remote.manifest(entry_of(path)) is None:
                self.remote.upload(entry_of(path), path)
            self._shared.add(path)
        os.utime(path / MANIFEST)  # gc goes by last use
        return path

    def keys(self, kind: str, prefix: str) -> list[str]:
        """Keys that begin with the prefix, of entries here or at the URL."""
        names = [path.name for path in (self.root / kind).glob("*")] + (self.remote.names(kind) if self.remote else [])
        return sorted({name for name in names if name.startswith(prefix) and CHECKSUM.fullmatch(name)})

    def get_or_make(self, kind: str, identity: Any, make: Callable[[Path], None], wait: bool = True) -> Path | None:
        """Return the entry's folder, calling `make(folder)` to fill it if it is not there. None, if we need not `wait`,
        where another process is making it.

        Two processes that want the same entry: the second waits for the first. Whatever `make` raises passes
        through and leaves nothing behind. Raises ErasebenchError if the store cannot be written or is full; what was
        made stays here if it could not be uploaded.
        """
        if found := self.get(kind, identity):
            return found
        path = self.path(kind, identity)
        with self._writing(), self._lock(path, wait) as ours:
            if not ours:
                return None
            if found := self.get(kind, identity):  # made by somebody else while we waited
                return found
            with self._filling(path) as temporary:
                make(temporary)
                (temporary / IDENTITY).write_text(canonical(identity), encoding="utf-8")
                _sync(temporary / MANIFEST, json.dumps(_checksums(temporary), indent=1, sort_keys=True))
            return self.find(kind, path.name)

    @contextmanager
    def claim(self, kind: str, identity: Any) -> Iterator[None]:
        """For whoever makes several entries at once: others with the same claim wait until it is given up, or its holder dies."""
        with self._writing(), self._lock(self.path(kind, identity), wait=True):
            yield

    def entries(self) -> Iterator[tuple[str, Path]]:
        for kind in sorted(p for p in self.root.glob("*") if p.is_dir() and p.name != "locks"):
            for path in sorted(kind.iterdir()):
                yield kind.name, path

    def _fetch(self, path: Path) -> Path | None:
        """The entry from the URL; what is damaged there is reported and removed."""
        if self.remote is None or (manifest := self.remote.manifest(entry_of(path))) is None:
            return None
        with self._writing():
            try:
                files = files_of(manifest)
                with self._filling(path) as temporary:
                    self.remote.download(entry_of(path), files, temporary)
                    _sync(temporary / MANIFEST, manifest.decode())
                    check(temporary, path.name)
            except Damaged as error:
                where = f"{entry_of(path)[:24]} of {self.url}"
                log.warning("store: %s is damaged (%s) and will be made again", where, error)
                self.remote.forget(entry_of(path))
                return None
        self._shared.add(path)
        return self.find(path.parent.name, path.name)

    @contextmanager
    def _filling(self, path: Path) -> Iterator[Path]:
        """A temporary folder that becomes the entry; or theirs is, if somebody made it meanwhile."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        temporary.mkdir(parents=True)
        try:
            yield temporary
            try:
                temporary.rename(path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            else:
                self._verified.add(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _discard(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was quicker
            return
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _lock(self, path: Path, wait: bool) -> Iterator[bool]:
        """One maker at a time for an entry. The kernel drops the lock when its holder dies; a lease at the URL expires."""
        lock = self.root / "locks" / path.name
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a+") as stream:
            alone = True
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                log.info("store: another process is making %s/%s, waiting for it", path.parent.name, path.name[:12])
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                alone = False
            if self.remote is None:
                yield True
                return
            stream.seek(0)
            gone = stream.read() if alone else ""  # who had the lock before us has no use for a lease any more
            token = secrets.token_hex(8)
            stream.truncate(0)
            stream.write(token)
            stream.flush()
            with self.remote.lease(path.name, token, wait, gone) as ours:
                yield ours

    def being_made(self, key: str) -> bool:
        """Whether a process that uses this folder holds the lock of the key's entry."""
        try:
            with (self.root / "locks" / key).open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no such lock, or none on this file system
            return False
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            said = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors, which has no errno
            number = int(said[1]) if said else getattr(error, "errno", None)
            if number in (errno.ENOSPC, errno.EDQUOT):
                advice = "free some space (python -m erasebench.store gc) or set ERASEBENCH_HOME to another disk"
            elif number in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
                advice = "set ERASEBENCH_HOME to a folder that can be written"
            else:
                raise
            raise ErasebenchError(
                f"the store {self.root} cannot be written ({os.strerror(number)}): {advice}"
            ) from error


def entry_of(path: Path) -> str:
    """<kind>/<key>."""
    return f"{path.parent.name}/{path.name}"


def files_of(manifest: bytes) -> dict[str, str]:
    """Relative path -> sha256. Raises Damaged for what is no manifest, or would name a file elsewhere."""
    try:
        files = json.loads(manifest.decode())
    except (ValueError, RecursionError) as error:
        raise Damaged("its manifest is not JSON") from error
    if not isinstance(files, dict) or not all(isinstance(c, str) and CHECKSUM.fullmatch(c) for c in files.values()):
        raise Damaged("its manifest is not one of checksums")
    folders = {".", *(str(folder) for name in files for folder in PurePosixPath(name).parents)}
    for name in files:
        path = PurePosixPath(name)
        plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
        if not (plain and name.isprintable() and len(name.encode()) < 256) or name in folders or name == MANIFEST:
            raise Damaged(f"its manifest names {name[:80]!r}")
    return files


def check(folder: Path, key: str) -> None:
    """Raises Damaged unless every file is as the manifest says and the identity is the key's."""
    try:
        files = files_of((folder / MANIFEST).read_bytes())
        text = (folder / IDENTITY).read_bytes()
    except OSError as error:
        raise Damaged(f"{type(error).__name__} reading its manifest") from error
    if hashlib.sha256(text).hexdigest() != key:
        raise Damaged("its identity does not hash to its key")
    for name, checksum in files.items():
        file = folder / name
        if not file.is_file() or sha256_file(file) != checksum:
            raise Damaged(f"checksum of {name}")


def _checksums(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def _sync(file: Path, text: str) -> None:
    """Write and flush to the disk, so that a rename never outlives its content."""
    with file.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m erasebench.store", description="Look after the store.")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("size", help="entries and bytes by kind (default)")
    commands.add_parser("list", help="one line an entry: kind, key, size, days since last use")
    gc = commands.add_parser("gc", help="remove what killed processes left, damaged entries, and old ones")
    gc.add_argument("--older", type=float, metavar="DAYS", help="also remove entries not used for so many days")
    args = parser.parse_args(argv)
    store, now = Store(), time.time()
    elsewhere = f" (a cache of {store.url}, which is not counted)" if store.url else ""

    def unused_days(path: Path) -> float:
        manifest = path / MANIFEST
        return (now - (manifest if manifest.exists() else path).stat().st_mtime) / 86400

    if args.command == "list":
        for kind, path in store.entries():
            print(f"{kind:10} {path.name[:16]:16} {_size(path) / 1e6:9.2f} MB {unused_days(path):7.1f} d")
        print(f"in {store.root}{elsewhere}")
    elif args.command == "gc":
        removed = freed = 0
        for _, path in store.entries():
            leftover = path.name.startswith(".")
            if leftover and (unused_days(path) < 1 or store.being_made(path.name.split(".")[1])):
                continue  # a running process may still be filling it
            try:
                if not leftover:
                    check(path, path.name)
                drop = leftover or (args.older is not None and unused_days(path) > args.older)
            except Damaged:
                drop = True
            if drop:
                removed, freed = removed + 1, freed + _size(path)
                shutil.rmtree(path, ignore_errors=True)
        for lock in (store.root / "locks").glob("*"):
            if unused_days(lock) >= 1 and not store.being_made(lock.name):
                lock.unlink(missing_ok=True)
        print(f"removed {removed} entries, {freed / 1e6:.1f} MB")
        try:
            if store.remote:
                removed, freed = store.remote.gc()
                print(f"removed {removed} leftover files, {freed / 1e6:.1f} MB, of {store.url}")
        except ErasebenchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    else:
        sizes: dict[str, tuple[int, int]] = {}
        for kind, path in store.entries():
            count, total = sizes.get(kind, (0, 0))
            sizes[kind] = (count + 1, total + _size(path))
        for kind, (count, total) in sizes.items():
            print(f"{kind:10} {count:7} entries {total / 1e6:10.1f} MB")
        print(
            f"{'total':10} {sum(c for c, _ in sizes.values()):7} entries "
            f"{sum(t for _, t in sizes.values()) / 1e6:10.1f} MB in {store.root}{elsewhere}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

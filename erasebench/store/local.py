"""Content-addressed get-or-make on a folder.

Nothing is computed twice, and nothing incomplete is ever read.

An entry is a folder <kind>/<key>: `identity.json` (the exact text whose sha256 is the key), the payload, and
`manifest.json` (sha256 of every payload file), written last. It is made in a sibling temporary folder and renamed,
so a process killed anywhere leaves only rubbish that `gc` removes.

Only a wrong checksum, a wrong format, or a missing file is damage. An entry that cannot be read now is an error and
stays as it is. Several users share a store whose folder they may all write, and read one that they may not write (or
that is mounted read-only).

Several machines share one store as a folder or by a URL. A shared folder must rename atomically, as NFS, Lustre and
the like do. If it also has flock across machines (NFS 4 has, Lustre when mounted with `flock`), an entry is made
once; if not, two may make the same one, and the first to rename it wins. With a URL (`remote.Remote`) the folder is
this machine's cache.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, is_dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError

from ..contracts import ErasebenchError
from ..redaction import masked
from .manifest import CHECKSUM, IDENTITY, MANIFEST, Damaged, files_of

if TYPE_CHECKING:
    from .remote import Remote

log = logging.getLogger("erasebench")
KIND = re.compile(r"[\w-]+")
LEFTOVER = re.compile(r"\.[0-9a-f]+\.[0-9a-f]+")  # folders that a killed process was filling or removing
SYSTEM = re.compile(r"\.nfs[0-9a-f]+|\.DS_Store")  # files that an operating system puts anywhere
LEASE = 30.0  # seconds without a sign of life after which another machine may make an entry
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)  # NFS cannot lock files open for reading
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
FAULTY = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
PAUSES = (0.05, 0.2, 0.5)  # seconds before each further attempt to read
Read = TypeVar("Read")


def home() -> Path:
    """Return $ERASEBENCH_HOME, or ~/.cache/erasebench."""
    return Path(os.environ.get("ERASEBENCH_HOME") or Path.home() / ".cache" / "erasebench")


def canonical(value: Any) -> str:
    """Return JSON with sorted keys; dataclasses become {type, fields}.

    Raises TypeError for anything without a text form.
    """

    def plain(x: Any) -> Any:
        if is_dataclass(x) and not isinstance(x, type):
            return {"type": type_name(type(x)), **asdict(x)}
        raise TypeError(f"{type(x).__name__} has no canonical text")

    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=plain, separators=(",", ":"), allow_nan=False)


def type_name(kind: type) -> str:
    """Return the name of a dataclass in a key.

    This package's classes are named without their module, whose file may move; others with it.
    """
    ours = kind.__module__.partition(".")[0] == "erasebench"
    return kind.__qualname__ if ours else f"{kind.__module__}.{kind.__qualname__}"


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_once(path: Path) -> str:
    """Return the hash of a file of weights, cached within a process.

    It is read again if the file's size, time or inode changes.
    """
    state = Path(path).stat()
    return _sha256(Path(path), (state.st_size, state.st_mtime_ns, state.st_ino))


@cache
def _sha256(path: Path, state: tuple[int, ...]) -> str:
    return sha256_file(path)


class Unreadable(ErasebenchError):
    """A place in the store that cannot be read now.

    There is no evidence that it is damaged.
    """


def patiently(read: Callable[[], Read], place: Path) -> Read:
    """Return the value of `read`, after several attempts if it fails.

    Raises Unreadable; errors in ABSENT pass through at once.
    """
    for pause in (*PAUSES, None):
        try:
            return read()
        except ABSENT:
            raise
        except OSError as error:
            if pause is None or error.errno in FORBIDDEN:
                why = error.strerror or type(error).__name__
                raise Unreadable(f"the store's {place} cannot be read ({why}) and stays as it is") from error
        time.sleep(pause)
    raise AssertionError


class Store:
    """A folder of entries, by default in $ERASEBENCH_HOME.

    With a `url`, by default $ERASEBENCH_STORE, the folder is the cache of the store there. `lease`: seconds after
    which another machine may make the entry of a silent one.
    """

    def __init__(self, root: Path | None = None, url: str | None = None, lease: float = LEASE):
        self.root = Path(root or home()) / "store"
        self.url = url or os.environ.get("ERASEBENCH_STORE") or None
        self.lease = lease
        self._verified: set[Path] = set()
        self._shared: set[Path] = set()

    @cached_property
    def remote(self) -> Remote | None:
        """Remote store at the URL, or None without one.

        Raises ErasebenchError if the URL's file system is not installed.
        """
        if self.url is None:
            return None
        from .remote import Remote

        return Remote(self.url, self.lease)

    def path(self, kind: str, identity: Any) -> Path:
        return self.root / kind / digest(identity)

    def has(self, kind: str, identity: Any) -> bool:
        """Return whether the entry exists, without reading it."""
        path = self.path(kind, identity)
        return _is_there(path) or bool(self.remote and self.remote.manifest(entry_of(path)))

    def get(self, kind: str, identity: Any) -> Path | None:
        """Return the entry's folder if it exists and is whole, else None.

        A damaged entry is reported and removed. With a URL, a missing entry is downloaded, and one that is only here
        is uploaded.
        """
        return self.find(kind, digest(identity))

    def find(self, kind: str, key: str) -> Path | None:
        """Return the entry of a key, like `get`."""
        if not CHECKSUM.fullmatch(key):
            return None
        path = self.root / kind / key
        if not _is_there(path):
            return self._fetch(path)
        try:
            if path not in self._verified:
                check(path, key)
                self._verified.add(path)
        except Damaged as error:
            log.warning("store: %s/%s is damaged (%s) and will be made again", kind, key[:12], error)
            return self._fetch(path) if self._discard(path) else self.find(kind, key)
        if self.remote and path not in self._shared:
            if self.remote.manifest(entry_of(path)) is None:
                self.remote.upload(entry_of(path), path)
            self._shared.add(path)
        with suppress(OSError):  # gc goes by last use; we may lack permission to note it
            os.utime(path / MANIFEST)
        return path

    def keys(self, kind: str, prefix: str) -> list[str]:
        """Return the keys of entries that begin with the prefix.

        The entries are here or at the URL.
        """
        names = [path.name for path in _listed(self.root / kind)] + (self.remote.names(kind) if self.remote else [])
        return sorted({name for name in names if name.startswith(prefix) and CHECKSUM.fullmatch(name)})

    def get_or_make(self, kind: str, identity: Any, make: Callable[[Path], None], wait: bool = True) -> Path | None:
        """Return the entry's folder, calling `make(folder)` if it is missing.

        Returns None if another process is making it and `wait` is False.

        If two processes want the same entry, the second waits for the first. An exception of `make` passes through
        and leaves nothing behind. Raises ErasebenchError if the store cannot be read or written, or is full; a
        finished entry stays here if it could not be uploaded.
        """
        if found := self.get(kind, identity):
            return found
        path = self.path(kind, identity)
        with self._writing(), self._lock(path, wait) as ours:
            if not ours:
                return None
            if found := self.get(kind, identity):  # another process made it while we waited
                return found
            with self._filling(path) as temporary:
                make(temporary)
                _sync(temporary / IDENTITY, canonical(identity))
                _seal(temporary)
                self._share(temporary / MANIFEST)
            return self.find(kind, path.name)

    @contextmanager
    def claim(self, kind: str, identity: Any) -> Iterator[None]:
        """Claim the making of several entries at once.

        Others with the same claim wait until it is given up, or its holder dies.
        """
        with self._writing(), self._lock(self.path(kind, identity), wait=True):
            yield

    def entries(self) -> Iterator[tuple[str, Path]]:
        """Yield (kind, path) of every entry and every leftover of killed processes.

        Foreign files are left out.
        """
        for kind in _listed(self.root):
            if kind.name != "locks" and KIND.fullmatch(kind.name) and not kind.is_symlink():
                yield from ((kind.name, path) for path in _listed(kind) if _is_own(path))

    def remove(self, path: Path) -> bool:
        """Remove an entry or a leftover; return whether nothing of it remains."""
        if not path.name.startswith("."):
            aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
            path.rename(aside)  # no reader may find half of it
            path = aside
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        return not os.path.lexists(path)

    def _fetch(self, path: Path) -> Path | None:
        """Download the entry from the URL.

        An entry that is damaged there is reported and removed.
        """
        if self.remote is None or (manifest := self.remote.manifest(entry_of(path))) is None:
            return None
        with self._writing():
            try:
                self._download(path, manifest)
            except Damaged as error:
                where = f"{entry_of(path)[:24]} of {masked(self.url)}"
                log.warning("store: %s is damaged (%s) and will be made again", where, error)
                self.remote.forget(entry_of(path))
                return None
        self._shared.add(path)
        return self.find(path.parent.name, path.name)

    def _download(self, path: Path, manifest: bytes) -> None:
        """Download an entry, trying twice if it is damaged.

        Raises Damaged the second time: a transfer may be cut off without an error.
        """
        files, remote = files_of(manifest), self.remote
        assert remote is not None
        for last in (False, True):
            try:
                with self._filling(path) as temporary:
                    remote.download(entry_of(path), files, temporary)
                    _sync(temporary / MANIFEST, manifest.decode())
                    check(temporary, path.name)
                    self._share(temporary / MANIFEST)
                return
            except Damaged:
                if last:
                    raise

    @contextmanager
    def _filling(self, path: Path) -> Iterator[Path]:
        """Yield a temporary folder that becomes the entry.

        If another process has made the entry meanwhile, that one is kept.
        """
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        self._folder(path.parent)
        temporary.mkdir()
        try:
            yield temporary
            self._place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _place(self, temporary: Path, path: Path) -> None:
        """Rename a folder to the entry, unless a whole one exists.

        Another process may have made it meanwhile.
        """
        for last in (False, True):
            try:
                temporary.rename(path)
                self._verified.add(path)
                return
            except OSError as error:
                if last or error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
            try:
                return check(path, path.name)
            except Damaged:
                self._discard(path)

    def _discard(self, path: Path) -> bool:
        """Remove a damaged entry.

        Returns False if it is whole after all, because another process has made it again.
        """
        aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was quicker
            return True
        except OSError as error:
            raise ErasebenchError(
                f"the store's {path} is damaged and cannot be removed ({error.strerror}): "
                "remove it, or set ERASEBENCH_HOME to another folder"
            ) from error
        try:
            check(aside, path.name)
        except Damaged:
            self.remove(aside)
            return True
        except Unreadable:
            aside.rename(path)
            raise
        with suppress(OSError):  # another process has made it a third time
            aside.rename(path)
        self.remove(aside)
        return False

    def _folder(self, folder: Path) -> None:
        """Make a folder of the store, for all users of its root."""
        self.root.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir()
            self._share(folder)

    def _share(self, path: Path) -> None:
        """Give write access to everyone with access to the root.

        These are the users who may write the store's root, whatever the umask.
        """
        with suppress(OSError):
            if others := self.root.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                path.chmod(stat.S_IMODE(path.stat().st_mode) | others)

    @contextmanager
    def _lock(self, path: Path, wait: bool) -> Iterator[bool]:
        """Lock an entry for its maker.

        The kernel drops the lock when its holder dies; a lease at the URL expires.
        """
        self._folder_of_locks()
        with self._lock_file(path.name, os.O_CREAT) or nullcontext() as stream:
            alone = stream is not None
            try:
                if alone:
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
            token = secrets.token_hex(8)
            gone = _exchange(stream, token) if stream else ""
            with self.remote.lease(path.name, token, wait, gone if alone else "") as ours:
                yield ours

    def _folder_of_locks(self) -> None:
        try:
            self._folder(self.root / "locks")
        except OSError as error:
            if error.errno not in FORBIDDEN:  # without it nothing can be made either, and existing entries need no lock
                raise

    def _lock_file(self, name: str, create: int = 0) -> IO[str] | None:
        """Open an entry's lock file.

        It may belong to another user, and we can hold it too. None if we may not open it.
        """
        file = self.root / "locks" / name
        for flags in (os.O_RDWR, os.O_RDWR | create, os.O_RDONLY):  # O_CREAT is refused for another user's file in /tmp
            try:
                descriptor = os.open(file, flags | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in FORBIDDEN:
                    raise
                continue
            if flags & os.O_CREAT:
                self._share(file)
            return os.fdopen(descriptor, "r" if flags == os.O_RDONLY else "r+", errors="replace")
        return None

    def being_made(self, key: str) -> bool:
        """Return whether a process of this folder is making the key's entry.

        It then holds the entry's lock, as far as we can know.
        """
        if not os.path.lexists(self.root / "locks" / key):
            return False
        try:
            if (stream := self._lock_file(key)) is None:  # it belongs to another user
                return os.path.lexists(self.root / "locks" / key)
            with stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no locks on this file system
            return False
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            said = re.search(r"\(os error (\d+)\)", str(error))  # errors of safetensors have no errno
            number = int(said[1]) if said else getattr(error, "errno", None)
            named = getattr(error, "filename", None)
            ours = named is None or str(named).startswith(str(self.root)) or str(self.root).startswith(str(named))
            if number in FULL:
                advice = "free some space (python -m erasebench store gc) or set ERASEBENCH_HOME to another disk"
            elif ours and number in (*FORBIDDEN, errno.ENOTDIR):
                advice = "set ERASEBENCH_HOME to a folder that can be written"
            elif ours and number in FAULTY:
                advice = "repeat the command; nothing half-made is left"
            else:
                raise
            raise ErasebenchError(
                f"the store {self.root} cannot be written ({os.strerror(number)}): {advice}"
            ) from error


def entry_of(path: Path) -> str:
    """Return <kind>/<key> of an entry."""
    return f"{path.parent.name}/{path.name}"


def check(folder: Path, key: str) -> None:
    """Raise Damaged unless the folder matches its manifest and key.

    The files must be those of the manifest, and the identity that of the key. Raises Unreadable if the folder cannot
    be read.
    """
    name = MANIFEST
    try:
        files = files_of(patiently((folder / MANIFEST).read_bytes, folder / MANIFEST))
        name = IDENTITY
        if hashlib.sha256(patiently((folder / IDENTITY).read_bytes, folder / IDENTITY)).hexdigest() != key:
            raise Damaged("its identity does not hash to its key")
        if more := sorted(_contents(folder) - {*files, MANIFEST}):
            raise Damaged(f"its manifest does not name {more[0][:80]!r}")
        for name, checksum in files.items():
            if patiently(partial(_checksum, folder / name), folder / name) != checksum:
                raise Damaged(f"checksum of {name}")
    except ABSENT as error:
        raise Damaged(f"{name} is missing") from error


def _contents(folder: Path) -> set[str]:
    """Return relative paths of the files in a folder.

    Includes links to folders.
    """

    def fail(error: OSError) -> None:
        raise error

    def walk() -> set[str]:
        found: set[str] = set()
        for place, folders, files in os.walk(folder, onerror=fail):
            links = [name for name in folders if os.path.islink(os.path.join(place, name))]
            own = (name for name in files if not SYSTEM.fullmatch(name))
            found.update(str(Path(place, name).relative_to(folder)) for name in (*own, *links))
        return found

    return patiently(walk, folder)


def _checksum(file: Path) -> str:
    if not stat.S_ISREG(file.stat().st_mode):
        raise IsADirectoryError(file)
    return sha256_file(file)


def _is_there(path: Path) -> bool:
    try:
        patiently(path.stat, path)
    except ABSENT:
        return False
    return True


def _listed(folder: Path) -> list[Path]:
    """Return the content of a folder, by name.

    Empty if the folder does not exist or we may not read it.
    """
    try:
        return sorted(Path(entry.path) for entry in patiently(lambda: list(os.scandir(folder)), folder))
    except (*ABSENT, Unreadable):
        return []


def _is_own(path: Path) -> bool:
    """Return whether the store seems to have made a path.

    Decided by its name, and for an entry also by the names in it.
    """
    if LEFTOVER.fullmatch(path.name):
        return not path.is_symlink()
    if not CHECKSUM.fullmatch(path.name) or path.is_symlink():
        return False
    return any(os.path.lexists(path / name) for name in (MANIFEST, IDENTITY))


def _is_certainly_own(path: Path) -> bool:
    """Return whether a damaged entry was made by this store.

    Others name folders by checksums too, and files manifest.json.
    """
    with suppress(OSError):
        if hashlib.sha256((path / IDENTITY).read_bytes()).hexdigest() == path.name:
            return True
    with suppress(OSError, Damaged):
        return bool(files_of((path / MANIFEST).read_bytes()))
    return False


def _seal(folder: Path) -> None:
    """Write the manifest.

    Raises ErasebenchError for a file that it cannot name.
    """
    made = {name: _checksum(folder / name) for name in sorted(_contents(folder))}
    text = json.dumps(made, indent=1, sort_keys=True)
    try:
        files_of(text.encode())
    except Damaged as error:
        raise ErasebenchError(f"a file that the store cannot hold: {error}") from error
    _sync(folder / MANIFEST, text)


def _exchange(stream: IO[str], token: str) -> str:
    """Write our token into a lock file; return the previous token, if known."""
    stream.seek(0)
    gone = stream.read()
    if stream.writable():
        stream.seek(0)
        stream.truncate()
        stream.write(token)
        stream.flush()
    return gone


def _sync(file: Path, text: str) -> None:
    """Write a file and flush it to the disk.

    A rename thus never outlives its content.
    """
    try:
        with file.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        error.filename = error.filename or str(file)
        raise


# -- commands -----------------------------------------------------------------------------------------------------------


def _files(path: Path) -> Iterator[os.stat_result]:
    """Yield the status of a folder and of everything in it.

    Skips files that are gone: another process may be filling or removing it.
    """
    for place, _, names in os.walk(path):
        for file in (place, *(os.path.join(place, name) for name in names)):
            with suppress(OSError):
                yield os.lstat(file)
    if path.is_file():
        with suppress(OSError):
            yield os.lstat(path)


def _size(path: Path) -> int:
    return sum(file.st_size for file in _files(path) if stat.S_ISREG(file.st_mode))


def _unused_days(path: Path) -> float:
    """Return the days since an entry's last use.

    For an unfinished entry, the days since its last write.
    """
    with suppress(OSError):
        return (time.time() - os.stat(path / MANIFEST).st_mtime) / 86400
    return (time.time() - max((file.st_mtime for file in _files(path)), default=time.time())) / 86400


def size(store: Store, elsewhere: str) -> int:
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


def list_entries(store: Store, elsewhere: str) -> int:
    for kind, path in store.entries():
        print(f"{kind:10} {path.name[:16]:16} {_size(path) / 1e6:9.2f} MB {_unused_days(path):7.1f} d")
    print(f"in {store.root}{elsewhere}")
    return 0


def _is_rubbish(store: Store, path: Path, older: float) -> bool:
    if path.name.startswith("."):  # a running process may still be filling it
        return _unused_days(path) >= 1 and not store.being_made(path.name.split(".")[1])
    try:
        check(path, path.name)
    except Damaged:
        return _is_certainly_own(path) and not store.being_made(path.name)
    return _unused_days(path) > older and not store.being_made(path.name)


def gc(store: Store, older: float) -> int:
    """Remove leftovers of killed processes, damaged entries, and old entries.

    Entries unused for longer than `older` days are old. Returns 1 if any of these stays.
    """
    removed = freed = 0
    problems: list[str] = []
    for kind, path in store.entries():
        try:
            if _is_rubbish(store, path, older):
                held = _size(path)
                if not store.remove(path):
                    raise PermissionError(errno.EACCES, "a file in it stays")
                removed, freed = removed + 1, freed + held
        except FileNotFoundError:  # another process removed it
            continue
        except Unreadable as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{kind}/{path.name[:16]} cannot be removed ({error.strerror})")
    for lock in _listed(store.root / "locks"):
        if CHECKSUM.fullmatch(lock.name) and _unused_days(lock) >= 1 and not store.being_made(lock.name):
            with suppress(OSError):
                lock.unlink()
    print(f"removed {removed} entries, {freed / 1e6:.1f} MB")
    try:
        if store.remote:
            removed, freed = store.remote.gc()
            print(f"removed {removed} leftover files, {freed / 1e6:.1f} MB, of {masked(store.url)}")
    except ErasebenchError as error:
        problems.append(str(error))
    if problems:
        print(f"error: {problems[0]}{f', and {len(problems) - 1} more' * (len(problems) > 1)}", file=sys.stderr)
    return int(bool(problems))


def look_after(command: str, older: float | None = None) -> int:
    """Print the store's size or list, or clean it (gc); return an exit code."""
    store = Store()
    elsewhere = f" (a cache of {masked(store.url)}, which is not counted)" if store.url else ""
    try:
        if command == "gc":
            return gc(store, math.inf if older is None else older)
        return (list_entries if command == "list" else size)(store, elsewhere)
    except BrokenPipeError:  # nobody reads the rest, as after `| head`
        raise
    except (ErasebenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

"""Content-addressed get-or-make on a folder: nothing is computed twice, nothing half-made is ever read.

An entry is a folder <kind>/<key>: `identity.json` (the exact text whose sha256 is the key), the payload, and
`manifest.json` (sha256 of every payload file), written last. It is made in a sibling temporary folder and
renamed, so a process killed anywhere leaves only rubbish that `gc` removes.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from .contracts import ErasebenchError

log = logging.getLogger("erasebench")
MANIFEST, IDENTITY = "manifest.json", "identity.json"


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
    def __init__(self, root: Path | None = None):
        self.root = Path(root or home()) / "store"
        self._verified: set[str] = set()

    def path(self, kind: str, identity: Any) -> Path:
        return self.root / kind / digest(identity)

    def get(self, kind: str, identity: Any) -> Path | None:
        """The entry's folder if it is there and whole, else None; a damaged entry is reported and removed."""
        path = self.path(kind, identity)
        if not path.is_dir():
            return None
        try:
            self._verify(path)
        except Damaged as error:
            log.warning("store: %s/%s is damaged (%s) and will be made again", kind, path.name[:12], error)
            self._discard(path)
            return None
        os.utime(path / MANIFEST)  # gc goes by last use
        return path

    def find(self, kind: str, key: str) -> Path | None:
        """The entry of a key."""
        path = self.root / kind / key
        return path if path.is_dir() else None

    def get_or_make(self, kind: str, identity: Any, make: Callable[[Path], None], wait: bool = True) -> Path | None:
        """Return the entry's folder, calling `make(folder)` to fill it if it is not there. None, if we need not `wait`,
        where another process is making it.

        Two processes that want the same entry: the second waits for the first. Whatever `make` raises passes
        through and leaves nothing behind. Raises ErasebenchError if the store cannot be written or is full.
        """
        if found := self.get(kind, identity):
            return found
        path = self.path(kind, identity)
        with self._writing(), self._lock(path, wait) as ours:
            if not ours:
                return None
            if found := self.get(kind, identity):  # made by somebody else while we waited
                return found
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                make(temporary)
                (temporary / IDENTITY).write_text(canonical(identity), encoding="utf-8")
                _sync(temporary / MANIFEST, json.dumps(_checksums(temporary), indent=1, sort_keys=True))
                temporary.rename(path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self._verified.add(str(path))
        return path

    def entries(self) -> Iterator[tuple[str, Path]]:
        for kind in sorted(p for p in self.root.glob("*") if p.is_dir() and p.name != "locks"):
            for path in sorted(kind.iterdir()):
                yield kind.name, path

    def _verify(self, path: Path) -> None:
        """Check every payload file against the manifest, once per process."""
        if str(path) in self._verified:
            return
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            text = (path / IDENTITY).read_bytes()
        except (OSError, ValueError) as error:
            raise Damaged(f"{type(error).__name__} reading its manifest") from error
        if hashlib.sha256(text).hexdigest() != path.name:
            raise Damaged("its identity does not hash to its key")
        for name, checksum in manifest.items():
            file = path / name
            if not file.is_file() or sha256_file(file) != checksum:
                raise Damaged(f"checksum of {name}")
        self._verified.add(str(path))

    def _discard(self, path: Path) -> None:
        aside = path.with_name(f".{path.name}.damaged.{os.getpid()}")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was quicker
            return
        shutil.rmtree(aside, ignore_errors=True)

    @contextmanager
    def _lock(self, path: Path, wait: bool) -> Iterator[bool]:
        """One maker at a time for an entry. The kernel drops the lock when its holder dies."""
        lock = self.root / "locks" / path.name
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                log.info("store: another process is making %s/%s, waiting for it", path.parent.name, path.name[:12])
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield True

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                advice = "free some space (python -m erasebench.store gc) or set ERASEBENCH_HOME to another disk"
            elif error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
                advice = "set ERASEBENCH_HOME to a folder that can be written"
            else:
                raise
            raise ErasebenchError(f"the store {self.root} cannot be written ({error.strerror}): {advice}") from error


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

    def unused_days(path: Path) -> float:
        manifest = path / MANIFEST
        return (now - (manifest if manifest.exists() else path).stat().st_mtime) / 86400

    if args.command == "list":
        for kind, path in store.entries():
            print(f"{kind:10} {path.name[:16]:16} {_size(path) / 1e6:9.2f} MB {unused_days(path):7.1f} d")
    elif args.command == "gc":
        removed = freed = 0
        for _, path in store.entries():
            leftover = path.name.startswith(".")
            if leftover and unused_days(path) < 1:
                continue  # a running process may still be filling it
            try:
                if not leftover:
                    store._verify(path)
                drop = leftover or (args.older is not None and unused_days(path) > args.older)
            except Damaged:
                drop = True
            if drop:
                removed, freed = removed + 1, freed + _size(path)
                shutil.rmtree(path, ignore_errors=True)
        print(f"removed {removed} entries, {freed / 1e6:.1f} MB")
    else:
        sizes: dict[str, tuple[int, int]] = {}
        for kind, path in store.entries():
            count, total = sizes.get(kind, (0, 0))
            sizes[kind] = (count + 1, total + _size(path))
        for kind, (count, total) in sizes.items():
            print(f"{kind:10} {count:7} entries {total / 1e6:10.1f} MB")
        print(
            f"{'total':10} {sum(c for c, _ in sizes.values()):7} entries "
            f"{sum(t for _, t in sizes.values()) / 1e6:10.1f} MB in {store.root}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

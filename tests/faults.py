"""A disk that fails at its n-th file operation, for tests of what must hold whenever it does."""

import builtins
import errno
import io
import os
from contextlib import contextmanager

CHANGING = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "utime", "chmod")


class Disk:
    """Counts operations that change files; the `at`-th fails (with all after it, where the fault `lasts`)."""

    def __init__(self, at, number=errno.ENOSPC, lasts=False, below=""):
        self.at, self.number, self.lasts, self.below = at, number, lasts, str(below)
        self.count, self.hit, self.originals = 0, False, {}

    def step(self, *places):
        if self.below and not any(str(place).startswith(self.below) for place in places):
            return
        self.count += 1
        if self.count == self.at or (self.lasts and self.count > self.at):
            self.hit = True
            raise OSError(self.number, os.strerror(self.number), *map(str, places[:1]))

    @contextmanager
    def failing(self, monkeypatch):
        with monkeypatch.context() as patch:
            for name in CHANGING:
                patch.setattr(os, name, self.counted(getattr(os, name)))
            patch.setattr(os, "fsync", self.counted(lambda descriptor: None))  # whose time is no test's business
            patch.setattr(os, "open", self.opened(os.open))
            patch.setattr(io, "open", self.file(io.open))
            patch.setattr(builtins, "open", self.file(builtins.open))
            yield self

    def counted(self, original):
        def call(place, *rest, **options):
            self.step(place, *rest[:1])
            return original(place, *rest, **options)

        return call

    def opened(self, original):
        def call(place, flags, *rest, **options):
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.step(place)
            return original(place, flags, *rest, **options)

        return call

    def file(self, original):
        def call(place, mode="r", *rest, **options):
            if not set(mode) & set("wxa+"):
                return original(place, mode, *rest, **options)
            if not isinstance(place, int):
                self.step(place)
            stream = original(place, mode, *rest, **options)
            if "+" in mode:
                return stream
            return Stream(stream, lambda: self.step(place))

        return call


class Stream:
    """A file of which half is written before the disk is found full."""

    def __init__(self, stream, step):
        self.stream, self.step = stream, step

    def write(self, content):
        try:
            self.step()
        except OSError:
            self.stream.write(content[: len(content) // 2])
            raise
        return self.stream.write(content)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *given):
        return self.stream.__exit__(*given)

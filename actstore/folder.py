"""A place that is a folder of a file system."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actstore.errors import DamagedStore
from actstore.files import fsync_path, publish_bytes, require_free_space, write_beside
from actstore.lease import held_lease, held_lock
from actstore.place import Place

LOCK = "lock"


NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)


class Folder(Place):
    """A folder of a file system."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.url = str(path)
        self._plain: set[str] = set()
        self.readers = max(1, min(4, len(os.sched_getaffinity(0))))

    def _own(self, name: str) -> Path:
        """The path of an object. Raises DamagedStore where a link would lead elsewhere: links are no objects.

        A folder that was looked at once is not looked at again: reading a chunk costs one look, at its file.
        """
        *folders, _ = parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts):
            raise DamagedStore(f"{self.url}: {name!r} is not the name of an object below it.")
        above = "/".join(folders)
        if above not in self._plain:
            for n in range(1, len(folders) + 1):
                self._refuse_link("/".join(folders[:n]))
            if (self.path / above).is_dir():
                self._plain.add(above)
        self._refuse_link(name)
        return self.path / name

    def _refuse_link(self, name: str) -> None:
        with suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISLNK(os.lstat(f"{self.url}/{name}").st_mode):
                raise DamagedStore(
                    f"{self.url}: {name} is a link, and no object; put a copy of what it leads to in its place (`cp -rL`)."
                )

    def read(self, name: str) -> bytes:
        return self._own(name).read_bytes()

    def read_into(self, name: str, start: int, *buffers: memoryview) -> int:
        if name.rpartition("/")[0] not in self._plain:
            self._own(name)
        try:
            descriptor = os.open(f"{self.url}/{name}", os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            self._refuse_link(name)
            raise
        try:
            return os.preadv(descriptor, buffers, start)
        finally:
            os.close(descriptor)

    def n_bytes(self, name: str) -> int | None:
        try:
            return self._own(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, prefix: str = "") -> dict[str, int]:
        sizes = {}
        for file in (self.path / prefix).rglob("*"):
            if not is_temporary(file.name):
                with suppress(FileNotFoundError):  # a writer may remove it meanwhile
                    status = file.lstat()
                    if stat.S_ISLNK(status.st_mode):
                        self._refuse_link(file.relative_to(self.path).as_posix())
                    if stat.S_ISREG(status.st_mode):
                        sizes[file.relative_to(self.path).as_posix()] = status.st_size
        return sizes

    def entries(self) -> set[str]:
        if not self.path.exists():
            return set()
        return {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else {"."}

    def publish(self, name: str, data: bytes) -> None:
        publish_bytes(self._own(name), data, _own_mark())

    def create(self, name: str, data: bytes) -> bool:
        path = self._own(name)
        temporary = write_beside(path, data, _own_mark())
        try:
            os.link(temporary, path)  # unlike a rename, fails when the name is taken
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(path.parent)
        return True

    def remove(self, name: str) -> None:
        self._own(name).unlink(missing_ok=True)

    def clear_leftovers(self) -> None:
        for file in self.path.rglob(".*.tmp"):
            file.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with held_lock(self.path / LOCK) as works:
            try:
                if works:
                    yield
                    return
                with held_lease(self):  # a file system without locks
                    yield
            except BaseException:
                if works and made and set(self.names()) == {LOCK}:  # nothing came of it: leave nothing
                    shutil.rmtree(self.path, ignore_errors=True)
                    with suppress(OSError):
                        for folder in made[1:]:
                            folder.rmdir()
                raise

    def require_space(self, needed_bytes: int, what: str) -> None:
        require_free_space(self.path, needed_bytes, what)


def _own_mark() -> str:
    """A mark for the temporary files of one publication, since several workers may publish the same object at once."""
    return f".{uuid.uuid4().hex[:8]}"


def is_temporary(file_name: str) -> bool:
    """Whether a file is one that is being published, or that a killed writer left."""
    return file_name.startswith(".") and file_name.endswith(".tmp")

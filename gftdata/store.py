"""Where an output is written: a folder, or s3://<bucket>/<path>. Names in it are relative, with slashes.

Several writers may be at work in one output, on machines that share nothing else, and none of this rests on locks: what
two of them must not both do is a `create` or a `publish`, which exactly one of them gets done. What is written, and
when, is said in shards.py, journal.py, prepare.py and generate.py.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, NoReturn, Protocol

from gftdata.errors import UserError, first_line, quoted, without_password

if TYPE_CHECKING:
    from s3fs import S3FileSystem

S3 = re.compile(r"s3://(?P<path>[^/\s]+(?:/\S+)?)")
FULL = (errno.ENOSPC, errno.EDQUOT)
HERE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT, errno.EXDEV)  # not the network
STAGED = ".work/staged"  # in a folder: files that are not yet what they are going to be


class Store(Protocol):
    """What the two kinds of place promise. Errors: FileNotFoundError for a name that is not there, else UserError."""

    @property
    def location(self) -> str: ...

    def top(self) -> set[str]:
        """The first parts of all names; empty where nothing was written yet."""

    def names(self, folder: str) -> list[str]:
        """What is directly in a folder, sorted, but for what is being staged (.NAME); nothing where there is none."""

    def exists(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, data: bytes) -> None:
        """There whole or not at all; replaces what had the name."""

    def create(self, name: str, data: bytes) -> bool:
        """As `write`, unless the name is there: then nothing is done and it is False."""

    def publish(self, staged: Path, name: str) -> bool:
        """`create` from a local file, which is gone afterwards."""

    def staging(self) -> AbstractContextManager[Path]:
        """A local folder from which `publish` takes files."""

    def local(self, name: str) -> AbstractContextManager[Path]:
        """A local file with the content of `name`, for as long as the context lasts; it is not to be changed."""

    def remove(self, name: str) -> None:
        """Take away what has this name, or is below it; what another writer has taken away is no error."""


def open_store(location: str) -> Store:
    """The place that an output's location names. Raises UserError for one that cannot be written to."""
    if "://" not in location:
        return FolderStore(Path(location))
    if not (match := S3.fullmatch(location.rstrip("/"))) or "/" not in match["path"]:
        raise UserError(f"{without_password(location)}: an output is a folder or s3://<bucket>/<path>")
    return BucketStore(match[0], match["path"], open_s3(location))


@dataclass(frozen=True, slots=True)
class FolderStore:
    """A local folder, or one on a file system that several machines share.

    A file becomes visible by a hard link, which fails where the name exists, also on NFS.
    """

    folder: Path

    @property
    def location(self) -> str:
        return str(self.folder)

    def top(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(path.name for path in (self.folder / folder).iterdir() if not path.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def read(self, name: str) -> bytes:
        return read_file(self.folder / name)

    def write(self, name: str, data: bytes) -> None:
        with replacing(self.folder / name) as file:
            file.write(data)

    def create(self, name: str, data: bytes) -> bool:
        if self.exists(name):
            return False
        with self.staging() as folder:
            staged = folder / uuid.uuid4().hex
            with named(staged):
                staged.write_bytes(data)
            return self.publish(staged, name)

    def publish(self, staged: Path, name: str) -> bool:
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        fsync_file(staged)
        won = _link(staged, target)
        with suppress(OSError):  # it is published, and what is left is put away with the folder
            staged.unlink(missing_ok=True)
        fsync_folder(target.parent)
        return won

    @contextmanager
    def staging(self) -> Iterator[Path]:
        folder = self.folder / STAGED
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    def local(self, name: str) -> AbstractContextManager[Path]:
        return nullcontext(self.folder / name)

    def remove(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with suppress(OSError):
            (self.folder / name).unlink()


def _link(staged: Path, target: Path) -> bool:
    try:
        os.link(staged, target)
    except FileExistsError:
        return False
    except OSError:
        # no hard links here. Between this look and the renaming another writer may publish; its copy, complete and
        # with the same prompts, is then replaced by this one, which is why records are made from the file
        if target.exists():
            return False
        staged.rename(target)
    return True


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `target` when the block ends well. Ended otherwise, nothing is left of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with named(target), staged.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(target)
    except BaseException:
        with suppress(OSError):  # which would hide why
            staged.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about, where the system's does not: reading, writing, making durable."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.strerror is None:  # a library's, which has a text and no number
            raise OSError(error.errno or errno.EIO, first_line(error), str(path)) from None
        if error.filename is None:
            error.filename = str(path)
        raise


def read_file(path: Path) -> bytes:
    """A file's content; an OSError names the file also where reading fails after it was opened."""
    with named(path):
        return path.read_bytes()


def hold(lock: IO[str], how: int, otherwise: str) -> None:
    """Take a lock (fcntl.LOCK_EX or LOCK_SH) at once. Raises UserError with this text where another process has it.

    On a file system without locks nothing is held: it keeps people from starting a thing twice, and no more.
    """
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(otherwise) from None
    except OSError:
        return


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file, named(path):
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with named(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class BucketStore:
    """A place in an object store. A PUT is whole or not at all; one with If-None-Match fails where the name exists."""

    location: str
    path: str
    files: "S3FileSystem"

    def top(self) -> set[str]:
        return set(self.names(""))

    def names(self, folder: str) -> list[str]:
        where = f"{self.path}/{folder}".rstrip("/")
        with self._failures(folder):
            try:
                found: list[str] = self.files.ls(where, detail=False, refresh=True)
            except FileNotFoundError as error:
                if _no_bucket(error):
                    raise
                return []
        return sorted(name for path in found if path != where and (name := path.rstrip("/").rpartition("/")[2]))

    def exists(self, name: str) -> bool:
        with self._failures(name):
            return bool(self.files.exists(f"{self.path}/{name}"))

    def read(self, name: str) -> bytes:
        with self._failures(name):
            data: bytes = self.files.cat_file(f"{self.path}/{name}")
            return data

    def write(self, name: str, data: bytes) -> None:
        with self._failures(name):
            self.files.pipe_file(f"{self.path}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        target = f"{self.path}/{name}"
        with self._failures(name):
            try:
                self.files.pipe_file(target, data, mode="create")
            except OSError:  # whatever a store calls its refusal, and whoever was first: then the name is there
                if not self.files.exists(target):
                    raise
                return False
        return True

    def publish(self, staged: Path, name: str) -> bool:
        target = f"{self.path}/{name}"
        try:
            with self._failures(name):
                try:
                    self.files.put_file(str(staged), target, mode="create")
                except OSError:
                    if not self.files.exists(target):
                        raise
                    return False
        finally:
            staged.unlink(missing_ok=True)
        return True

    @contextmanager
    def staging(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="gft-shard-") as folder:
            yield Path(folder)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="gft-shard-") as folder:
            path = Path(folder) / Path(name).name
            with self._failures(name):
                self.files.get_file(f"{self.path}/{name}", str(path))
            yield path

    def remove(self, name: str) -> None:
        with self._failures(name), suppress(FileNotFoundError):
            self.files.rm(f"{self.path}/{name}", recursive=True)

    @contextmanager
    def _failures(self, name: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError

        try:
            yield
        except FileNotFoundError as error:
            if _no_bucket(error):
                s3_failed(error, self.location)
            raise
        except (OSError, BotoCoreError) as error:
            s3_failed(error, f"{self.location}/{name}".rstrip("/"))


def _no_bucket(error: FileNotFoundError) -> bool:
    return "bucket does not exist" in str(error)


def open_s3(location: str) -> "S3FileSystem":
    """The client for an object store; credentials and endpoint come from the environment. Raises UserError."""
    try:
        from s3fs import S3FileSystem
    except ImportError:
        raise UserError(f"{location}: needs s3fs; install it with pip install 'gft-toolkit[s3]'") from None
    return S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def s3_failed(error: Exception, where: str) -> NoReturn:
    """Raise a UserError for an error of an object store."""
    if isinstance(error, FileNotFoundError):
        said = "no such object: check bucket and path; a data set is finished when its manifest.json is there"
    elif isinstance(error, PermissionError):
        said = f"refused: {quoted(error)}; check the credentials in the environment (AWS_ACCESS_KEY_ID, ...)"
    else:
        said = (
            f"the object store does not answer as it should: {quoted(error)}; check the network, AWS_ENDPOINT_URL and "
            "the credentials in the environment (AWS_ACCESS_KEY_ID, ...), then give the same command again"
        )
    raise UserError(f"{where}: {said}") from None

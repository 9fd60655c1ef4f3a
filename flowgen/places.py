"""Reads and writes folders at URLs such as gs://bucket/folder with fsspec, which orbax also uses.

All file systems of fsspec work. Those for gs:// and s3:// are separate packages, which also find the credentials;
file:// and memory:// need no package.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Generator
from pathlib import Path, PurePosixPath
from typing import Any

from flowgen.packages import missing

# The packages that fsspec needs for the usual schemes.
PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
_LOCAL = ("file", "local")
# The beginning of a URL that has lost a slash. A scheme has at least two letters, unlike a drive such as C:/.
_LOST_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(/?)")
_LONGEST_REASON = 200
# Errors of a program, such as this one, and not of a bucket.
_MISTAKES = (TypeError, AttributeError, NameError)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a URL, such as gs://bucket/run, rather than a path on this machine.

    Raises ValueError for a URL with a single slash, such as gs:/bucket, because `pathlib.Path` removes the other.

    Example:
        is_remote("gs://bucket/run")
    """
    text = os.fspath(path)
    if "://" in text:
        return True
    found = _LOST_SLASH.match(text)
    scheme = found[1].lower() if found else ""
    if found and (scheme in PACKAGES or (found[2] and scheme in _known_schemes())):
        rest = text[found.end() :].lstrip("/")
        slash = "/" if scheme in _LOCAL else ""
        raise ValueError(
            f"'{text}' is a URL that has lost a slash; write '{scheme}://{slash}{rest}'"
            f"{'' if isinstance(path, str) else ', as text and not as a Path'}."
        )
    return False


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Raises ValueError if a path is a URL. name: the path's name in the message, such as its field.

    Example:
        check_local("text.encoder", "flan-t5-xl")
    """
    if is_remote(path):
        raise ValueError(f"{name} is '{path}', but it must be on this machine; copy it from or to the bucket.")


def is_same_place(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Returns whether two paths, each of which may be a URL, lead to the same place.

    Example:
        is_same_place("file:///runs/digits", "/runs/digits")
    """
    return _place(a) == _place(b)


class RemoteFolder:
    """A folder in a bucket. Files are named by their paths relative to it, with / between folders.

    Every error of the file system is raised as an OSError whose message contains the file's URL. The constructor raises
    ModuleNotFoundError if a package is missing, or ValueError if the scheme is unknown or the URL is invalid.

    Example:
        folder = RemoteFolder("memory://bucket/run")
        folder.write("config.json", b"{}")
        folder.sizes()  # {"config.json": 2}
    """

    def __init__(self, url: str | os.PathLike[str]):
        self.url = _plain(url)
        self._opened, root = _opened(self.url)
        self._root, self._process = root.rstrip("/"), os.getpid()

    def __str__(self) -> str:
        return self.url

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.url,)  # another process makes connections of its own

    @property
    def _system(self) -> Any:
        # The connections of a file system do not survive a fork.
        if self._process != os.getpid():
            self._opened, self._process = _opened(self.url)[0], os.getpid()
        return self._opened

    def sizes(self, under: str = "") -> dict[str, int]:
        """Returns the number of bytes of each file at any depth, by name. under: a subfolder; "" for the whole folder.

        The result is empty if the folder does not exist. Names that lead outside the folder are omitted.
        """
        place = f"{self._root}/{under}" if under else self._root
        with self._told("listed", under):
            self._system.invalidate_cache()
            try:
                found = self._system.find(place, detail=True)
            except FileNotFoundError:
                return {}
        inside = {
            path.removeprefix(f"{self._root}/"): about.get("size") or 0
            for path, about in found.items()
            if path.startswith(f"{self._root}/") and about.get("type", "file") == "file"
        }
        return {name: int(size) for name, size in inside.items() if _is_inside(name)}

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Returns the bytes of a file from `start` to `end`. Raises FileNotFoundError if it does not exist."""
        with self._told("read", name):
            return self._system.cat_file(self._path(name), start=start, end=end)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file. In a bucket, readers see either the old or the whole new content."""
        with self._told("written", name):
            self._system.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file that must not exist yet, and returns whether this succeeded.

        On file systems that support this, such as gs:// and s3://, at most one of several processes creates the file.
        The content must differ between processes, because success is determined by reading the file.
        """
        path = self._path(name)
        try:
            if getattr(self._system, "local_file", False):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb") as file:
                    file.write(content)
            else:
                self._system.pipe_file(path, content, mode="create")
        except _MISTAKES:
            raise
        except Exception as error:
            # An attempt may have succeeded although its answer was lost, and the errors of systems differ.
            with contextlib.suppress(FileNotFoundError):
                return self.read(name) == content
            if isinstance(error, FileExistsError):  # deleted in the meantime
                return False
            with self._told("created", name):
                raise
        return self.read(name) == content

    def upload(self, path: str | os.PathLike[str], name: str) -> None:
        """Copies a local file to the folder."""
        with self._told("uploaded", name):
            self._system.put_file(os.fspath(path), self._path(name))

    def upload_new(self, path: str | os.PathLike[str], name: str) -> bool:
        """Copies a local file to a name that must not exist yet, and returns whether this succeeded.

        On file systems that support this, such as gs:// and s3://, an existing file is never changed. If the answer of
        the server is lost, the file may have been copied although the result is False.
        """
        with self._told("uploaded", name):
            try:
                if getattr(self._system, "local_file", False):
                    _copy_new(path, self._path(name))
                else:
                    self._system.put_file(os.fspath(path), self._path(name), mode="create")
            except _MISTAKES:
                raise
            except Exception:  # the errors of systems differ
                self._system.invalidate_cache()
                if self._system.exists(self._path(name)):
                    return False
                raise
        return True

    def download(self, name: str, path: str | os.PathLike[str]) -> None:
        """Copies a file from the folder to a local path."""
        with self._told("downloaded", name):
            self._system.get_file(self._path(name), os.fspath(path))

    def delete(self, name: str) -> None:
        """Deletes a file, if it exists."""
        with self._told("deleted", name), contextlib.suppress(FileNotFoundError):
            self._system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _told(self, done: str, name: str) -> Generator[None]:
        """Raises errors as OSErrors that state the URL, except `_MISTAKES`.

        The errors of file systems have no common class, because they come from different packages.
        """
        what = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{what} does not exist; check the name of the bucket and the path.") from error
        except _MISTAKES:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{what} could not be {done} ({reason[:_LONGEST_REASON]}).") from error


class Destination:
    """A file to be written at a path that may be a URL.

    path: where to write the file on this machine; `send` then copies it to the URL. The constructor raises the errors
    of `RemoteFolder`, so an invalid URL is found before the file is computed.

    Example:
        image = Destination("gs://bucket/samples.png")
        image.path.write_bytes(content)
        image.send()
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path, self._folder = Path(path), None
        if is_remote(path):
            url, _, name = os.fspath(path).rpartition("/")
            if not name or url.endswith(":/"):
                raise ValueError(f"'{path}' has no name of a file in a folder; give one, such as 'gs://bucket/a.png'.")
            self._folder, self.path = RemoteFolder(f"{url}/"), Path(tempfile.mkdtemp(prefix="flowgen-"), name)
            self._remove = weakref.finalize(self, shutil.rmtree, self.path.parent, ignore_errors=True)

    def send(self) -> None:
        """If the path is a URL, copies the file there and removes the local file. Otherwise, does nothing.

        Raises OSError if copying fails; the message contains the local path.
        """
        if self._folder is not None:
            try:
                self._folder.upload(self.path, self.path.name)
            except OSError as error:
                self._remove.detach()
                raise OSError(f"{error} The file is kept in {self.path} on this machine.") from error
            self._remove()


def _plain(url: str | os.PathLike[str]) -> str:
    """Returns a URL with its scheme in lower case and no slash at the end."""
    scheme, mark, rest = os.fspath(url).partition("://")
    return f"{scheme.lower()}{mark}{rest.rstrip('/') or rest[:1]}"


def _place(path: str | os.PathLike[str]) -> str | Path:
    if not is_remote(path):
        return Path(path).resolve()
    scheme, _, rest = _plain(path).partition("://")
    return Path(rest).resolve() if scheme in _LOCAL else _plain(path)


def _opened(url: str) -> tuple[Any, str]:
    """Returns the file system of a URL and the path in it."""
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    if "::" in url:
        raise ValueError(f"'{url}' chains several file systems with '::'; give the URL of one.")
    if scheme in _LOCAL and not url.partition("://")[2].startswith("/"):
        raise ValueError(f"'{url}' needs three slashes and an absolute path, such as '{scheme}:///tmp/run'.")
    # A package that is missing must be told before anything else.
    options = {"auto_mkdir": True} if scheme in _LOCAL else {}
    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        raise missing(f"{scheme}://", PACKAGES.get(scheme, f"'fsspec[{scheme}]'")) from error
    except ValueError as error:
        if scheme in _known_schemes():
            raise ValueError(f"'{url}' is not a valid URL ({error}).") from error
        raise ValueError(f"'{url}' begins with {scheme}://, which fsspec does not know; use gs:// or s3://.") from error
    except _MISTAKES:
        raise
    except Exception as error:  # for example, credentials that are missing or have expired
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"'{url}' cannot be opened ({reason[:_LONGEST_REASON]}).") from error


def _copy_new(path: str | os.PathLike[str], new: str) -> None:
    os.makedirs(os.path.dirname(new), exist_ok=True)
    with open(path, "rb") as source, open(new, "xb") as target:
        try:
            shutil.copyfileobj(source, target)
        except BaseException:
            os.unlink(new)
            raise


def _known_schemes() -> set[str]:
    from fsspec.registry import known_implementations, registry

    return {*known_implementations, *registry}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and not name.endswith("/")


def local_name(folder: Path, name: str) -> Path:
    """Returns the path of a file in a local copy of a `RemoteFolder`.

    Example:
        local_name(Path("copy"), "checkpoints/300/meta.json")
    """
    return folder.joinpath(*PurePosixPath(name).parts)

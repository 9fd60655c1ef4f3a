"""Detects whether malloc uses huge pages in this process, and restarts a command to enable them.

On a CPU, every training step allocates new arrays, and the operating system provides the memory for them page by page.
This is much faster with pages of 2 MiB than with the default pages of 4 KiB. If the kernel's setting is "madvise", a
program must request huge pages. Since version 2.35, glibc requests them if GLIBC_TUNABLES contains
`glibc.malloc.hugetlb=1` when the process starts.

This module uses only the standard library, so that a command can restart before it imports jax.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb=1"
OLDEST_GLIBC = (2, 35)
KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
RESTARTED = "FLOWGEN_RESTARTED"  # set in a restarted process, so that it never restarts again
BLOCK = 8 << 20  # bytes; malloc maps blocks of this size separately


class Pages(NamedTuple):
    """The settings that determine whether malloc uses huge pages in a process.

    system: name of the operating system, such as "Linux". glibc: version of glibc; None if the process uses another C
    library. kernel: the kernel's setting, "always", "madvise" or "never"; empty if it is unknown. tunables: the value
    of GLIBC_TUNABLES when the process started; None if the variable was not set.
    """

    system: str
    glibc: tuple[int, ...] | None
    kernel: str
    tunables: str | None

    def problem(self) -> str:
        """Returns a clause that states why malloc does not use huge pages, or "" if it does."""
        if self.system != "Linux":
            return f"{self.system} has no such setting"
        if self.kernel == "always":
            return ""
        if self.kernel != "madvise":
            return f"{KERNEL_SETTING} is {self.kernel or 'missing'}"
        if self.glibc is None:
            return "the C library is not glibc"
        if self.glibc < OLDEST_GLIBC:
            return f"glibc {'.'.join(map(str, self.glibc))} is older than 2.35"
        if TUNABLE not in (self.tunables or "").split(":"):
            wanted = ":".join(filter(None, (self.tunables, TUNABLE)))
            remedy = f"run `export {VARIABLE}={wanted}` first"
            return f"{VARIABLE} did not contain {TUNABLE} when the process started; {remedy}"
        return ""

    def can_switch_on(self) -> bool:
        """Returns whether GLIBC_TUNABLES is unset and setting it would enable huge pages in a new process."""
        return self.tunables is None and bool(self.problem()) and not self._replace(tunables=TUNABLE).problem()


def pages() -> Pages:
    """Returns the settings of this process."""
    return Pages(platform.system(), _glibc(), _kernel_setting(), _at_start(VARIABLE))


@functools.cache
def why_absent() -> str:
    """Returns a clause that states why malloc does not use huge pages in this process, or "" if it does."""
    found = pages()
    if not (problem := found.problem()) and found.kernel == "madvise" and not _asks_for_them():
        return "malloc does not ask for them, so it may not be the one from glibc"
    return problem


def restart(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Restarts this process's command with huge pages, or returns if that is not possible.

    The new program keeps the process id, working directory, standard streams and interpreter options.

    words: the arguments at the end of the command line that started this process.

    The program may be a module, a script, or an installed command such as `flowgen`.

    Nothing happens if the program was read from a stream, or if the command line does not end with `words`, for example
    if another program calls a command's main function with different arguments. Nothing happens either if
    GLIBC_TUNABLES is set (even to an empty string), if a debugger or profiler is active, or if JAX may use an
    accelerator.
    """
    started_so = sys.orig_argv[len(sys.orig_argv) - len(words) :] == list(words)
    observed = sys.gettrace() or sys.getprofile() or not {"pydevd", "coverage"}.isdisjoint(sys.modules)
    if VARIABLE in environ or RESTARTED in environ or not started_so or observed or not sys.executable:
        return
    if not _can_be_read_again():
        return
    if not (pages().can_switch_on() and _only_cpus(environ)):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # the stream is closed or None
            stream.flush()
    with contextlib.suppress(OSError):  # the interpreter's file is gone, so continue without huge pages
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**environ, VARIABLE: TUNABLE, RESTARTED: "1"})


def _can_be_read_again() -> bool:
    """Returns whether the program is a regular file, which can be read again, rather than text or a stream."""
    return os.path.isfile(getattr(sys.modules["__main__"], "__file__", None) or "")


def _only_cpus(environ: Mapping[str, str]) -> bool:
    """Returns whether JAX will run only on CPUs, according to JAX_PLATFORMS and the installed accelerator plugins."""
    if asked := environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _glibc() -> tuple[int, ...] | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else None
    except (AttributeError, OSError, ValueError):
        return None


def _kernel_setting() -> str:
    """Returns the kernel's setting, which is the word in brackets in a line such as "always [madvise] never"."""
    try:
        return KERNEL_SETTING.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return ""


def _at_start(variable: str) -> str | None:
    """Returns the value that an environment variable had when the process started; malloc ignores later changes."""
    try:
        lines = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return os.environ.get(variable)
    values = (line.partition(b"=")[2] for line in lines if line.startswith(f"{variable}=".encode()))
    return next((value.decode(errors="replace") for value in values), None)


def _asks_for_them() -> bool:
    """Returns whether the kernel reports the flag "hg" for the memory mapping of a large block from malloc.

    The result is True if the kernel reports no flags.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype, libc.free.argtypes = (
        [ctypes.c_size_t],
        ctypes.c_void_p,
        [ctypes.c_void_p],
    )
    address, inside = libc.malloc(BLOCK), False
    try:
        for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
            first, _, rest = line.partition(" ")
            if first == "VmFlags:" and inside:
                return "hg" in rest.split()
            if not first.endswith(":"):
                start, _, end = first.partition("-")
                inside = int(start, 16) <= (address or 0) + BLOCK // 2 < int(end, 16)
    except (OSError, ValueError):
        pass
    finally:
        libc.free(address)
    return True

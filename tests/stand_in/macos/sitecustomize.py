"""Python reads this as it starts, where this folder is on its path: what follows sees of this Linux what macOS has.

By its documentation, not by a Mac: no /proc and /sys, none of Linux's own functions, and the name of the system.
"""

import builtins
import ctypes
import io
import os
import select
import signal
import socket
import sys
import sysconfig
import time
import types

import psutil  # by this system's own name, as all that is read or built once

sysconfig.get_config_vars()
LACKING = {
    os: (
        "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "memfd_create", "eventfd",
        "pidfd_open", "copy_file_range", "splice", "getrandom", "getxattr", "setxattr", "listxattr", "removexattr",
        "getresuid", "getresgid", "pipe2", "fdatasync", "O_TMPFILE", "O_DIRECT", "O_NOATIME", "O_PATH", "O_LARGEFILE",
    ),
    signal: ("sigtimedwait", "sigwaitinfo", "pidfd_send_signal", "SIGRTMIN", "SIGRTMAX", "SIGPWR", "SIGPOLL", "SIGCLD"),
    time: ("CLOCK_BOOTTIME", "CLOCK_TAI", "pthread_getcpuclockid"),
    select: ("epoll",),
    socket: ("AF_NETLINK", "SO_BINDTODEVICE", "SO_PEERCRED", "TCP_KEEPIDLE", "TCP_USER_TIMEOUT"),
}
NO_FOLDERS = ("/proc", "/sys", "/dev/shm")
NO_CALLS = ("prctl", "renameat2", "gettid", "sched_getaffinity")


def without(function):
    def call(path=".", *arguments, **options):
        asks = sys._getframe(1).f_globals.get("__name__", "")
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if any(f"{text}/".startswith(f"{folder}/") for folder in NO_FOLDERS) and not asks.startswith(psutil.__name__):
            raise FileNotFoundError(2, "No such file or directory", text)
        return function(path, *arguments, **options)

    return call


class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if self._name is None and name in NO_CALLS:
            raise AttributeError(name)
        return super().__getattr__(name)


for module, names in LACKING.items():
    for each in names:
        module.__dict__.pop(each, None)
for each in ("open", "stat", "lstat", "listdir", "scandir", "readlink", "statvfs", "access"):
    setattr(os, each, without(getattr(os, each)))
io.open = builtins.open = without(builtins.open)
ctypes.CDLL = Library
sys.modules["_scproxy"] = types.SimpleNamespace(_get_proxy_settings=dict, _get_proxies=dict)
sys.platform = "darwin"

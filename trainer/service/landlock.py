"""Linux's Landlock: a process gives up rights, for itself and for all that it starts, and never gets them back.

Owns the system calls, and what each version of the kernel's interface knows. It needs no privileges, and takes root's
from whoever runs as root. Does not know what anybody needs.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Final


class Access(IntFlag):
    """What may be done below a folder, or with a file. Looking at metadata, such as modes, cannot be taken away."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13  # link or rename into another folder
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


_SINCE: Final = {2: Access.REFER, 3: Access.TRUNCATE, 5: Access.IOCTL_DEV}
"""Version -> what it added. Where a kernel does not know it, it is allowed; but for REFER, which is refused then."""
_OF_FILES: Final = Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
_NET_SINCE, _SCOPES_SINCE = 4, 6
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION, _PATH_BENEATH, _NET_PORT = 1, 1, 2
_NO_NEW_PRIVS = 38
_CAPABILITIES_VERSION, _DAC_OVERRIDE = 0x20080522, 1 << 1


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


class _NetPort(ctypes.Structure):
    _fields_ = (("access", ctypes.c_uint64), ("port", ctypes.c_uint64))


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@dataclass(frozen=True)
class Rule:
    """``access`` to a file, or to a folder and all below it. It holds for what is there now, wherever that moves."""

    path: str
    access: Access


def version() -> int:
    """Of the kernel's interface; 0 where it has none, or does not let this process use it."""
    if sys.platform != "linux":
        return 0
    try:
        return _call(_CREATE_RULESET, None, 0, _VERSION)
    except OSError:
        return 0


def restrict(rules: Iterable[Rule], ports: Iterable[int]) -> None:
    """Let this thread, and what it starts from now on, do no more with files than ``rules`` say.

    A rule for what is not there is none. No signal reaches other processes, no TCP connection is made but to ``ports``,
    no port is listened on, no abstract socket of others is reached, as far as the kernel knows of it. Of root's powers
    that over the modes of files stays; others see around Landlock, into the memory of any process. Raises OSError.
    """
    known = version()
    handled = Access((1 << 13) - 1)
    for since, added in _SINCE.items():
        handled |= added if known >= since else Access(0)
    net = _BIND_TCP | _CONNECT_TCP if known >= _NET_SINCE else 0
    scopes = _ABSTRACT_SOCKETS | _SIGNALS if known >= _SCOPES_SINCE else 0
    asked = _Ruleset(handled, net, scopes)
    ruleset = _call(_CREATE_RULESET, ctypes.byref(asked), ctypes.sizeof(asked), 0)
    try:
        for rule in rules:
            _allow(ruleset, rule, handled)
        for port in ports if net else ():
            _call(_ADD_RULE, ruleset, _NET_PORT, ctypes.byref(_NetPort(_CONNECT_TCP, port)), 0)
        _checked(_libc().prctl(_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
        _give_up_capabilities()
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, rule: Rule, handled: Access) -> None:
    try:
        descriptor = os.open(rule.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if access := rule.access & handled & (handled if folder else _OF_FILES):
            _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(_PathBeneath(access, descriptor)), 0)
    finally:
        os.close(descriptor)


def _give_up_capabilities() -> None:
    libc, header, held = _libc(), _CapabilityHeader(_CAPABILITIES_VERSION, 0), (_Capabilities * 2)()
    _checked(libc.capget(ctypes.byref(header), held))
    kept = held[0].permitted & _DAC_OVERRIDE
    _checked(libc.capset(ctypes.byref(header), (_Capabilities * 2)(_Capabilities(kept, kept, 0))))


def _call(number: int, *arguments: Any) -> int:
    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc().syscall(ctypes.c_long(number), *plain))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"Landlock: {os.strerror(number)}")
    return result


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc

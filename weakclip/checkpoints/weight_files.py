"""Untrusted weight files: safetensors, torch.save or TorchScript -> a flat state dict. Nothing in a file is executed."""

from __future__ import annotations

import functools
import json
import pickle
import pickletools
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from weakclip.runtime.errors import UserError


class ArchiveError(UserError):
    """A file that cannot be read as weights. One line: the path, the reason and, if there is one, a hint."""


class Archive(NamedTuple):
    """The contents of a weight file."""

    tensors: dict[str, Tensor]
    """The flat state dict, on the CPU, in the file's dtypes."""
    meta: dict[str, Any]
    """The metadata of safetensors (strings), the `meta` next to a checkpoint's state dict (plain values), or {}."""


def json_of(archive: Archive, key: str, path: Path) -> Any:
    """Return the JSON in a safetensors file's metadata under `key`; None if it has none. Raises ArchiveError if it is damaged."""
    try:
        return json.loads(archive.meta.get(key, "null"))
    except (ValueError, TypeError) as error:
        raise ArchiveError(f"{path}: its metadata {key!r} is not JSON ({error}); convert it again") from error


# Bytes allowed beyond the file's own size: TorchScript's code is compressed, and a constant tensor may repeat one value.
_SLACK = 2**26


def read(path: Path) -> Archive:
    """Return the weights in a safetensors file, a zip of torch.save (torch 1.6 or newer) or a TorchScript archive.

    Of a checkpoint its `state_dict` or `model` is returned. Names are those of the bare module, without what torch.compile
    ("_orig_mod." at any place) and DataParallel ("module." before all names) add to them. Raises ArchiveError.
    """
    try:
        archive, limit = _read(path), path.stat().st_size + _SLACK
        if not archive.tensors:
            raise ArchiveError("holds no tensors")
        archive = archive._replace(tensors=_unwrapped(archive.tensors))
        if large := [name for name, tensor in archive.tensors.items() if tensor.nbytes > limit]:
            raise ArchiveError(f"claims more bytes for {large[0]!r} alone than the file has")
        return archive
    except Exception as error:  # malicious bytes make the readers below raise almost anything
        reason = str(error)
        if not isinstance(error, ArchiveError):
            line = reason.partition("\n")[0]
            reason = f"cannot be read as weights ({type(error).__name__}: {line[:200]}); was the download complete?"
        printable = "".join(letter if letter.isprintable() else " " for letter in reason[:400])
        raise ArchiveError(f"{path}: {' '.join(printable.split())}") from error


_OLD = "was saved in torch's format from before 1.6; load and save it again with a newer torch"
_NO_WEIGHTS = [
    (0, b"\x80", _OLD),  # a bare pickle
    (257, b"ustar", _OLD),
    (0, b"<", "is a web page instead of weights; check the URL it was downloaded from"),
    (0, b"version https://git-lfs", "is a git-lfs pointer instead of weights; `git lfs pull` downloads the file itself"),
]


def _read(path: Path) -> Archive:
    if not path.is_file():
        raise ArchiveError("is not a file" if path.exists() else "does not exist")
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise ArchiveError("is empty; download it again")
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    # A safetensors file: the length of its JSON header, then the header. The length may start with any of the bytes below.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _read_safetensors(path)
    for offset, magic, reason in _NO_WEIGHTS:
        if head.startswith(magic, offset):
            raise ArchiveError(reason)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise ArchiveError("is neither safetensors nor a zip of torch.save or TorchScript")


def _read_safetensors(path: Path) -> Archive:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return Archive({name: file.get_tensor(name) for name in names}, dict(file.metadata() or {}))


def _read_zip(path: Path) -> Archive:
    if not zipfile.is_zipfile(path):
        raise ArchiveError("is truncated, the end of the zip is missing; download it again")
    with zipfile.ZipFile(path) as archive:
        roots = [found[1] for name in archive.namelist() if (found := re.fullmatch(r"([^/]+)/data\.pkl", name))]
        if len(roots) != 1:
            raise ArchiveError("is a zip that torch did not write: it does not hold exactly one data.pkl")
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size + _SLACK:
            raise ArchiveError("claims to unpack to more bytes than it has; if it was compressed, save it again with torch")
        # Before 2.6 torch.load runs TorchScript even with weights_only (CVE-2025-32434). A zip can be made to show Python
        # other members than torch, so torch's own reader must confirm that there is none.
        if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            return Archive(_script_tensors(archive, roots[0]), {})
    try:
        return _checkpoint(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:  # its message advises loading without weights_only
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise _refusal(f"asks for {found[1]}" if found else "holds pickle instructions") from error


def _refusal(what: str) -> ArchiveError:
    return ArchiveError(f"{what}, which goes beyond tensors and plain values; nothing in it was executed")


def _checkpoint(content: Any) -> Archive:
    if not isinstance(content, dict):
        raise ArchiveError(f"holds a {type(content).__name__} instead of a state dict")
    state, meta = content, None
    if key := next((key for key in ("state_dict", "model") if isinstance(content.get(key), dict)), None):
        state, meta = content[key], content.get("meta")
    if not all(isinstance(name, str) for name in state):
        raise ArchiveError("holds a dict whose keys are not names instead of a state dict")
    if odd := [repr(name[:50]) for name, value in state.items() if not _is_plain(value)]:
        raise ArchiveError(f"does not hold a state dict: {', '.join(odd[:3])}{', ...' if odd[3:] else ''} are not plain tensors")
    return Archive({name: value.detach() for name, value in state.items()}, meta if isinstance(meta, dict) else {})


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = [re.sub(r"(?<![^.])_orig_mod\.", "", name) for name in tensors]
    while all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ArchiveError(f"holds {twice[0]!r} twice, with and without the prefix of torch.compile")
    return dict(zip(names, tensors.values(), strict=True))


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


# ------------------------------------------------------------------------------------------------------- TorchScript
# A zip of ROOT/data.pkl (a pickle of the module tree, whose classes are named "__torch__..."), ROOT/data/KEY (one storage
# each) and ROOT/code (the classes' source, which declares what is a parameter or a buffer). torch writes it in
# torch/csrc/jit/serialization/pickler.cpp. torch.jit.load would compile the code and run its __setstate__.

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# What these create is never a tensor of a state dict, so it is not created at all.
_IGNORED = {"collections.OrderedDict", "torch.device", "builtins.complex", "torch.jit._pickle.restore_type_tag"}
_IGNORED |= {f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")}

_MODULE = re.compile(r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?", re.MULTILINE)


class _Class(NamedTuple):
    name: str


@dataclass(eq=False)
class _Object:
    """An instance of the archive's class `kind`: attributes without behaviour."""

    kind: str
    state: Any = None


def _script_tensors(archive: zipfile.ZipFile, root: str) -> dict[str, Tensor]:
    """Return what `torch.jit.load(...).state_dict()` would. Tensors that share storage in the file share memory."""
    members = archive.namelist()
    order = archive.read(f"{root}/byteorder").decode() if f"{root}/byteorder" in members else "little"
    if order != sys.byteorder:
        raise ArchiveError(f"is TorchScript of a {order}-endian machine; save it again on a {sys.byteorder}-endian one")
    declared = {}
    for member in members:
        if path := re.fullmatch(rf"{re.escape(root)}/code/(.+)\.py", member):
            for name, parameters, buffers in _MODULE.findall(archive.read(member).decode()):
                declared[f"{path[1].replace('/', '.')}.{name}"] = set(re.findall(r'"([^"]*)"', f"{parameters} {buffers}"))

    @functools.cache
    def content(key: str) -> bytearray:
        return bytearray(archive.read(f"{root}/data/{key}"))

    def storage(described: Any) -> Tensor:
        match described:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)) if numel >= 0:
                if numel * dtype.itemsize > len(content(key)):
                    raise ArchiveError(f"claims {numel} values for a storage of {len(content(key))} bytes")
                return torch.frombuffer(content(key), dtype=dtype, count=numel) if numel else torch.empty(0, dtype=dtype)
        raise ArchiveError("holds a storage that is not described as torch describes it")

    tree = _unpickle(archive.read(f"{root}/data.pkl"), storage)
    if not isinstance(tree, _Object) or tree.kind not in declared:
        raise ArchiveError("is TorchScript, but not of a module")
    return _flatten(tree, declared)


def _unpickle(program: bytes, storage: Callable[[Any], Tensor]) -> Any:
    """Return what TorchScript's pickle describes, as tensors, `_Object`s and plain values.

    This is not a pickle.Unpickler, which resolves names, calls what it finds, sets attributes on it, hashes tuples of any depth
    (which can overflow the C stack) and sizes its memo by a number in the file. Here `_strided` is the only function called.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "EMPTY_LIST":  # lists hold no part of a state dict
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "APPENDS":
                stack = marks.pop()
            case "SETITEMS":  # only attributes matter, and their names are strings
                items, stack = stack, marks.pop()
                stack[-1].update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if type(key) is str)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(storage(stack.pop()))
            case "GLOBAL":
                stack.append(_look_up(argument))
            case "NEWOBJ":
                _, kind = stack.pop(), stack.pop()
                stack.append(_Object(kind.name))
            case "BUILD":
                state, made = stack.pop(), stack[-1]
                if isinstance(made, _Object):
                    made.state = state
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_strided(arguments) if function is _strided else None)
            case _:
                raise _refusal(f"holds the pickle instruction {opcode.name}")
    return stack.pop()


def _look_up(name: str) -> Any:
    """Return the stand-in for the global "module name" of a pickle. Raises ArchiveError for any global that is not expected."""
    dotted = name.replace(" ", ".")
    if dotted in _STORAGES:
        return _STORAGES[dotted]
    if dotted == "torch._utils._rebuild_tensor_v2":
        return _strided
    if dotted.startswith("__torch__."):
        return _Class(dotted)
    if dotted in _IGNORED:
        return None
    raise _refusal(f"asks for {dotted}")


def _strided(arguments: Any) -> Tensor:
    """Return the tensor that `arguments` of torch._utils._rebuild_tensor_v2 describe: a view within its storage."""
    match arguments:
        case (Tensor() as storage, int(offset), tuple(size), tuple(stride), bool(), None) if len(size) == len(stride):
            if all(isinstance(number, int) and number >= 0 for number in (offset, *size, *stride)):
                span = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
                if offset + span > storage.numel():
                    raise ArchiveError("holds a tensor that reaches outside its storage")
                return storage.as_strided(size, stride, offset)
    raise ArchiveError("holds a tensor that is not a plain view of a storage")


def _flatten(tree: _Object, declared: dict[str, set[str]]) -> dict[str, Tensor]:
    tensors, letters = {}, 0
    modules = [("", tree)]
    for prefix, module in modules:  # the loop appends to it
        if not isinstance(module.state, dict):
            raise ArchiveError(f"restores {module.kind} with its own code, which is never run")
        for name, value in module.state.items():
            letters += len(prefix) + len(name)
            if letters > 2**22:  # a large CLIP has about 2**18
                raise ArchiveError("holds modules that contain each other endlessly")
            if isinstance(value, _Object) and value.kind in declared:
                modules.append((f"{prefix}{name}.", value))
            elif isinstance(value, Tensor) and name in declared[module.kind]:
                tensors[prefix + name] = value
    return tensors

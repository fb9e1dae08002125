"""Reading untrusted weight files: every format gives exact tensors, and hostile or damaged files give one clear error."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from weakclip.checkpoints.weight_files import Archive, ArchiveError, read

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
FUZZ = settings(max_examples=60, deadline=None)
SEEDS = st.integers(0, 2**32)


def refused(path: Path) -> str:
    """The reason for which `path` is refused: one printable line that names the file."""
    with pytest.raises(ArchiveError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and tensor.equal(other[name]) and tensor.stride() == other[name].stride()
        for name, tensor in one.items()
    )


def some_weights() -> dict[str, Tensor]:
    wide = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).half()
    numbers = {"steps": torch.tensor(7), "flags": torch.tensor([True, False]), "none": torch.zeros(0, 3)}
    return {"wide": wide, "turned": wide.t(), "every.second": wide[1:, ::2], "once": torch.ones(1).expand(3)} | numbers


def with_members(source: Path, target: Path, **changed: bytes) -> Path:
    """The zip `source` with other contents of the members of those names (without folder and ".pkl")."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            new.writestr(member.filename, changed.get(Path(member.filename).name.removesuffix(".pkl"), old.read(member)))
    return target


def member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return next(archive.read(each) for each in archive.namelist() if each.endswith(f"/{name}"))


# ---------------------------------------------------------------------------------------------- safetensors, torch.save


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
@pytest.mark.parametrize("meta", [None, {"model": "ViT-B-16", "note": "two\nlines"}])
def test_safetensors(tmp_path, name, meta):
    state = {key: tensor.contiguous().clone() for key, tensor in some_weights().items()}
    save_file(state, tmp_path / name, meta)
    archive = read(tmp_path / name)
    assert same(archive.tensors, state)
    assert archive.meta == (meta or {})


@pytest.mark.parametrize(
    "wrap", [lambda state: state, lambda state: {"epoch": 3, "state_dict": state}, lambda state: {"model": state}]
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_and_a_training_checkpoint(tmp_path, wrap, prefix):
    torch.save(wrap({prefix + name: tensor for name, tensor in some_weights().items()}), tmp_path / "weights.pth")
    archive = read(tmp_path / "weights.pth")
    assert same(archive.tensors, some_weights())
    assert archive.meta == {}
    assert archive.tensors["wide"].data_ptr() == archive.tensors["turned"].data_ptr()


def test_a_checkpoint_of_mmseg_with_meta_and_optimizer(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    moments = {"step": torch.tensor(9.0), "exp_avg": torch.ones(3, 2, 1, 1)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0, 1, 2, 3]}]}
    meta = {"config": "lr = 1e-4\n", "CLASSES": ("cat", "dog"), "PALETTE": [[0, 0, 0], [128, 0, 0]], "iter": 9, "seed": None}
    content = {"meta": meta, "state_dict": model.state_dict(keep_vars=True), "optimizer": optimizer}
    torch.save(content, tmp_path / "iter_9.pth")
    archive = read(tmp_path / "iter_9.pth")
    assert same(archive.tensors, dict(model.state_dict()))
    assert archive.meta == meta
    assert not any(tensor.requires_grad or isinstance(tensor, nn.Parameter) for tensor in archive.tensors.values())


def test_only_a_prefix_of_all_names_is_removed(tmp_path):
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert set(read(tmp_path / "a.pt").tensors) == {"module.a", "b"}


@pytest.mark.parametrize(
    "stored, names",
    [
        (["module._orig_mod.a", "module._orig_mod.b.c"], ["a", "b.c"]),
        (["_orig_mod.module.module.a", "_orig_mod.module.module.b"], ["a", "b"]),
        (["tower._orig_mod.a", "head._orig_mod._orig_mod.b"], ["tower.a", "head.b"]),
        (["not_orig_mod.a", "_orig_modern.b"], ["not_orig_mod.a", "_orig_modern.b"]),
    ],
)
def test_what_torch_compile_and_data_parallel_add_to_names_is_removed(tmp_path, stored, names):
    save_file({name: torch.full((1,), number) for number, name in enumerate(stored)}, tmp_path / "a.safetensors")
    assert {name: int(tensor) for name, tensor in read(tmp_path / "a.safetensors").tensors.items()} == {
        name: number for number, name in enumerate(names)
    }


def test_a_name_with_and_without_a_prefix_is_refused(tmp_path):
    save_file({"a": torch.zeros(1), "_orig_mod.a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert "holds 'a' twice, with and without the prefix of torch.compile" in refused(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content, reason",
    [
        ([1, 2], "holds a list instead of a state dict"),
        (torch.zeros(3), "holds a Tensor instead of a state dict"),
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        ({"state_dict": None}, "'state_dict' are not plain tensors"),
        ({3: torch.zeros(3)}, "keys are not names"),
        ({"a": torch.eye(2).to_sparse()}, "'a' are not plain tensors"),
        ({"a": torch.empty(2, device="meta")}, "'a' are not plain tensors"),
        ({"w": torch.ones(1), **dict.fromkeys("abcd", 1)}, "hold a state dict: 'a', 'b', 'c', ... are not plain tensors"),
        ({"a": Path("run me")}, "asks for pathlib"),
        ({"state_dict": {"a": torch.ones(1)}, "meta": {"lr": np.float64(1)}}, "asks for numpy.*; nothing in it was executed"),
        ({"a": torch.zeros(1).expand(2**40)}, "claims more bytes for 'a' alone than the file has"),
    ],
)
def test_other_content_is_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ArchiveError, match=reason):
        read(tmp_path / "other.pt")


def as_tar(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"), io.BytesIO())


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/readme.txt", "none")


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path: None, "does not exist"),
        (Path.mkdir, "is not a file"),
        (Path.touch, "is empty"),
        (lambda path: path.write_text("<!DOCTYPE html><html>Not found</html>"), "is a web page"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "`git lfs pull`"),
        (lambda path: path.write_bytes(bytes(range(256))), "is neither safetensors nor a zip"),
        (as_zip, "is a zip that torch did not write"),
        (as_tar, "from before 1.6; load and save it again with a newer torch"),
        (
            lambda path: torch.save(some_weights(), path, _use_new_zipfile_serialization=False),
            "from before 1.6; load and save it again with a newer torch",
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_a_file_of_another_kind_is_named(tmp_path, make, reason, name):
    make(tmp_path / name)
    told = refused(tmp_path / name)
    assert reason in told or (name == "a.safetensors" and "SafetensorError" in told and "neither" in reason)


# --------------------------------------------------------------------------------------------------------- TorchScript


class Pair(NamedTuple):
    tensor: Tensor
    number: int


class Branch(nn.Module):
    def __init__(self, wide: Tensor):
        super().__init__()
        self.weight = nn.Parameter(wide[:, ::2])
        self.register_parameter("bias", None)
        self.register_buffer("turned", wide.t())
        self.register_buffer("last", wide[2:, 3:])
        self.register_buffer("repeated", torch.ones(1).expand(3))
        self.register_buffer("passing", torch.arange(3), persistent=False)
        self.attribute = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        wide = some_weights()["wide"]
        self.one, self.two = Branch(wide), Branch(wide)
        self.again = self.one
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1).double()])
        self.list = nn.ParameterList([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))])
        for name, tensor in some_weights().items():
            self.register_buffer(name.replace(".", "_"), tensor)
        for dtype in (torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8):
            self.register_buffer(str(dtype).replace(".", "_"), torch.arange(3).to(dtype))
        self.number, self.large, self.real, self.text, self.complex = 3, 2**40, 0.5, "text", 1 + 2j
        self.integers, self.reals, self.switches, self.texts, self.tensors = [1], [0.5], [True], ["a"], [torch.ones(1)]
        self.counts, self.numbered, self.device = {"a": 1}, {1: torch.ones(2)}, torch.device("cpu")
        self.pair, self.tuple = Pair(torch.ones(1), 2), (1, "a", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


class OfItsOwn(nn.Module):
    """A module that jit restores by running its code."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(1))
        self.training = False

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]):
        self.weight = state[0] + 1
        self.training = state[1]

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A small valid file of each format."""
    folder = tmp_path_factory.mktemp("valid")
    paths = {kind: folder / kind for kind in ("safetensors", "save", "script")}
    save_file({"a": torch.arange(4.0), "b": torch.ones(2).half()}, paths["safetensors"], {"model": "tiny"})
    torch.save({"state_dict": some_weights(), "meta": {"classes": ("cat", "dog")}}, paths["save"])
    torch.jit.script(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3))).half()).save(str(paths["script"]))
    return paths


def test_torchscript_gives_what_jit_gives(tmp_path):
    path = tmp_path / "tree.pt"
    torch.jit.script(Tree()).save(str(path))
    archive, state = read(path), dict(torch.jit.load(str(path)).state_dict())
    assert same(archive.tensors, state)
    assert archive.meta == {}
    assert {"one.weight", "again.weight", "blocks.0.0.bias", "list.1", "steps", "one.passing"} <= archive.tensors.keys()
    assert archive.tensors["one.weight"].data_ptr() == archive.tensors["two.turned"].data_ptr()


def test_a_traced_model_in_the_layout_of_openai(tmp_path):
    path = tmp_path / "ViT-B-16.pt"
    clip = nn.Module()
    clip.visual = nn.TransformerEncoderLayer(8, 2, 16).half()
    clip.register_buffer("input_resolution", torch.tensor(224))
    clip.forward = lambda x: clip.visual.linear1(x)
    torch.jit.trace(clip, torch.ones(1, 8).half(), check_trace=False).save(str(path))
    tensors = read(path).tensors
    assert same(tensors, dict(torch.jit.load(str(path)).state_dict()))
    assert tensors["visual.self_attn.in_proj_weight"].dtype == torch.float16
    assert tensors["input_resolution"] == 224


def test_a_module_that_restores_itself_by_code_is_refused(tmp_path):
    torch.jit.script(nn.Sequential(OfItsOwn())).save(str(tmp_path / "own.pt"))
    assert refused(tmp_path / "own.pt").endswith("OfItsOwn with its own code, which is never run")


def test_a_storage_of_another_type_or_byte_order_is_refused(tmp_path, files):
    module = nn.Module()
    module.register_buffer("small", torch.ones(2).to(torch.float8_e4m3fn))
    torch.jit.script(module).save(str(tmp_path / "float8.pt"))
    assert "asks for torch.Float8_e4m3fnStorage" in refused(tmp_path / "float8.pt")
    assert "of a big-endian machine" in refused(with_members(files["script"], tmp_path / "big.pt", byteorder=b"big"))


CODE = 'class Root(Module):\n  __parameters__ = []\n  __buffers__ = ["weight", ]\n  weight : Tensor\n'
ROOT = b"c__torch__\nRoot\n)\x81"


def number(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def row(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def one_tensor(numel=4, offset=0, size=(4,), stride=(1,), key="0", storage="torch\nFloatStorage") -> bytes:
    """TorchScript's pickle of a module with one buffer, as it describes that."""
    described = text("storage") + f"c{storage}\n".encode() + text(key) + text("cpu") + number(numel)
    view = b"(" + described + b"tQ" + number(offset) + row(size) + row(stride)
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + view + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02" + ROOT + b"}(" + text("weight") + tensor + b"ub."


def scripted(path: Path, program: bytes, code: str = CODE) -> Path:
    """A TorchScript archive of `program`, whose storage "0" is the floats 0 to 3."""
    with zipfile.ZipFile(path, "w") as archive:
        contents = {"data": program, "constants": b"\x80\x02).", "code/__torch__": code}
        for name, content in contents.items():
            archive.writestr(f"root/{name}.{'py' if name.startswith('code') else 'pkl'}", content)
        archive.writestr("root/data/0", struct.pack("<4f", 0, 1, 2, 3))
        archive.writestr("root/version", "3\n")
    return path


@given(
    numel=st.integers(-1, 6),
    offset=st.integers(-1, 4),
    shape=st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 4)), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_a_tensor_is_a_view_within_its_storage_or_an_error(tmp_path_factory, numel, offset, shape):
    size, stride = tuple(n for n, _ in shape), tuple(step for _, step in shape)
    path = scripted(tmp_path_factory.getbasetemp() / "view.pt", one_tensor(numel, offset, size, stride))
    indices = [offset + sum(map(int.__mul__, at, stride)) for at in itertools.product(*map(range, size))]
    if min((numel, offset, *size, *stride)) >= 0 and numel <= 4 and all(index < numel for index in [offset - 1, *indices]):
        assert read(path).tensors["weight"].flatten().tolist() == indices
    else:
        assert "storage" in refused(path)


@pytest.mark.parametrize(
    "described, reason",
    [
        ({"numel": 2**62}, "claims 4611686018427387904 values for a storage of 16 bytes"),
        ({"size": (2**62,)}, "reaches outside its storage"),
        ({"size": (2, 2**70), "stride": (0, 0)}, "cannot be read as weights"),
        ({"size": (2**62, 2**62), "stride": (0, 0)}, "cannot be read as weights"),
        ({"size": (2**40,), "stride": (0,)}, "claims more bytes for 'weight' alone than the file has"),
        ({"size": (2, 2)}, "not a plain view of a storage"),
        ({"storage": "torch\nDoubleStorage"}, "claims 4 values for a storage of 16 bytes"),
        ({"storage": "torch\nQInt8Storage"}, "asks for torch.QInt8Storage"),
        ({"storage": "__torch__\nRoot"}, "not described as torch describes it"),
        ({"key": "1"}, "root/data/1"),
        ({"key": "../data.pkl"}, "root/data/../data.pkl"),
    ],
)
def test_a_tensor_that_is_none_is_an_error(tmp_path, described, reason):
    assert reason in refused(scripted(tmp_path / "a.pt", one_tensor(**described)))


@pytest.mark.parametrize(
    "program, reason",
    [
        (b"\x80\x02).", "not of a module"),
        (ROOT + b"}b.", "holds no tensors"),
        (ROOT + b"}(" + text("weight") + b"NubX", "cannot be read as weights"),
        (b"c__torch__\nOther\n)\x81}b.", "not of a module"),
        (ROOT + b"q\x00}(" + text("it") + b"h\x00ub.", "contain each other endlessly"),
        (
            ROOT + b"}bq\x00" + (ROOT + b"}(" + text("a") + b"h\x00" + text("b") + b"h\x00ubq\x00") * 40 + b".",
            "contain each other endlessly",
        ),
        (b"(" * 1000 + b".", "cannot be read as weights"),
        (b"\x80\x02\x96" + b"\xff" * 8 + b".", "cannot be read as weights"),
        (b"", "cannot be read as weights"),
    ],
)
def test_a_program_of_no_weights_is_an_error(tmp_path, program, reason):
    assert reason in refused(scripted(tmp_path / "a.pt", program))


def test_an_object_that_is_no_module_adds_no_tensors(tmp_path):
    other = text("other") + b"c__torch__\nOther\n)\x81}(" + text("weight") + b"h\x00ub"
    program = one_tensor().replace(b"tR" + b"ub.", b"tRq\x00" + other + b"ub.")
    assert read(scripted(tmp_path / "a.pt", program)).tensors.keys() == {"weight"}


def test_what_is_no_attribute_costs_nothing(tmp_path):
    # pickle.Unpickler would hash the tuples, 200000 deep, on the C stack, and allocate a memo of 2**32 entries
    deep = b"}()" + b"\x85" * 200_000 + b"Nur\xff\xff\xff\xff"
    program = one_tensor().replace(b"\x80\x02", b"\x80\x02(" + deep + b"(t", 1).replace(b"ub.", b"ub")
    path = scripted(tmp_path / "a.pt", program + b"q\x00th\x00.")
    assert read(path).tensors["weight"].tolist() == [0, 1, 2, 3]


# -------------------------------------------------------------------------------------------------------------- attacks


class Payload:
    def __init__(self, function: Any, *arguments: Any):
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def payloads(marker: Path) -> dict[str, Payload]:
    """By the global that it asks for, what creates `marker` when it is unpickled."""
    return {
        f"{os.system.__module__}.system": Payload(os.system, f"touch '{marker}'"),
        f"{open.__module__}.open": Payload(open, str(marker), "w"),
        "eval": Payload(eval, f"open({str(marker)!r}, 'w')"),
    }


@pytest.mark.parametrize("name", payloads(Path()))
@pytest.mark.parametrize("wrap", [lambda it: it, lambda it: {"w": it}, lambda it: {"state_dict": {}, "meta": {"time": [it]}}])
def test_a_payload_in_a_checkpoint_is_named_and_not_run(tmp_path, name, wrap):
    payload = payloads(tmp_path / "marker")[name]
    torch.save(wrap(payload), tmp_path / "evil.pt")
    assert f"{name}, which goes beyond tensors and plain values; nothing in it was executed" in refused(tmp_path / "evil.pt")
    assert not (tmp_path / "marker").exists()
    pickle.loads(member(tmp_path / "evil.pt", "data.pkl"))  # it was armed
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", payloads(Path()))
def test_a_payload_in_torchscript_is_named_and_not_run(tmp_path, files, name):
    payload = pickle.dumps(payloads(tmp_path / "marker")[name], 2)
    tree = member(files["script"], "data.pkl")
    for program in (payload, payload[:-1] + b"0" + tree[2:]):  # alone, and before the tree but off the stack again
        path = with_members(files["script"], tmp_path / "evil.pt", data=program)
        assert f"{name}, which goes beyond tensors and plain values; nothing in it was executed" in refused(path)
    assert not (tmp_path / "marker").exists()
    pickle.loads(payload)  # it was armed
    assert (tmp_path / "marker").exists()


def test_a_payload_in_a_newer_pickle_is_not_run(tmp_path, files):
    newer = pickle.dumps(payloads(tmp_path / "marker")[f"{open.__module__}.open"], 4)
    for kind in ("save", "script"):
        path = with_members(files[kind], tmp_path / "evil.pt", data=newer)
        assert ", which goes beyond tensors and plain values; nothing in it was executed" in refused(path)
    assert not (tmp_path / "marker").exists()


def test_a_payload_in_torchscripts_constants_is_not_run(tmp_path, files):
    payload = pickle.dumps(payloads(tmp_path / "marker")[f"{open.__module__}.open"], 2)
    path = with_members(files["script"], tmp_path / "evil.pt", constants=payload)
    assert same(read(path).tensors, read(files["script"]).tensors)
    assert not (tmp_path / "marker").exists()


def test_torch_never_sees_torchscript_where_python_sees_a_checkpoint(tmp_path, files, recwarn):
    """A zip with two tables of contents: Python's zipfile takes the one before its end, torch the one that the end names."""

    def parts(path: Path, comment: int) -> tuple[bytes, list[bytes]]:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer := io.BytesIO(), "w") as new:
            for info in old.infolist():
                copy = zipfile.ZipInfo(info.filename)
                copy.comment = b" " * (comment if info.filename.endswith("data.pkl") else 0)
                new.writestr(copy, old.read(info))
        data = buffer.getvalue()
        start = struct.unpack("<I", data[-6:-2])[0]
        return data[:start], [b"PK\x01\x02" + entry for entry in data[start:-22].split(b"PK\x01\x02")[1:]]

    torch.save({"w": torch.ones(2)}, tmp_path / "small.pt")
    long = sum(map(len, parts(files["script"], 0)[1]))
    for_torch, table = parts(files["script"], 0)
    for_python, decoy = parts(tmp_path / "small.pt", long - sum(map(len, parts(tmp_path / "small.pt", 0)[1])))
    count = max(len(table), len(decoy))
    shift = len(for_torch) - (len(for_torch) + long + len(for_python)) + len(for_torch) + long
    moved = [e[:42] + struct.pack("<I", struct.unpack("<I", e[42:46])[0] + shift) + e[46:] for e in decoy]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, long, len(for_torch), 0)
    path = tmp_path / "two.pt"
    path.write_bytes(for_torch + b"".join(table) + for_python + b"".join(moved) + end)
    assert not any(name.endswith("constants.pkl") for name in zipfile.ZipFile(path).namelist())
    assert "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    refused(path)
    assert not [warning for warning in recwarn if "torch.jit.load" in str(warning.message)]


@pytest.mark.parametrize("kind", ["save", "script"])
@pytest.mark.parametrize("claimed, reason", [(2**20, "cannot be read as weights"), (2**31, "claims to unpack to more bytes")])
def test_a_member_that_claims_more_than_there_is(tmp_path, files, kind, claimed, reason):
    data = with_members(files[kind], tmp_path / "plain.pt").read_bytes()
    table = struct.unpack("<I", data[-6:-2])[0]
    entries = data[table:].split(b"PK\x01\x02")
    larger = [e[:16] + struct.pack("<II", claimed, claimed) + e[24:] if b"/data.pkl" in e else e for e in entries]
    (tmp_path / "large.pt").write_bytes(data[:table] + b"PK\x01\x02".join(larger))
    assert reason in refused(tmp_path / "large.pt")


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("root/data.pkl", one_tensor(numel=2**24))
        archive.writestr("root/data/0", bytes(2**26 + 2**20))
        archive.writestr("root/constants.pkl", b"\x80\x02).")
    assert "claims to unpack to more bytes than it has" in refused(tmp_path / "bomb.pt")


def test_a_checkpoints_tensor_that_reaches_outside_its_storage(tmp_path):
    torch.save({"w": torch.arange(4.0)}, tmp_path / "a.pt")
    before, numel, *rest = member(tmp_path / "a.pt", "data.pkl").split(b"K\x04")
    longer = before + b"K\x04" + numel + b"K\x64" + b"K\x04".join(rest)
    assert "resize" in refused(with_members(tmp_path / "a.pt", tmp_path / "b.pt", data=longer))


# --------------------------------------------------------------------------------------------------------------- damage


def read_or_refused(path: Path) -> None:
    """Either the tensors are there, to the last value, or it is an ArchiveError."""
    try:
        archive = read(path)
    except ArchiveError:
        refused(path)
        return
    assert isinstance(archive, Archive) and isinstance(archive.meta, dict)
    assert all(isinstance(name, str) for name in archive.tensors)
    for tensor in archive.tensors.values():
        if tensor.numel() < 2**20:
            assert tensor.clone().shape == tensor.shape


def flipped(data: bytes, seed: int) -> bytes:
    changed, random = bytearray(data), Random(seed)
    for _ in range(random.choice((1, 2, 8))):
        changed[random.randrange(len(data))] = random.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["safetensors", "save", "script"])
def test_every_cut_is_an_error(tmp_path, files, kind):
    data, path = files[kind].read_bytes(), tmp_path / f"cut.{kind}"
    for length in {*range(0, len(data), max(1, len(data) // 100)), *range(40), len(data) - 1}:
        path.write_bytes(data[:length])
        refused(path)


@given(data=st.binary(max_size=300), start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x20" + bytes(7) + b"{"]))
@FUZZ
def test_random_bytes_are_an_error(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "random.pt"
    path.write_bytes(start + data)
    refused(path)


@pytest.mark.parametrize("kind", ["safetensors", "save", "script"])
@given(seed=SEEDS)
@FUZZ
def test_flipped_bytes_give_weights_or_an_error(tmp_path_factory, files, kind, seed):
    path = tmp_path_factory.getbasetemp() / f"flipped.{kind}"
    path.write_bytes(flipped(files[kind].read_bytes(), seed))
    read_or_refused(path)


@pytest.mark.parametrize("kind", ["save", "script"])
@given(seed=SEEDS)
@FUZZ
def test_flipped_bytes_of_the_pickle_give_weights_or_an_error(tmp_path_factory, files, kind, seed):
    changed = flipped(member(files[kind], "data.pkl"), seed)  # with valid zip checksums
    read_or_refused(with_members(files[kind], tmp_path_factory.getbasetemp() / f"pickle.{kind}", data=changed))


@given(seed=SEEDS)
@FUZZ
def test_flipped_bytes_of_the_header_give_weights_or_an_error(tmp_path_factory, files, seed):
    path, whole = tmp_path_factory.getbasetemp() / "header.safetensors", files["safetensors"].read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    path.write_bytes(flipped(whole[:length], seed) + whole[length:])
    read_or_refused(path)

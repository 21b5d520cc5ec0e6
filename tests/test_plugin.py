"""A type from a package of its own, found through its entry point: everything works on it, and nothing of ggufx knows it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugin"


def install(folder: Path, *, name: str | None = None, entry: str | None = None, code: str | None = None) -> Path:
    """Do what pip does with the package, which may lack setuptools and the network here: copy it, write its metadata."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    name = name or project["name"]
    module = name.replace("-", "_")
    if code is None:
        shutil.copytree(PLUGIN / module, folder / module, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        (folder / f"{module}.py").write_text(code)
    entries = project["entry-points"]["ggufx.types"] if entry is None else {entry: f"{module}:{entry}"}
    info = folder / f"{module}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {project['version']}\n")
    lines = "".join(f"{key} = {value}\n" for key, value in entries.items())
    (info / "entry_points.txt").write_text(f"[ggufx.types]\n{lines}")
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ggufx(folder: Path, *arguments: object) -> str:
    done = run(folder, "-m", "ggufx", *map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    path = folder / "model.gguf"
    code = f"""
import numpy as np
from ggufx import types
from ggufx.container import Value, encode_header
codec = types.get("ternary")
values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
packed = codec.encode(values)
decoded = codec.decode(packed)
assert packed.shape == (4, 24) and decoded.shape == (4, 64)
assert np.array_equal(codec.encode(decoded), packed)
assert ((decoded - values) ** 2).sum() < 0.25 * (values**2).sum()
header = encode_header({{"general.name": Value.string("tiny")}}, [("a.weight", (4, 64), 250, 0), ("b", (8,), 0, 96)], 32)
open({str(path)!r}, "wb").write(header + packed.tobytes() + bytes(32))
"""
    done = run(folder, "-c", code)
    assert done.returncode == 0, done.stderr
    return path


def test_it_is_listed(folder: Path) -> None:
    rows = {row["type"]: row for row in json.loads(ggufx(folder, "types", "--json"))}
    row = rows["TERNARY"]
    assert (row["ids"]["llama.cpp"], row["block"], row["bytes"], row["bpw"]) == (250, 16, 6, 3.0)
    assert row["decode"]
    assert row["encode"]
    assert row["kernel"]
    assert not row["CUDA"]
    assert "TERNARY" in ggufx(folder, "types")


def test_it_passes_the_selftest(folder: Path) -> None:
    out = ggufx(folder, "selftest", "TERNARY")
    assert "0 laws broken" in out
    assert "encode_error" in out
    found = json.loads(ggufx(folder, "selftest", "ternary", "q8_0", "--json"))
    statuses = {verdict["law"]: verdict["status"] for verdict in found["types"]["TERNARY"]}
    assert statuses["encode_rows"] == statuses["decode_kernel"] == "kept"
    assert statuses["pack_inverse"] == "inapplicable"
    assert set(found["types"]) == {"TERNARY", "Q8_0"}


def test_a_file_of_it_is_opened_inspected_decoded_diffed_and_rewritten(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    found = json.loads(ggufx(folder, "inspect", model, "--json"))
    assert [(t["name"], t["type"], t["nbytes"]) for t in found["tensors"]] == [
        ("a.weight", "TERNARY", 96),
        ("b", "F32", 32),
    ]
    copy = tmp_path / "copy.gguf"
    ggufx(folder, "rewrite", model, "--outfile", copy)
    assert copy.read_bytes()[-128:] == model.read_bytes()[-128:]
    assert "the same" in ggufx(folder, "diff", model, copy)
    data = bytearray(copy.read_bytes())
    data[-126] ^= 3  # a code of the first block
    copy.write_bytes(data)
    done = run(folder, "-m", "ggufx", "diff", str(model), str(copy), "--json")
    assert done.returncode == 1, done.stderr
    assert [(t["name"], t["differing"]) for t in json.loads(done.stdout)["tensors"]] == [("a.weight", 1)]
    code = f"import ggufx; t = ggufx.open({str(model)!r})['a.weight']; print(t.type, t.numpy().shape, t[2].shape)"
    assert run(folder, "-c", code).stdout.strip() == "TERNARY (4, 64) (64,)"


def test_without_the_package_the_file_still_opens_and_lists(model: Path, tmp_path: Path) -> None:
    found = json.loads(ggufx(tmp_path, "inspect", model, "--json"))
    assert "TERNARY" not in found["tensors"][0]["type"]
    assert found["tensors"][0]["nbytes"] == 96


TAKEN = """
import numpy as np
from ggufx.types import Codec, Layout
class TAKEN(Codec):
    layout = Layout(1, np.dtype([("v", "u1")]))
    ids = {"llama.cpp": 8}
"""


# Importing, looking types up twice, and two commands, the last as a process ends.
BROKEN = """
import sys
import ggufx
print("imported")
for _ in range(2):
    try:
        ggufx.types.get("Q8_0")
    except ggufx.GGUFError as error:
        print(type(error).__name__, "acme-types" in str(error), type(error.__cause__).__name__)
from ggufx import cli
sys.argv = ["ggufx", "types"]
try:
    cli.main()
except SystemExit as stop:
    print("types", stop.code)
sys.argv = ["ggufx", "selftest", "Q8_0"]
cli.run()
"""


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("raise RuntimeError('no\\nluck')", "RuntimeError: no luck"),
        ("import a_package_that_is_not_there", "ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("", "AttributeError"),
        ("TAKEN = 3", "TypeError: it is 3, not a subclass of ggufx.types.Codec"),
        (TAKEN, "ValueError: TAKEN claims id 8 of llama.cpp, which is Q8_0"),
        (
            TAKEN.replace("TAKEN(Codec)", "Q8_0(Codec)") + "TAKEN = Q8_0",
            "ValueError: a type named Q8_0 is already registered",
        ),
    ],
    ids=["raises", "missing package", "missing class", "no class", "duplicate id", "duplicate name"],
)
def test_a_broken_plugin_is_one_clear_line(tmp_path: Path, code: str, wanted: str) -> None:
    install(tmp_path, name="acme-types", entry="TAKEN", code=code)
    install(tmp_path)  # beside a good one, which must not be half-registered when the other fails
    done = run(tmp_path, "-c", BROKEN)
    start = "type plug-in 'TAKEN' (acme_types:TAKEN, group ggufx.types) of acme-types does not load: "
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert all(line.startswith(f"error: {start}{wanted}") for line in lines), done.stderr
    cause = wanted.partition(":")[0]
    assert done.stdout == "imported\n" + 2 * f"PluginError True {cause}\n" + "types 1\n"


def test_commands_end_with_1_where_a_plugin_is_broken(tmp_path: Path) -> None:
    install(tmp_path, name="acme-types", entry="TAKEN", code="TAKEN = 3")
    done = run(tmp_path, "-m", "ggufx", "types")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: type plug-in 'TAKEN' (acme_types:TAKEN")
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_plugin_may_look_types_up_while_it_is_imported(tmp_path: Path) -> None:
    code = TAKEN.replace("8}", "251}") + "from ggufx import types\nassert types.get('Q8_0').name == 'Q8_0'\n"
    install(tmp_path, name="acme-types", entry="TAKEN", code=code)
    assert run(tmp_path, "-c", "import ggufx; print(ggufx.types.get('taken').ids)").stdout == "{'llama.cpp': 251}\n"


def test_its_specification_decodes_in_plain_torch(folder: Path, model: Path) -> None:
    pytest.importorskip("torch")
    code = f"""
import numpy as np, torch
import ggufx.torch
from ggufx.torch.decoding import decode_rows, way_of
w = ggufx.torch.load({str(model)!r})["a.weight"]
out = torch.empty(4, 64)
decode_rows(w.codec, w.packed, out, "torch")
# By the formula: (q - 1) * d, by hand from the bytes.
raw = w.packed.numpy().reshape(4, 4, 6)
d = raw[..., :2].copy().view("<f2").astype(np.float32)
q = (raw[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(4, 4, 16)
assert np.array_equal(out.numpy().reshape(4, 4, 16), (q.astype(np.float32) - 1) * d)
assert way_of(w.codec, torch.device("mps")) == "torch"
"""
    done = run(folder, "-c", code)
    assert done.returncode == 0, done.stderr


def test_its_kernel_decodes_every_float(folder: Path, model: Path) -> None:
    code = f"""
import ml_dtypes, numpy as np
import ggufx
from ggufx import warmup
w = ggufx.open({str(model)!r})["a.weight"]
by_hand = w.codec.decode(w.packed, use_kernel=False)
for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
    with warmup.compiling() as compiled:
        found = w.numpy(dtype)
    assert np.array_equal(found, by_hand.astype(dtype)), dtype
print(len(w.codec._kernels["decode"].signatures))
"""
    done = run(folder, "-c", code)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_a_plugin_may_bring_a_dialect_and_a_gpu_kernel(tmp_path: Path) -> None:
    code = """
import numpy as np
from ggufx import dialects
from ggufx.types import Codec, Layout
dialects.register(dialects.Dialect("acme", parent="llama.cpp", lacks=frozenset({8})))
class TAKEN(Codec):
    layout = Layout(32, np.dtype([("d", "<f2"), ("q", "u1", (4,))]))
    ids = {"acme": 8}
    cuda_module = "acme_gpu"
    def decode_blocks(self, block, header, w):
        return w.floats(w.fields(block["q"], 1)) * w.half(block["d"])
"""
    install(tmp_path, name="acme-types", entry="TAKEN", code=code)
    (tmp_path / "acme_gpu.py").write_text("def decode(rows, out):\n    out.fill_(7)\n")
    use = f"""
import os
os.environ["TRITON_INTERPRET"] = "1"  # a device that runs what is for CUDA
import numpy as np, torch
import ggufx, ggufx.torch
from ggufx.container import Value, encode_header
path = {str(tmp_path / "m.gguf")!r}
# The number is Q8_0's in llama.cpp: the size of the rows tells them apart.
header = encode_header({{}}, [("a", (2, 32), 8, 0)], 32)
open(path, "wb").write(header + bytes(range(12)) + bytes(20))
with ggufx.open(path) as f:
    print(f.dialect, f["a"].type, f["a"].numpy().shape)
print(ggufx.dialects.get("acme").type_id(ggufx.types.get("Q8_0")), ggufx.types.get("taken").has_cuda)
print(ggufx.torch.load(path)["a"].dequantize().unique().tolist())
"""
    done = run(tmp_path, "-c", use)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["acme TAKEN (2, 32)", "None True", "[7.0]"]


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        ('Dialect("llama.cpp")', "'llama.cpp' cannot be the name of a dialect: it is taken"),
        ('Dialect("ds4")', "'ds4' cannot be"),
        ('Dialect("opaque")', "'opaque' cannot be"),
        ('Dialect("")', "'' cannot be"),
        ('Dialect("x", parent="y")', "its parent 'y' is not a known dialect"),
    ],
)
def test_dialects_that_cannot_be_registered(made: str, wanted: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-c", f"from ggufx.dialects import Dialect, register; register({made})")
    assert wanted in done.stderr.splitlines()[-1]


def test_torch_tensors_need_the_module_that_encodes_them(tmp_path: Path) -> None:
    code = """
import sys, torch
from ggufx import types
from ggufx.errors import CodecError
codec = types.get("Q8_0")
try:
    codec.encode(torch.zeros(2, 32))
except CodecError as error:
    print(error)
assert "ggufx.torch" not in sys.modules
import ggufx.torch
print(type(codec.encode(torch.zeros(2, 32))).__name__)
"""
    done = run(tmp_path, "-c", code)
    assert done.stdout.splitlines() == [
        "the values are a torch tensor: import ggufx.torch first, which encodes it where it is", "Tensor",
    ]  # fmt: skip

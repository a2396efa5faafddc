"""The public door, and the rules that every module of the package keeps."""

import ast
import configparser
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpq_tf
from gpq_tf import model_file

PACKAGE = Path(gpq_tf.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
CARDS = (ROOT / "models" / "README.md").read_text()
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in FILES}

# A module imports only what stands left of it (or beside it, in the same folder).
ORDER = [
    "files",
    "stopping",
    "settings",
    "replicas",
    "ops",
    "data",
    "augment",
    "backbones",
    "quantizer",
    "centred_quantizer",
    "losses",
    "descriptors",
    "optimizers",
    "heads",
    "model_file",
    "training_state",
    "network",
    "index",
    "metrics",
    "retrieval",
    "codebooks",
    "recall",
    "measures",
    "training_state",
    "convert",
    "visualize",
    "curves",
    "saves",
    "strategies",
    "accumulation",
    "train_step",
    "starting",
    "running",
    "trainer",
    "demo",
    "cgd_command",
    "quantize_command",
    "spq_command",
    "__main__",
    "app",
]
# Where TensorFlow itself is called; everything else is keras.ops. (`__main__` imports it to keep it quiet.)
MAY_IMPORT_TENSORFLOW = (
    "data/",
    "convert/",
    "ops.py",
    "replicas.py",
    "strategies.py",
    "accumulation.py",
    "train_step.py",
    "trainer.py",
    "__main__.py",
)


def run(program):
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return result.stdout.split()


def test_importing_the_package_costs_nothing():
    program = "import sys; before = set(sys.modules); import gpq_tf; print(*sorted(set(sys.modules) - before))"
    imported = {name.partition(".")[0] for name in run(program)}
    heavy = {
        "tensorflow",
        "keras",
        "jax",
        "numpy",
        "faiss",
        "scipy",
        "PIL",
        "matplotlib",
        "tensorflow_datasets",
        "h5py",
    }
    assert "gpq_tf" in imported
    assert not imported & heavy


def test_the_index_and_its_metrics_need_no_tensorflow():
    program = "import sys, gpq_tf; gpq_tf.PQIndex; gpq_tf.metrics; print(*{n.partition('.')[0] for n in sys.modules})"
    assert not {"tensorflow", "keras", "jax"} & set(run(program))


def test_public_names_resolve():
    from gpq_tf import index, network

    assert gpq_tf.load_model is network.load_model
    assert gpq_tf.PQIndex is index.PQIndex
    assert gpq_tf.metrics.mean_average_precision is not None
    assert gpq_tf.losses.classification is not None
    assert gpq_tf.quantizer.soft_assign is not None
    assert set(gpq_tf.__all__) <= set(dir(gpq_tf))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'gpq_tf' has no attribute 'no_such_name'$"):
        gpq_tf.no_such_name  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert gpq_tf.__version__ == config["metadata"]["version"]


def imported_by(tree):
    """(module, line) of every import anywhere in a file, with names in full: `from gpq_tf import x` is gpq_tf.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def part(path):
    """The name in ORDER that a file of the package belongs to."""
    return path.partition("/")[0].removesuffix(".py")


def test_every_module_has_its_place():
    parts = {part(path) for path in TREES} - {"__init__", "weights"}
    assert parts <= set(ORDER)


@pytest.mark.parametrize("path", [path for path in TREES if path != "__init__.py"])
def test_imports_go_left(path):
    for name, line in imported_by(TREES[path]):
        if name.partition(".")[0] != "gpq_tf":
            continue
        target, own = name.split(".")[1], part(path)
        # `from gpq_tf import __version__` takes a name of the door, not a module
        if target != own and target in ORDER:
            assert ORDER.index(target) < ORDER.index(own), f"{path}:{line} imports {name}"
        assert target in ORDER or target == "__version__", f"{path}:{line} imports {name}"


def test_no_import_is_relative():
    relative = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


@pytest.mark.parametrize("path", TREES)
def test_tensorflow_is_imported_where_it_may_be_and_only_inside_functions(path):
    lines = [line for name, line in imported_by(TREES[path]) if name.partition(".")[0] == "tensorflow"]
    if lines:
        assert path.startswith(MAY_IMPORT_TENSORFLOW)
    at_import = [node for node in TREES[path].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not set(lines) & {node.lineno for node in at_import}


def test_ops_calls_tensorflow_only_to_compile_and_to_normalise_batches():
    functions = [node for node in TREES["ops.py"].body if isinstance(node, ast.FunctionDef)]
    users = {function.name for function in functions for name, _ in imported_by(function) if name == "tensorflow"}
    assert users == {"compiled", "batch_normalize", "_has_fused_kernel", "_with_fused_kernel"}


@pytest.mark.parametrize("path", TREES)
def test_no_assertion_guards_users_and_nothing_is_printed(path):
    nodes = list(ast.walk(TREES[path]))
    assert not [node.lineno for node in nodes if isinstance(node, ast.Assert)]
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    forbidden = {"eval", "exec"} | (set() if path == "__main__.py" else {"print"})
    assert not [(node.func.id, node.lineno) for node in calls if node.func.id in forbidden]


def test_only_the_restricted_unpickler_touches_pickle():
    users = {path for path, tree in TREES.items() for name, _ in imported_by(tree) if name in ("pickle", "joblib")}
    assert users <= {"data/unpickler.py"}
    for path, tree in TREES.items():
        allowing = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
        ]
        assert not allowing, path


def test_every_shipped_model_has_its_card_and_its_checksum():
    shipped = sorted((PACKAGE / "weights").glob("*.keras"))
    assert [path.stem for path in shipped] == re.findall(r"^## (\S+)$", CARDS, re.MULTILINE)
    sums = (PACKAGE / "weights" / "SHA256SUMS").read_text()
    for path in shipped:
        card = re.split(r"^## ", CARDS.partition(f"## {path.stem}\n")[2], flags=re.MULTILINE)[0]
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"| sha256 | {checksum} |" in card
        assert f"{checksum}  {path.name}\n" in sums
        assert f"{path.stat().st_size:,} bytes" in card


def test_a_shipped_model_that_was_changed_is_refused(tmp_path):
    name = "gpq-cifar10-48bits.keras"
    for file in (name, "SHA256SUMS"):
        (tmp_path / file).write_bytes((PACKAGE / "weights" / file).read_bytes())
    model_file.check_shipped(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    with pytest.raises(ValueError, match=r"Expected sha256 [0-9a-f]{64}\. Received: [0-9a-f]{64}; .*install it again"):
        model_file.check_shipped(tmp_path / name)
    (tmp_path / "another.keras").write_bytes(content)
    with pytest.raises(ValueError, match="Expected its sha256 in SHA256SUMS, which lacks it"):
        model_file.check_shipped(tmp_path / "another.keras")

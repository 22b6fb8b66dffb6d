"""What holds for the whole repository: sizes, layers, names, versions, nothing private in tracked files."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mars

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mars"
MODULES = sorted(SOURCE.rglob("*.py"))

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Tests of the whole repository, which mirror no module.
CROSS_CUTTING = {"docs/test_commands.py", "test_package.py", "test_shipped_model.py", "test_structure.py"}

# In pieces, so that this file does not hold what it looks for.
PRIVATE = [
    "py" + r"pi\.org",
    "python" + r"hosted\.org",
    "registry" + r"\.npmjs\.org",
    "deb" + r"\.debian\.org",
    "/" + r"work/(main|shared|\.library)\b",
    "/" + r"tmp/",
    "/" + r"opt/(wheels|py)",
    "/" + r"(root|home)/\w",
]


def functions(module: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module, nested ones too."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def tracked_files() -> list[Path]:
    """The files that git tracks and that exist."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_source_file_is_longer_than_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in MODULES
        for node in functions(path)
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


def test_every_public_module_has_a_docstring() -> None:
    public = [path for path in MODULES if not path.name.startswith("_") or path.name == "__init__.py"]
    missing = [path for path in public if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert missing == []


def test_every_test_file_mirrors_a_module() -> None:
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    strays = [
        str(path)
        for path in tests
        if str(path) not in CROSS_CUTTING
        and not any((root / path.parent / path.name.removeprefix("test_")).is_file() for root in (SOURCE, ROOT))
    ]
    assert strays == []


def test_imports_follow_the_layers() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_torchvision_is_nowhere() -> None:
    assert importlib.util.find_spec("torchvision") is None
    names = re.findall(r"^[\w.-]+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert "torch" in names
    assert "torchvision" not in names


@pytest.mark.parametrize("module", ["mars", "mars.cli"])
def test_importing_it_imports_nothing_heavy(module: str) -> None:
    heavy = {"PIL", "diffusers", "numpy", "safetensors", "tokenizers", "torch", "transformers"}
    code = f"import sys, {module}; print(sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    assert mars._LAZY.keys() < set(mars.__all__)
    names = ", ".join(mars.__all__)
    code = f"from mars import {names}; print([one.__module__ for one in (MarsError, MarsPipeline)])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['mars.errors', 'mars.pipeline']"


def test_an_unknown_name_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'mars' has no attribute 'Marspipeline'"):
        _ = mars.Marspipeline


def test_no_tracked_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    pattern = re.compile("|".join(PRIVATE).encode())
    found = [
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked_files()
        if b"\0" not in (content := path.read_bytes())[:8192]
        for match in [pattern.search(content)]
        if match
    ]
    assert found == []


def test_the_version_is_the_same_everywhere() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    newest = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest is not None
    assert mars.__version__ == declared == newest.group(1)


def test_every_exact_requirement_of_weights_is_left_out_of_the_constraints() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    for path in (ROOT / "requirements").glob("weights-*.txt"):
        for name in re.findall(r"^([\w.-]+)==", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert f"\n{name}==" not in pins

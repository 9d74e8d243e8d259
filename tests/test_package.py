"""The package as a whole: cheap to import, arrows between its parts, names that resolve, docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mmsdk
from mmsdk.bench.runner import BENCHMARKS, resolve_benchmark
from mmsdk.loading import REGISTRY, TOKENIZERS, resolve
from mmsdk.training.loop import Recipe
from mmsdk.training.recipes import RECIPES, resolve_recipe
from tokenizers_img.base import ImageTokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmsdk", "tokenizers_img", "generators", "pruning")
HEAVY = ("torch", "torchvision", "numpy", "PIL", "diffusers", "transformers", "timm", "accelerate", "matplotlib")
# Who may import whom. The core's training, benchmarks and command line use everything; the rest of it only itself.
ARROWS = {
    "mmsdk": set(),
    "tokenizers_img": {"mmsdk"},
    "generators": {"mmsdk", "tokenizers_img"},
    "pruning": {"mmsdk"},
}
FREE_PARTS = ("mmsdk.training", "mmsdk.bench", "mmsdk.cli", "mmsdk.__main__")


def module_names(package: str) -> list[str]:
    root = importlib.import_module(package)
    return [package, *(info.name for info in pkgutil.walk_packages(root.__path__, f"{package}."))]


MODULES = [name for package in PACKAGES for name in module_names(package)]


def imported_by(source: str) -> set[str]:
    """The modules that a source imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(str(node.module))
    return found


def crossings(module: str, source: str) -> set[str]:
    package = module.partition(".")[0]
    if any(module == part or module.startswith(f"{part}.") for part in FREE_PARTS):
        return set()
    ours = {name.partition(".")[0] for name in imported_by(source)} & set(PACKAGES)
    return ours - ARROWS[package] - {package}


def source_path(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


# ---------------------------------------------------------------- imports


def loaded_by(module: str) -> set[str]:
    """The packages that a new interpreter has loaded after importing `module`."""
    code = f"import sys, {module}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)  # noqa: S603
    return {name.partition(".")[0] for name in run.stdout.split()}


@pytest.mark.parametrize(
    "module", ["mmsdk", "mmsdk.errors", "mmsdk.cli", "mmsdk.training.recipes", "mmsdk.bench.runner"]
)
def test_importing_is_cheap(module: str) -> None:
    assert loaded_by(module) & {*HEAVY, *PACKAGES} == {"mmsdk"}


def test_loading_imports_no_model() -> None:
    assert loaded_by("mmsdk.loading") & {"diffusers", "transformers", "timm", *PACKAGES} == {"mmsdk"}


@pytest.mark.parametrize("module", MODULES)
def test_arrows_between_the_packages(module: str) -> None:
    assert crossings(module, source_path(module).read_text(encoding="utf-8")) == set()


def test_the_arrow_check_sees_imports_inside_functions() -> None:
    source = "def f():\n    from generators.pipelines import ARImagePipeline\n"
    assert crossings("mmsdk.images", source) == {"generators"}
    assert crossings("tokenizers_img.vq", source) == {"generators"}
    assert crossings("pruning.base", "import tokenizers_img.vq") == {"tokenizers_img"}
    assert crossings("mmsdk.training.loop", source) == set()


def test_every_source_file_is_a_module() -> None:
    files = {p for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    assert {source_path(module) for module in MODULES} == files


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_registry_targets_resolve(name: str) -> None:
    target = resolve(name)
    assert inspect.isclass(target) or inspect.isfunction(target)
    assert getattr(target, "registry_name", name) == name


def test_tokenizers_of_the_registry() -> None:
    targets = {name: resolve(name) for name in REGISTRY}
    found = {name for name, target in targets.items() if inspect.isclass(target) and issubclass(target, ImageTokenizer)}
    assert found == set(TOKENIZERS)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_resolve(name: str) -> None:
    recipe = resolve_recipe(name)
    assert issubclass(recipe, Recipe)
    assert not inspect.isabstract(recipe)
    assert recipe.name == name


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmarks_resolve(name: str) -> None:
    assert inspect.isfunction(resolve_benchmark(name))


def test_lazy_exports() -> None:
    for name in mmsdk.__all__:
        assert getattr(mmsdk, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = mmsdk.no_such_name


# ---------------------------------------------------------------- docstrings


def public_objects(module: ModuleType) -> list[tuple[str, Any]]:
    """Public classes and functions that the module defines, and the public methods and properties of the classes."""
    found: list[tuple[str, Any]] = []
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            found.append((name, value))
        elif inspect.isclass(value):
            found.append((name, value))
            for key, member in vars(value).items():
                member = getattr(member, "__func__", member)
                if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    found.append((f"{name}.{key}", member))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_is_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__, f"{module} has no docstring"
    bare = [
        name
        for name, value in public_objects(loaded)
        if not (value.fget if isinstance(value, property) else value).__doc__
    ]
    assert bare == []


# ---------------------------------------------------------------- packaging


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_version_is_one(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == mmsdk.__version__
    try:
        assert version("mmsdk") == mmsdk.__version__
    except PackageNotFoundError:
        pytest.skip("mmsdk is not installed here")


def test_all_packages_ship_with_their_types(project: dict[str, Any]) -> None:
    assert set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(PACKAGES)
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").is_file()


def third_party_imports(names: list[str]) -> set[str]:
    imported = {name for module in names for name in imported_by(source_path(module).read_text(encoding="utf-8"))}
    roots = {name.partition(".")[0] for name in imported}
    return roots - set(sys.stdlib_module_names) - set(PACKAGES)


def test_imports_are_declared_dependencies(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    declared = [*project["project"]["dependencies"], *extras["data"], *extras["bench"], *extras["entropy"]]
    declared += extras["text"]
    names = {d.split(";")[0].strip().partition(">")[0].partition("=")[0].replace("-", "_").lower() for d in declared}
    # These are part of what is declared: transformers and diffusers are built on them.
    names |= {"huggingface_hub", "tokenizers"}
    assert {name.lower() for name in third_party_imports(MODULES)} - names - {"pil"} == set()

"""Imports go down only: the rules of the house, read off the source."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("samplers", "pixart", "nodes", "demo", "benchmarks", "devtools", "editor")
OWN_NAMES = {*PACKAGES, "tests", "pixart_pack"}
# What a package may import from outside besides the standard library. The host brings all of it.
LIBRARIES = {
    "samplers": {"torch", "tqdm"},
    "pixart": {"torch", "safetensors", "numpy", "einops"},
    "devtools": set(),
    "editor": {"numpy", "PIL"},
}
MORE_LIBRARIES = {
    "pixart.text": {"transformers", "sentencepiece", "ftfy"},
    "pixart.resolution": {"PIL"},
    "pixart.drawing.sheets": {"PIL"},
    "pixart.drawing.diagrams": {"PIL"},
    "pixart.commands.server": {"PIL"},
    "pixart.commands.compare": {"PIL", "tqdm"},
    "pixart.encoders.edges": {"kornia"},
    "pixart.commands.sample": {"PIL", "tqdm"},
    "pixart.encoders.t5": {"transformers"},
    "pixart.tracking.run_log": {"PIL", "wandb"},
    "pixart.commands.evaluate": {"PIL", "tqdm"},
    "pixart.commands.scores": {"PIL", "torchmetrics", "transformers"},
    "pixart.encoders.captioner": {"transformers", "PIL"},
    "pixart.encoders.autoencoder": {"diffusers"},
    "pixart.encoders.consistency_decoder": {"diffusers"},
    "pixart.training": {"transformers", "sentencepiece", "PIL", "accelerate", "tqdm", "wandb", "yaml"},
    "pixart.data.sources": {"datasets"},
}
# Packages that a package may reach by relative imports, besides itself.
BELOW = {
    "samplers": set(),
    "pixart": set(),
    "devtools": set(),
    "nodes": {"pixart", "samplers"},
    "editor": {"pixart", "samplers", "demo", "devtools"},
}
LADDER = ("pixart.config", "pixart.layers", "pixart.transformer", "pixart.controlnet")
# These read and write files: of the model they know its configuration alone.
CHECKPOINT = (
    "checkpoint",
    "control_layout",
    "control_storage",
    "detection",
    "layout",
    "folder",
    "pth",
    "storage",
    "saving",
)
NODE_FILES_MAY_IMPORT = {"comfy_api", "torch"}
# The nodes that train, those that make what is trained with, and what the demo is taught by are training's only doors.
TRAINING_DOORS = (
    *("nodes.training", "nodes.host.training.runs"),
    *("nodes.dataset", "nodes.features", "nodes.host.training.dataset", "nodes.host.training.encoding"),
    *("demo.control", "demo.train_control", "demo.finetune", "benchmarks.train"),
)


@dataclass(frozen=True)
class Import:
    """module: who imports, such as `pixart.layers`; target: what, dotted from the root; relative: how."""

    module: str
    target: str
    relative: bool

    @property
    def package(self) -> str:
        return self.module.split(".")[0]

    @property
    def target_package(self) -> str:
        return self.target.split(".")[0]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def resolve(target: str) -> str:
    """The module that holds a dotted name: `pixart.config.CONFIGS` lies in `pixart.config`."""
    while target and target not in FILES:
        target = target.rpartition(".")[0]
    return target


def imports_of(module: str, path: Path) -> Iterator[Import]:
    # For relative imports: the module's package, which for an __init__.py is the module itself.
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, False)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield Import(module, node.module, False)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                yield Import(module, ".".join([*base, alias.name]), True)


IMPORTS = [each for module, path in FILES.items() for each in imports_of(module, path)]
INNER = [(each, resolve(each.target)) for each in IMPORTS if each.relative]


def broken(rule) -> list[str]:
    return sorted({f"{each.module} imports {each.target}" for each in IMPORTS if rule(each)})


def test_the_imports_are_seen():
    assert any(each.module == "pixart.transformer" and target == "pixart.config" for each, target in INNER)
    assert any(each.module == "nodes.host.schema" and each.target_package == "comfy_api" for each in IMPORTS)
    assert not [each for each, target in INNER if not target and each.target_package not in OWN_NAMES]


def test_own_modules_are_imported_relatively():
    """ComfyUI registers the pack under its folder's name, and `import nodes` would give ComfyUI's own file."""
    assert not broken(lambda each: not each.relative and each.target_package in OWN_NAMES)


@pytest.mark.parametrize("package", LIBRARIES)
def test_libraries(package):
    def allowed(module: str) -> set[str]:
        more = [names for prefix, names in MORE_LIBRARIES.items() if f"{module}.".startswith(f"{prefix}.")]
        return LIBRARIES[package].union(sys.stdlib_module_names, *more)

    foreign = broken(
        lambda each: each.package == package and not each.relative and each.target_package not in allowed(each.module)
    )
    assert not foreign


@pytest.mark.parametrize("package", BELOW)
def test_packages_reach_down_only(package):
    reachable = {package, *BELOW[package]}
    assert not broken(lambda each: each.package == package and each.relative and each.target_package not in reachable)


def test_modules_form_no_circle():
    graph: dict[str, set[str]] = {module: set() for module in FILES}
    for each, target in INNER:
        if target and target != each.module:
            graph[each.module].add(target)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_the_model_is_a_ladder():
    for rung, module in enumerate(LADDER):
        for each, target in INNER:
            if each.module == module and target.startswith("pixart"):
                assert target in LADDER[:rung], f"{module} imports {each.target}"


def test_checkpoints_know_the_configuration_alone():
    family = {f"pixart.{name}" for name in CHECKPOINT}
    wrong = [each for each, target in INNER if each.module in family and target not in {"pixart.config", *family}]
    assert not wrong


def test_nothing_imports_training():
    def trains(name: str) -> bool:
        return f"{name}.".startswith("pixart.training.")

    wrong = [
        each
        for each, target in INNER
        if trains(target) and not trains(each.module) and each.module not in TRAINING_DOORS
    ]
    assert not wrong


def test_only_the_host_adapter_reaches_into_comfyui():
    files = {module for module in FILES if module.startswith("nodes") and not module.startswith("nodes.host")}
    allowed = NODE_FILES_MAY_IMPORT.union(sys.stdlib_module_names)
    assert not broken(lambda each: each.module in files and not each.relative and each.target_package not in allowed)


def test_node_files_do_not_import_each_other():
    families = {module for module in FILES if module.startswith("nodes.") and not module.startswith("nodes.host")}
    assert not [each for each, target in INNER if each.module.startswith("nodes.") and target in families]


def test_importing_the_pack_imports_nothing():
    body = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body
    assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any(isinstance(node, ast.AsyncFunctionDef) and node.name == "comfy_entrypoint" for node in body)
    assert not [node for node in ast.walk(ast.Module(body, [])) if getattr(node, "id", "") == "NODE_CLASS_MAPPINGS"]

"""Imports go down only: the rules of the house, read off the source."""

import ast
import graphlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pixart_pack.tests.architecture import DOORS, LADDER, OPTIONAL, ROOMS, allowed, room_of

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("samplers", "pixart", "nodes", "demo", "benchmarks", "devtools", "editor")
OWN_NAMES = {*PACKAGES, "tests", "pixart_pack"}
MOST_MODULES = 14  # of a package's folder
# The solvers lie beside the model, which is a package of its own on the command line.
ABSOLUTE = {"pixart.solvers": "samplers"}
# Only these lead to training: the nodes that train or make what is trained with, the commands, and the demo.
TRAINING_DOORS = (
    *("nodes.training", "nodes.dataset", "nodes.features", "nodes.host.training"),
    *("demo", "benchmarks.train", "benchmarks.count_training", "benchmarks.count_memory"),
    *("benchmarks.gpu", "pixart.commands"),
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
    assert not broken(
        lambda each: (
            not each.relative and each.target_package in OWN_NAMES and ABSOLUTE.get(each.module) != each.target_package
        )
    )


@pytest.mark.parametrize("room", [room for room, (_, _, libraries) in ROOMS.items() if libraries is not None])
def test_libraries(room):
    def foreign(each: Import) -> bool:
        usual = {*ROOMS[room][2], *sys.stdlib_module_names, *OPTIONAL.get(each.module, ()), *OWN_NAMES}
        return room_of(each.module) == room and not each.relative and each.target_package not in usual

    assert not broken(foreign)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_reach_down_only(room):
    wrong = [
        f"{each.module} imports {target}"
        for each, target in INNER
        if target and room_of(each.module) == room
        if room_of(target) not in {*allowed(room), *DOORS.get(each.module, ())}
    ]
    assert not wrong


def test_the_table_holds_nothing_that_no_import_needs():
    used = {(room_of(each.module), room_of(target)) for each, target in INNER if target}
    used |= {("pixart", "samplers")}
    idle = [(room, each) for room, (_, targets, _) in ROOMS.items() for each in targets if each != "pixart.*"]
    assert not [pair for pair in idle if pair not in used]
    assert all(module in FILES for module in (*DOORS, *OPTIONAL, *ABSOLUTE, *LADDER))


def test_folders_hold_about_a_dozen_modules():
    counts = Counter(path.parent for path in FILES.values() if path.is_relative_to(ROOT / "pixart"))
    counts += Counter(path.parent for path in FILES.values() if path.is_relative_to(ROOT / "nodes"))
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}


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


def test_files_of_weights_know_the_configuration_and_how_to_quote_alone():
    targets = {target for each, target in INNER if room_of(each.module) == "pixart.weights"}
    assert {target for target in targets if room_of(target) == "pixart"} == {"pixart.config", "pixart.quoting"}


def test_only_some_doors_lead_to_training():
    def lies_in(module: str, names) -> bool:
        return any(f"{module}.".startswith(f"{name}.") for name in names)

    wrong = [
        f"{each.module} imports {target}"
        for each, target in INNER
        if lies_in(target, ["pixart.training"]) and not lies_in(each.module, ["pixart.training", *TRAINING_DOORS])
    ]
    assert not wrong


def test_only_the_host_adapter_reaches_into_comfyui():
    files = {module for module in FILES if module.startswith("nodes") and not module.startswith("nodes.host")}
    usual = {*ROOMS["nodes"][2], *sys.stdlib_module_names}
    assert not broken(lambda each: each.module in files and not each.relative and each.target_package not in usual)


def test_node_files_do_not_import_each_other():
    families = {module for module in FILES if module.startswith("nodes.") and not module.startswith("nodes.host")}
    assert not [each for each, target in INNER if each.module.startswith("nodes.") and target in families]


def test_importing_the_pack_imports_nothing():
    body = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body
    assert not [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any(isinstance(node, ast.AsyncFunctionDef) and node.name == "comfy_entrypoint" for node in body)
    assert not [node for node in ast.walk(ast.Module(body, [])) if getattr(node, "id", "") == "NODE_CLASS_MAPPINGS"]

"""The house rules that can be checked: imports run downwards, the import is instant, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mechmisalign"

FLOORS = {
    1: {"_adapter_config", "_adapter_files", "_adapter_places", "_pretrained", "_artifacts", "_checkpoint_files", "_checksums", "_context", "_frames", "_jsonl", "_layers", "_reading", "_saved_adapters", "_writing", "_wrapped_names", "_hub", "_renamed", "adapters", "combining", "decomposition", "deltas", "directions", "dynamics", "estimators", "geometry", "moments", "probes", "registry", "_specs", "_yaml", "statistics"},
    2: {
        "_attention", "_batching", "_before_response", "_blocks", "_cache", "_clock", "_encoding", "_hooked", "_joint", "_matrices", "_parts", "_placement", "_rendering", "_sharing", "_tables", "_threads", "activations", "capability", "conversations", "correction", "decoding", "effects", "expectations", "generation", "hub", "interop", "interventions", "judging", "loading", "massive",
        "models", "monitoring", "organisms", "personas", "pocket", "prediction", "progress", "prompts", "propagation", "scalars", "significance", "smol", "solutions", "store", "sweeps", "training", "unembedding", "verification",
    },
    3: {"cli", "plots", "report", "studies"},
}  # fmt: skip
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
MODEL_LIBRARIES = {"transformers", "transformer_lens", "peft"}

MODULES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute dotted names of everything a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["mechmisalign", *path.relative_to(PACKAGE).parent.parts]
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    floor = FLOOR_OF[room(path)]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "mechmisalign" and len(parts) > 1 and parts[1] in FLOOR_OF:
            assert FLOOR_OF[parts[1]] <= floor, f"{path.name} (floor {floor}) imports {name}"
        if floor == 1:
            assert parts[0] not in MODEL_LIBRARIES, f"{path.name} is maths on tensors and imports {name}"


def test_only_the_seam_imports_transformer_lens():
    users = {room(path) for path in MODULES if any(name.split(".")[0] == "transformer_lens" for name in imported(path))}
    assert users <= {"models", "_attention", "_hooked", "_joint"}


def test_every_room_is_on_a_floor():
    assert {room(path) for path in MODULES} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 320


def test_importing_the_package_loads_no_heavy_library():
    program = "import sys, mechmisalign; print([m for m in ('torch', 'pandas', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_every_public_name_can_be_had():
    import mechmisalign as mm

    for name in mm.__all__:
        assert getattr(mm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        mm.no_such_name  # noqa: B018

"""The shape of the package: who imports whom, what is public, what the docs and the README show."""

import ast
import configparser
import doctest
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import operation_cases
import pytest
import scorecard
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import perexample
import perexample.extensions
import perexample.privacy
from perexample import extend, perex
from perexample.rule import registered_functions, registry

ROOT = pathlib.Path(__file__).parent.parent
MODULES = sorted(p for folder in ("perexample", "extensions") for p in (ROOT / folder).rglob("*.py"))


def _imports(path: pathlib.Path) -> set[str]:
    package = [
        "perexample",
        *(["extensions"] if path.parts[-2] == "extensions" else path.parent.relative_to(ROOT / "perexample").parts),
    ]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return {name for name in found if name.startswith("perexample")}


def test_every_package_is_installed():
    """By setup.cfg, which knows the folder of the extensions by the name that it is imported by."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    folders = {path.parent for path in MODULES if path.name == "__init__.py"}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders} - {"extensions"}
    assert set(config["options"]["packages"].split()) == packages | {"perexample.extensions"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    imports, relative = _imports(path), path.relative_to(ROOT)
    if relative.parts[0] == "extensions":
        assert not any("_engine" in name or ".rules" in name or "optim" in name for name in imports)
    elif relative.parts[1] == "rules":
        assert not any("_engine" in name or "extension" in name for name in imports)
    elif relative.parts[1] in ("terms", "rule"):
        above = ("_engine", ".rules", "extension") + (("perexample.rule",) if relative.parts[1] == "terms" else ())
        assert not any(part in name for part in above for name in imports)
    elif relative.parts[1] == "privacy":
        engine = {name for name in imports if "_engine" in name}
        assert engine <= {"perexample._engine.context"}  # where perex is
        assert not any(".rules" in name or name == "perexample.optim" for name in imports)
    else:
        assert not any(name.startswith("perexample.extensions") for name in imports)


def test_the_engine_knows_no_particular_rule_but_the_generic_ones():
    """Of modules, and of functions."""
    generic = {"perexample.rules.generic", "perexample.rules.function"}
    for path in (ROOT / "perexample" / "_engine").glob("*.py"):
        assert {name for name in _imports(path) if ".rules" in name} <= generic, path


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # of nn.Transformer, time-major
def test_every_function_that_has_a_rule_occurs_in_a_row_of_operation_cases(monkeypatch):
    """The forward of every row, with notes of what the engine handed to a rule by way of which function."""
    rules = registered_functions()
    used: dict = {}

    def noted(bind):
        def wrapped(self, function, args, kwargs):
            bound = bind(self, function, args, kwargs)
            if bound is not None:
                used.setdefault(function, set()).add(type(self))
            return bound

        return wrapped

    for rule in {type(rule) for rule in rules.values()}:
        monkeypatch.setattr(rule, "bind", noted(rule.bind))
    for row in operation_cases.ROWS:
        model, inputs = row.build(2)
        extend(model, batch_dim=row.batch_dim)
        _ = model(*inputs) if row.forward is None else row.forward(model, *inputs)
    missing = [function for function in rules if function not in used and function not in HIDDEN]
    assert not missing
    assert all(used[function] == {type(rules[function])} for function in used)


HIDDEN = {torch.Tensor.__matmul__: torch.Tensor.matmul}  # methods that torch reports to modes as another


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_functions_are_reported_as_another_that_has_the_same_rule(hidden):
    seen = []

    class Noting(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2, 2)
    with Noting():
        hidden(x, x)
    assert seen == [HIDDEN[hidden]]
    assert type(registered_functions()[hidden]) is type(registered_functions()[HIDDEN[hidden]])


def test_core_needs_torch_and_einops_only():
    """What an extra brings is imported by its name when it is needed."""
    core = {"torch", "einops", "perexample"} | set(sys.stdlib_module_names)
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= core, (path, names)


MAKERS = {
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros",
}  # fmt: skip
OF_USERS = {("steps.py", "zeros")}  # what a loop is given


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_tensor_is_made_on_the_default_device(path):
    """It may be a GPU, and what is noted of examples lies on the CPU."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    made = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in MAKERS]
    for call in made:
        if ast.unparse(call.func.value) == "torch" and (path.name, call.func.attr) not in OF_USERS:
            assert any(word.arg == "device" for word in call.keywords), ast.unparse(call)


@pytest.mark.parametrize("package", [perexample, perexample.extensions, perexample.privacy])
def test_every_public_name_exists_has_a_docstring_and_is_in_the_docs(package):
    api = (ROOT / "docs" / "api.rst").read_text()
    for name in package.__all__:
        assert getattr(package, name).__doc__, name
        assert re.search(rf"\b{name}\b", api), f"{name} is missing in docs/api.rst"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_in_docstrings(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("perexample", *parts) if parts[0] == "extensions" else parts
    module = importlib.import_module(".".join(part for part in parts if part != "__init__"))
    torch.manual_seed(0)
    known = dict(registry._REGISTRY)
    try:
        result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    finally:
        for cls in set(registry._REGISTRY) - set(known):
            del registry._REGISTRY[cls]
    assert not result.failed


def test_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(("page", "number"), [("start", 3), ("privacy", 6), ("extending", 8)])
def test_the_code_of_the_docs_runs(page, number):
    text = (ROOT / "docs" / f"{page}.rst").read_text()
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)
    assert len(blocks) == number
    script = "\n".join(textwrap.dedent(block) for block in blocks)
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=300, capture_output=True)


@pytest.mark.parametrize("max_memory", [None, 0])
def test_the_joint_extension_of_the_docs_is_right(max_memory):
    text = (ROOT / "docs" / "extending.rst").read_text()
    blocks = map(textwrap.dedent, re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text))
    space = {"torch": torch}
    for block in blocks:
        if "(Extension):" in block:
            exec(block, space)
    model, x = extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()), torch.randn(5, 4).double()
    with perex(space["DirectionSum"](), grad=False, max_memory=max_memory):
        model(x).square().sum(1).mean().backward()
    params, wanted = list(model.parameters()), 0
    for row in x:
        g = torch.cat([g.flatten() for g in torch.autograd.grad(model(row[None]).square().sum(), params)])
        wanted = wanted + g / g.norm()
    torch.testing.assert_close(torch.cat([p.direction_sum.flatten() for p in params]), wanted)


def test_what_the_readme_links_to_is_there():
    for page in ("README.md", "CHANGELOG.md", "gallery/benchmarks/README.md"):
        links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text(encoding="utf-8"))
        for link in links:
            assert link.startswith("https://") or (ROOT / page).parent.joinpath(link.partition("#")[0]).exists(), link


def test_the_page_of_the_architecture_names_the_files_of_the_engine_and_none_that_is_gone():
    named = set(re.findall(r"``(?:\w+/)*(\w+\.py)``", (ROOT / "docs" / "architecture.rst").read_text()))
    engine = {path.name for path in MODULES if path.parent.name == "_engine"}
    assert engine - {"__init__.py"} <= named <= {path.name for path in MODULES}


def test_our_side_of_the_migration_page_runs():
    text = (ROOT / "docs" / "migration.rst").read_text()
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)
    ours = [block for block in map(textwrap.dedent, blocks) if block.startswith("# perexample")]
    assert (len(blocks), len(ours)) == (8, 4)
    theirs = next(block for block in map(textwrap.dedent, blocks) if block.startswith("# torch.func"))
    setup = """
import torch
from torch import nn
from perexample import DP_SGD, extend
from perexample.extensions import ClippedGrad
x, y = torch.randn(600, 4), torch.randint(0, 3, (600,))
dataset = torch.utils.data.TensorDataset(x, y)
model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
    script = "\n".join(
        [setup, *ours[:2], "model = nn.Linear(4, 3); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)", ours[2]]
    )
    script += f"\n{theirs}\n{ours[3]}\nfor name in params: torch.testing.assert_close(rows[name], theirs[name])"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=300, capture_output=True)


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_opacus_are_loaded_as_the_migration_page_says():
    layers = pytest.importorskip("opacus.layers")
    from opacus.grad_sample import GradSampleModule

    text = (ROOT / "docs" / "migration.rst").read_text()
    ((strip, load),) = re.findall(r"``(state = \{[^`]+)`` for the same.*?``(model\.load[^`]+)``", text, re.S)
    theirs = layers.DPLSTM(4, 5, num_layers=2, bidirectional=True)
    space = {"state": GradSampleModule(theirs).state_dict(), "model": torch.nn.LSTM(4, 5, 2, bidirectional=True)}
    exec(strip, space)
    theirs.load_state_dict(space["state"])
    exec(load, space)
    x = torch.randn(6, 3, 4)
    torch.testing.assert_close(space["model"](x)[0], theirs(x)[0])


def test_the_errors_page_has_every_exception_and_its_code_says_what_it_should():
    pytest.importorskip("dp_accounting")
    raised = {
        name for name, value in vars(perexample).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    code = "import sys; sys.path.insert(0, 'docs'); import error_examples as e; print(*e.NAMES, *e.page(), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    count = len(raised) - 1
    names, page = run.stdout.splitlines()[:count], run.stdout.splitlines()[count:]
    assert set(names) == raised - {"PerExampleError"}
    assert not [line for line in page if line.strip().startswith(("+", "|"))]  # no row of a table is broken


def test_the_folder_extensions_cannot_be_imported_by_itself():
    run = subprocess.run([sys.executable, "-c", "import extensions"], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode
    assert run.stderr.strip().splitlines()[-1].startswith("ImportError: Import perexample.extensions instead")


def test_the_scorecard_is_that_of_the_numbers():
    readme = (ROOT / "README.md").read_text()
    shown = readme.partition(scorecard.START)[2].partition(scorecard.END)[0].strip()
    assert shown == scorecard.table(json.loads(scorecard.NUMBERS.read_text()))


def test_every_fault_is_on_the_page_of_pitfalls():
    text = (ROOT / "docs" / "pitfalls.rst").read_text()
    assert set(map(int, re.findall(r"\bF(\d+)\b", text))) == set(range(1, 51))


TYPED = """
from typing import Any
import torch
from torch import Tensor, nn
from perexample import DP_SGD, RecordedModel, RecordedStep, extend, perex, privatize
from perexample.privacy import Ledger, make_optimizer, make_private

def train(model: nn.Sequential, clipping: Any, x: Tensor, y: Tensor, data: Any) -> float:
    extended: nn.Sequential = extend(model)
    options: dict[str, Any] = {"noise_multiplier": 1.1, "expected_batch_size": 8}
    made: torch.optim.Adam = make_optimizer(torch.optim.Adam)(model.parameters(), lr=0.1, clipping=clipping, **options)
    private: torch.optim.AdamW = privatize(torch.optim.AdamW(model.parameters()), clipping=clipping, **options)
    sgd = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, ledger=Ledger(), **options)
    step = RecordedStep(extended, lambda x, y: nn.functional.mse_loss(extended(x), y), x, y, extensions=clipping)
    losses: Tensor = step(x, y)
    outputs: Tensor = RecordedModel(extended, x, extensions=[clipping])(x)
    with perex(clipping, grad=False):
        torch.autograd.backward(outputs.mean() + losses.mean())
    for optimizer in (made, private, sgd):
        optimizer.step()
    whole = make_private(model, torch.optim.SGD(model.parameters()), data, batch_size=8, epochs=1, target_delta=1e-5)
    for batch, target in whole:
        with whole:
            torch.autograd.backward(nn.functional.mse_loss(whole.model(batch), target))
        whole.step()
    return whole.epsilon() + sgd.ledger.epsilon(1e-5)
"""


@pytest.mark.slow
def test_a_typed_program_passes_mypy_strict(tmp_path):
    (tmp_path / "program.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "program.py"]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}
    )
    assert run.returncode == 0, run.stdout

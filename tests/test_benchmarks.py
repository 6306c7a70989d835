"""The scripts of gallery/benchmarks, as small as they can be made, and the tables that they have written."""

import argparse
import importlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "gallery" / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def script(name, *arguments):
    """Run it, with one thread, as other tests run beside it."""
    command = [sys.executable, FOLDER / f"{name}.py", "--threads", "1", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def measured(entries, names):
    """These have numbers: they are right, and ran."""
    for name in names:
        assert "failed" not in entries[name], (name, entries[name])
        assert len(entries[name]["seconds"]) == 3


MODELS = ["mlp", "seed_cnn", "resnet18", "vgg11", "depthwise", "transformer", "gpt", "lstm", "vit"]
COMPILED = ["mlp", "seed_cnn"]  # to compile the others takes minutes


def test_all_models_of_the_suite_are_run_below():
    assert list(importlib.import_module("models").SUITE) == MODELS


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_suite(model, tmp_path):
    names = importlib.import_module("systems").SYSTEMS
    systems = [name for name in names if "compiled" not in name or model in COMPILED]
    small = ["--smoke", "--n", 4, "--no-memory", "--out", tmp_path]
    script("suite", *small, "--models", model, "--systems", *systems)
    entries = json.loads((tmp_path / "suite.json").read_text())["models"][model]
    measured(entries, ["plain", "ClippedGrad", "ClippedGrad, roomy", "BatchL2Grad", "BatchGrad", "vmap", "loop"])
    measured(entries, ["ClippedGrad, recorded model", "ClippedGrad, recorded"])
    measured(entries, [name for name in systems if "compiled" in name])
    if any(entry.get("failed", "").endswith("is not installed") for entry in entries.values()):
        pytest.skip("ran, but without Opacus or BackPACK, which are not installed")
    measured(entries, ["Opacus hooks"])
    if model == "vgg11":
        measured(entries, ["Opacus functorch", "Opacus ghost", "BackPACK"])


@pytest.mark.slow
def test_suite_keeps_what_it_does_not_measure(tmp_path):
    script("suite", "--smoke", "--models", "mlp", "--systems", "plain", "BatchGrad", "--no-memory", "--out", tmp_path)
    before = json.loads((tmp_path / "suite.json").read_text())["models"]["mlp"]
    systems = ("--systems", "plain", "ClippedGrad")
    script("suite", "--smoke", "--models", "mlp", *systems, "--no-time", "--out", tmp_path)
    after = json.loads((tmp_path / "suite.json").read_text())["models"]["mlp"]
    assert after["BatchGrad"] == before["BatchGrad"]
    assert after["plain"]["seconds"] == before["plain"]["seconds"]
    table = (tmp_path / "suite.md").read_text()
    assert "Peak memory" in table
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    script("suite", "--tables", "--out", tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == written


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of resident memory are measured on Linux")
def test_peak_of_a_known_allocation():
    """In a process as the benchmark starts it; in this one what the allocator keeps depends on the tests before."""
    measure = importlib.import_module("measure")
    script = """
        import torch, measure

        def action():
            torch.ones(64 * 2**18)  # 64 MiB, and let go
            torch.ones(16 * 2**18)

        action()
        print(measure.peak_over_base(action))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    folder = Path(measure.__file__).parent
    run = subprocess.run(
        command, env=os.environ | measure.MALLOC, cwd=folder, capture_output=True, text=True, check=True
    )
    assert float(run.stdout) == pytest.approx(64, abs=4)


def test_growth(tmp_path):
    sweeps = ("--sweeps", "mlp-width", "--systems", "plain", "ClippedGrad")
    script("growth", "--quick", *sweeps, "--no-memory", "--no-fit", "--out", tmp_path)
    for entries in json.loads((tmp_path / "growth.json").read_text())["sweeps"]["mlp-width"].values():
        measured(entries, ["plain", "ClippedGrad"])


@pytest.mark.parametrize(("base", "slope"), [(100.0, 2.0), (3.0, 50.0), (0.0, 0.03)])
def test_largest_batch(base, slope):
    growth = importlib.import_module("growth")
    asked = []

    def peak(n):
        asked.append(n)
        return base + slope * n

    found = growth.largest(peak, 1024.0)
    assert peak(found) <= 1024.0
    assert found >= 0.95 * int((1024 - base) / slope)
    assert len(asked) <= 12


def test_seeds(tmp_path):
    script("seeds", "--smoke", "--out", tmp_path)
    data = json.loads((tmp_path / "seeds.json").read_text())
    for entries in data["gradcnn"].values():
        measured(entries, ["plain", "naive", "multi", "crb", "ClippedGrad"])
    for entries in data["fastgc"].values():
        measured(entries, ["plain", "naive", "multi", "reweight", "ClippedGrad"])


def test_overhead(tmp_path):
    script("overhead", "--models", "mlp", "seed_cnn", "lstm", "--n", 3, "--repeats", 1, "--out", tmp_path)
    models = json.loads((tmp_path / "overhead.json").read_text())["models"]
    measured(models["lstm"], ["empty hooks", "machinery", "recorded model", "recorded step", "ClippedGrad"])
    for entries in models.values():
        assert entries["least"]["any memory"] > 0
    for name in ("mlp", "seed_cnn"):  # the check before the timing compares both with one backward per example
        measured(
            models[name],
            ["no parameters", "by hand", "BatchGrad", "BatchGrad / by hand", "BatchGrad, recorded / by hand"],
        )


def test_training(tmp_path):
    script("training", "--models", "mlp", "--n", 3, "--repeats", 1, "--out", tmp_path)
    models = json.loads((tmp_path / "training.json").read_text())["models"]
    measured(models["mlp"], ["ClippedGrad", "recorded model", "compiled model", "recorded step"])


def test_beside(tmp_path):
    script("beside", "--models", "mlp", "--n", 3, "--repeats", 1, "--out", tmp_path)
    models = json.loads((tmp_path / "beside.json").read_text())["models"]
    measured(models["mlp"], ["as it is", "recorded model", "recorded step"])


def test_bounded(tmp_path):
    options = ("--n", 2, "--repeats", 1, "--no-memory", "--out", tmp_path)
    script("bounded", "--models", "mlp", "gpt", *options)  # which checks the sums before it times
    models = json.loads((tmp_path / "bounded.json").read_text())["models"]
    for entries in models.values():
        assert entries["bounds"] == [None, 0]
        assert len(entries["times"]) == 2


def test_tried(tmp_path):
    script("tried", "--repeats", 1, "--out", tmp_path)
    data = json.loads((tmp_path / "tried.json").read_text())
    for found in data["layers"].values():
        assert found["float32"]["error"] < 1e-6
        assert found["bfloat16, two parts"]["error"] < 2**-18  # the product of the lesser parts, which is left out


def test_half_of_a_symmetric_matrix_is_all_of_it():
    tried = importlib.import_module("tried")
    x, g = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    parts = (tried.halves(x) * tried.halves(g)).unflatten(1, (3, -1)).sum(2)
    assert torch.allclose(parts @ torch.tensor([1.0, 1, 2]).double(), tried.norms(x @ x.mT, g @ g.mT).square())


SUITES = {"suite": {}, "suite-cuda": {"device": "cuda"}}


@pytest.mark.parametrize(
    "name", [*SUITES, "growth", "seeds", "overhead", "training", "beside", "bounded", "methods", "tried"]
)
def test_tables_are_those_of_the_numbers(name, tmp_path):
    module = importlib.import_module("suite" if name in SUITES else name)
    report = importlib.import_module("report")
    data = report.load(FOLDER / f"{name}.json")
    module.tables(data, argparse.Namespace(**{"out": tmp_path, "device": "cpu", "times": 1} | SUITES.get(name, {})))
    pages = [report.PAGE, report.README] if name in (*SUITES, "training") else [report.PAGE]
    for page in pages:
        assert (
            report.between(page.read_text(), name, page.suffix)
            == (tmp_path / f"{name}{page.suffix}").read_text().strip()
        )
    if not data:
        pytest.skip(f"{name}.json: not measured yet")

"""Private training on digits in as many processes as start it; ``plot_two_processes.py`` runs it with ``torchrun``.

``torchrun --standalone --nproc-per-node 2 gallery/training/two_processes.py FOLDER`` writes ``FOLDER/rank0.json`` and
``FOLDER/rank1.json``. Without ``torchrun`` it is one process, and the same code.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import TRAIN_SIZE, accuracy, load_data, make_model
from torch import nn
from torch.utils.data import TensorDataset

from perexample.privacy import Processes, make_private


def train() -> tuple[nn.Module, dict[str, Any]]:
    """The same lines for one process and for several; the seed of the batches is there for the comparison only."""
    data, model = load_data(), make_model("cnn", seed=0)  # equal parameters everywhere, as the first step checks
    private = make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=2.0),
        TensorDataset(data.x, data.y),
        target_epsilon=3.0,
        target_delta=1e-4,
        epochs=8,
        batch_size=300,  # of all processes together
        physical_batch_size=100,  # of each
        public_size=TRAIN_SIZE,
        max_norm=1.0,
        strategy="model",
        sampling_generator=torch.Generator().manual_seed(0),
    )
    pieces: list[list[int]] = [[]]  # sizes, for each step
    curve = [accuracy(model, data.x_test, data.y_test)]
    for x, y in private:
        with private:
            F.cross_entropy(model(x), y).backward()
        pieces[-1].append(len(x))
        if not private.steps:
            sums = torch.cat([p.clipped_sum.flatten().double() for p in model.parameters()])  # of this process
        if private.step():
            if len(pieces) == 1:
                released = 300 * torch.cat([p.grad.flatten().double() for p in model.parameters()])
            pieces.append([])
            curve.append(accuracy(model, data.x_test, data.y_test))
    return model, {
        "pieces": pieces[:-1],
        "accuracy": curve,
        "epsilon": private.epsilon(),
        "noise_multiplier": private.noise_multiplier,
        "sums": sums.tolist(),  # of the first step, and what was released of it
        "released": released.tolist(),
    }


def checksum(model: nn.Module) -> str:
    """Of all bits of all parameters."""
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def main(folder: Path) -> None:
    """Train, and write down what this process saw."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    processes, started = Processes(), time.perf_counter()
    model, report = train()
    report |= {"rank": processes.rank, "processes": processes.size, "seconds": time.perf_counter() - started}
    report["checksum"] = checksum(model)
    (folder / f"rank{processes.rank}.json").write_text(json.dumps(report))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

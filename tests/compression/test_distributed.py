"""Two processes under the standard launcher end with one and the same model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

PROGRAM = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from safetensors.torch import save_file
from espalier.compression.config import Config, Recovery, Schedule, Training
from espalier.data import Tokens
from espalier.compression.distributed import world
from espalier.compression.pruner import Pruner
from espalier.compression.tasks import Embeddings
from espalier.compression.trainer import Trainer

folder, texts, output = map(Path, sys.argv[1:])
config = Config(
    sparsity=0.5, pattern="unstructured", score="magnitude", schedule=Schedule(kind="gradual", steps=2),
    recovery=Recovery(task=0), training=Training(steps=4, batch_tokens=128),
)
with world(torch.device("cpu")) as job:
    task = Embeddings(Tokens.read(folder, 24))
    task.read([texts])
    model, teacher = task.load(folder), task.load(folder)
    trainer = Trainer(model, teacher, task, Pruner(model, config), config, output, world=job)
    history = trainer.run()
    assert job.size == 2 and history.step == 4
    save_file(model.state_dict(), output / f"rank{job.rank}.safetensors")
"""


@pytest.mark.slow
def test_two_processes(encoder_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone",
         str(tmp_path / "program.py"), str(encoder_folder), str(texts_file), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (load_file(tmp_path / "out" / f"rank{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) == 1

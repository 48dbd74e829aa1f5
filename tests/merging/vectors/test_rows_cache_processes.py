"""Rows in a cache across processes: killed ones, several at once, and how much memory they take."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.rng import make_generator

pytestmark = pytest.mark.slow

EXPERTS = 4
SIZE, LARGE = 4_000_000, 20_000_000  # numbers: rows of 80 and of 400 MB

LOAD = """
import resource, sys
from pathlib import Path
import torch
from map_bo.errors import MapBoError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.task_vectors import cosines
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp
from map_bo.operators.sparse import Della, Ties

torch.set_num_threads(1)
folder, cache = Path(sys.argv[1]), sys.argv[2]
base = open_checkpoint(folder / "base.safetensors")
experts = {p.stem: open_checkpoint(p) for p in sorted(folder.glob("e*.safetensors"))}

def load(cache=cache):
    return TaskVectors.load(base, experts, cache=cache)
"""

HALFWAY = """
from map_bo.merging.vectors import row_filling
from map_bo.merging.vectors import task_vectors
count = 0
class Stopping:
    def __init__(self, put): self.put = put
    def __call__(self, row, start, piece):
        global count
        self.put(row, start, piece)
        count += 1
        if count == 30:
            print("halfway", flush=True)
            sys.stdin.read()
fill = row_filling.fill
task_vectors.fill = lambda b, e, l, put, **k: fill(b, e, l, Stopping(put), **k)
load()
"""

COUNTED = """
from map_bo.merging.vectors import task_vectors
fill = task_vectors.fill
def counted(*a, **k):
    print("filled", flush=True)
    return fill(*a, **k)
task_vectors.fill = counted
print("ready", flush=True)
sys.stdin.readline()
print("sum", float(load().rows.double().sum()), flush=True)
"""

SCRIBBLE = """
vectors = load()
print("loaded", flush=True)
vectors.rows[0, 0] = 1.0
print("written", flush=True)
"""

# Private memory of the process is bounded by the system itself; mapped pages are no part of it.
BOUNDED = """
def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith("VmData")).split()[1])

out = torch.zeros(int(sys.argv[4]))  # the merged model is the caller's
resource.setrlimit(resource.RLIMIT_DATA, (private() + int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    load(None)
    print("resident: loaded")
except (RuntimeError, MemoryError) as error:
    print("resident:", type(error).__name__)
vectors = load()
c = torch.full((len(experts),), 0.3, dtype=torch.float64)
for operator in (TaskArithmetic(), Ties(), Della(), Slerp()):
    operator.prepare(vectors).write(c, out)
cosines(vectors)
print("done", bool(out.any()))
"""


def write_models(path: Path, size: int) -> None:
    generator = make_generator(0)
    base = {
        "w": torch.randn(size // 1000, 1000, generator=generator),
        "b": torch.randn(1000, generator=generator),
    }
    save_file(base, path / "base.safetensors")
    for i in range(EXPERTS):
        noise = torch.randn(1000, generator=generator)
        save_file({k: v + 0.1 * noise for k, v in base.items()}, path / f"e{i}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_models(path, SIZE)
    return path


def process(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOAD + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def load(folder: Path, cache: Path | None) -> TaskVectors:
    return TaskVectors.load(
        open_checkpoint(folder / "base.safetensors"),
        {f"e{i}": open_checkpoint(folder / f"e{i}.safetensors") for i in range(EXPERTS)},
        cache=cache,
    )


def test_a_killed_writer_leaves_nothing_that_is_taken_for_an_entry(
    folder: Path, tmp_path: Path
) -> None:
    with process(HALFWAY, folder, tmp_path) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "halfway\n"
        names = [path.name for path in tmp_path.iterdir()]
        writer.kill()
    assert any(name.endswith(".tmp") for name in names)
    assert all(name.startswith(".") for name in names)
    found = load(folder, tmp_path)
    assert torch.equal(found.rows, load(folder, None).rows)
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock"))
    assert len(left) == 1  # the draft of the killed process is gone
    assert not left[0].startswith(".")


def test_processes_that_ask_at_once_write_one_entry(folder: Path, tmp_path: Path) -> None:
    processes = [process(COUNTED, folder, tmp_path) for _ in range(3)]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in processes:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    texts = [each.communicate()[0] for each in processes]
    assert [each.returncode for each in processes] == [0, 0, 0]
    assert sum("filled" in text for text in texts) == 1
    assert len({text.splitlines()[-1] for text in texts}) == 1


def test_nothing_can_write_to_mapped_rows(folder: Path, tmp_path: Path) -> None:
    load(folder, tmp_path)
    (file,) = tmp_path.glob("*/rows")
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    with process(SCRIBBLE, folder, tmp_path) as writer:
        text, _ = writer.communicate()
    assert text == "loaded\n"
    assert writer.returncode == -signal.SIGSEGV
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_private_memory_is_bounded_where_rows_in_memory_do_not_fit(tmp_path: Path) -> None:
    """Writing the cache, preparing operators and merging take no copy of the rows, nor of two."""
    write_models(tmp_path, LARGE)
    most = 120_000_000  # a row is 80 MB, and what prepared operators keep of it would be more
    for _ in range(2):  # without a cache, and with one
        with process(BOUNDED, tmp_path, tmp_path / "rows", most, LARGE + 1024) as bounded:
            text, errors = bounded.communicate()
        assert bounded.returncode == 0, errors
        assert text.splitlines() == ["resident: RuntimeError", "done True"], (text, errors)

"""Images per second of a training step on one and on several GPUs: forward, backward, gradients' reduction, optimizer.

    python benchmarks/scaling.py                      # vim_tiny at 224², batch 128 on each of 1 and of all GPUs
    python benchmarks/scaling.py --gpus 1 2 4 --model vim_small --batch-size 64

Images are generated on the GPU, so that no loader is measured; bfloat16 autocast, AdamW, DistributedDataParallel as
vim/main.py has it. Each number of processes is started with torchrun, in turns; the figure is the median over the
turns. Prints a table and writes scaling.json and scaling.md to the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from measure import Section, Table, significant
from rich.console import Console
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from workloads import ROOT, write

import vim.models_mamba  # noqa: F401  registers the models with timm
from vim.provenance import revision

WARM_UP = 10  # steps


def worker(args: argparse.Namespace) -> None:
    """One process of `args.steps` steps; the first writes the seconds of a step to `args.result`."""
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed.init_process_group("nccl", device_id=device)
    torch.manual_seed(rank)
    model = timm.create_model(args.model, img_size=args.input_size).to(device)
    model = DistributedDataParallel(model, device_ids=[rank], gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    targets = torch.randint(1000, (args.batch_size,), device=device)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    distributed.barrier()
    start = time.perf_counter()
    for _ in range(args.steps):
        step()
    torch.cuda.synchronize()
    distributed.barrier()
    if rank == 0:
        args.result.write_text(json.dumps((time.perf_counter() - start) / args.steps))
    distributed.destroy_process_group()


def step_seconds(args: argparse.Namespace, gpus: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        flags = ["--model", args.model, "--batch-size", args.batch_size, "--input-size", args.input_size]
        command = [*launch, __file__, *map(str, flags), "--steps", str(args.steps), "--result", str(result)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{gpus} processes failed:\n{done.stderr[-3000:]}")
        return json.loads(result.read_text())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vim_tiny")
    parser.add_argument("--batch-size", type=int, default=128, help="of each GPU; default: 128")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--gpus", type=int, nargs="+", help="default: 1 and all there are")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "benchmarks")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of a worker
    args = parser.parse_args(argv)
    if args.result is not None:
        worker(args)
        return
    there = torch.cuda.device_count()
    numbers = sorted(set(args.gpus or (1, there)))
    if there == 0 or numbers[-1] > there or numbers[0] < 1:
        raise SystemExit(f"--gpus: got {numbers}; expected numbers from 1 to the GPUs here, of which there are {there}")

    seconds: dict[int, list[float]] = {gpus: [] for gpus in numbers}
    for _ in range(args.rounds):
        for gpus in numbers:
            seconds[gpus].append(step_seconds(args, gpus))
    rates = {gpus: gpus * args.batch_size / statistics.median(times) for gpus, times in seconds.items()}
    base = rates[numbers[0]]
    title = f"training step, {args.model}, {args.input_size}², batch {args.batch_size} a GPU"
    table = Table(title, ["GPUs", "ms", "images/s", f"× {numbers[0]} GPU", "fastest … slowest round, ms"])
    for gpus in numbers:
        times = [1e3 * t for t in seconds[gpus]]
        median, rate = significant(statistics.median(times)), significant(rates[gpus])
        table.rows.append(
            [str(gpus), median, rate, f"{rates[gpus] / base:.3f}", f"{min(times):.1f} … {max(times):.1f}"]
        )
    section = Section("scaling", {"seconds": seconds, "images_per_s": rates}, [table])
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "revision": revision(),
        "command": [sys.executable, *sys.argv],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write(section, record, args.output)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table.rich())
    console.print(f"Written to {args.output}", highlight=False)


if __name__ == "__main__":
    main()

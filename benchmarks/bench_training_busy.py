"""A training step on a CPU by one process with all threads and by one process a core, on idle cores and beside a load.

    python benchmarks/bench_training_busy.py [--size base] [--utterances 8] [--rounds 3] [--json FILE]

The step is `bench_lora.py`'s with LoRA. Processes share the batch and average gradients over gloo, as
`configuration/accelerate/cpu_two_processes.yaml` has it. The load is `bench_busy.py`'s: it multiplies matrices with one
thread. Both ways take their steps in turn; a step is over when every process has taken it.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_busy import busy_core
from bench_lora import LORA, build
from measuring import argument_parser, interleaved, lengths_in_seconds, machine, padded_batch, report
from torch.nn.parallel import DistributedDataParallel

from modeling_mamba_ema.data.markdown_table import markdown_table


def work(connection: Connection, rank: int, processes: int, options: SimpleNamespace, meeting_point: str) -> None:
    """Take a step of its share of the batch each time the connection asks for one."""
    torch.set_num_threads(options.cores // processes)
    model: Any = build(LORA, options)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=processes)
        model = DistributedDataParallel(model)
    waveforms, lengths = padded_batch(lengths_in_seconds(options.utterances)[rank::processes])
    mask = (torch.arange(waveforms.shape[1]) < lengths.unsqueeze(1)).long()
    labels = torch.rand(len(lengths), 2)
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-5)
    with contextlib.suppress(EOFError):  # the parent has closed the connection
        while connection.recv():
            model(waveforms, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            connection.send(True)
    if processes > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def training(processes: int, options: SimpleNamespace) -> Iterator[Callable[[], None]]:
    """A function that takes one step in so many processes."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        connections = []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=work, args=(theirs, rank, processes, options, f"{folder}/meeting_point"), daemon=True
            )
            worker.start()
            theirs.close()
            stack.callback(worker.join)
            connections.append(stack.enter_context(ours))

        def step() -> None:
            for connection in connections:
                connection.send(True)
            for connection in connections:
                connection.recv()

        yield step
        for connection in connections:
            connection.close()


def main() -> None:
    parser = argument_parser(__doc__, size="base", utterances=8, rounds=3)
    arguments = parser.parse_args()
    cores = arguments.threads or os.cpu_count() or 1
    if not 1 < cores <= arguments.utterances:
        parser.error(f"{arguments.utterances} utterances for {cores} processes; 2 processes or more, an utterance each")
    options = SimpleNamespace(
        size=arguments.size, layers=None, utterances=arguments.utterances, device="cpu", cores=cores
    )
    names = {f"1 process, {cores} threads": 1, f"{cores} processes, 1 thread each": cores}
    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(training(processes, options)) for name, processes in names.items()}
        idle = interleaved(steps, arguments.rounds)
        with busy_core():
            busy = interleaved(steps, arguments.rounds)
    alone, shared = names
    figures = {name: {"idle": idle[name], "busy": busy[name]} for name in names}
    rows = [[name, f"{idle[name]:.1f}", f"{busy[name]:.1f}"] for name in names]
    rows.append(["faster by", f"{idle[alone] / idle[shared]:.2f}x", f"{busy[alone] / busy[shared]:.2f}x"])
    print(f"WavLM-{arguments.size} with LoRA, {arguments.utterances} utterances, float32; {machine()}")
    print(markdown_table(["training step, seconds", "idle", "one core busy"], rows))
    report(arguments, {"seconds": figures})


if __name__ == "__main__":
    main()

"""One rank of a ZeRO test (run by test_zero.py): AnchoredAdamW under DeepSpeed beside the same steps in one process.

All stages run in one pair of processes, because importing DeepSpeed takes longer than the test.

Usage: zero_worker.py RANK WORLD PORT FOLDER
"""

from __future__ import annotations

import os
import sys

RANK, WORLD, PORT, FOLDER = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
os.environ.update(
    DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT, RANK=str(RANK), LOCAL_RANK=str(RANK),
    WORLD_SIZE=str(WORLD), OMP_NUM_THREADS="1", DS_BUILD_OPS="0",
)  # fmt: skip

import deepspeed  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from ftfast.weightspace import AnchoredAdamW, adaptive_consolidation, ewc, l2_sp  # noqa: E402
from ftfast.weightspace.sharding import global_penalty, observe_replay_gradient  # noqa: E402

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10_000,
}


class Net(nn.Module):
    """Sizes that do not divide by two, so that a shard ends inside a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 5)
        self.free = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(torch.tanh(self.last(self.norm(torch.tanh(self.first(x)))))).square().mean()


def make_model() -> Net:
    torch.manual_seed(0)
    return Net()


def anchored(model: Net) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("free")]


def make_optimizer(model: Net, kind: str, mode: str) -> AnchoredAdamW:
    generator = torch.Generator().manual_seed(3)
    named = anchored(model)
    if kind == "l2_sp":
        anchor = l2_sp(named, 5.0, reduction="mean_per_tensor")
    elif kind == "awc":
        anchor = adaptive_consolidation(named, 0.5)
    else:
        fisher = {name: torch.rand(p.shape, generator=generator) for name, p in named}
        start = {name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) for name, p in named}
        anchor = ewc(named, fisher, 3.0, start=start)
    return AnchoredAdamW(model.parameters(), lr=1e-2, weight_decay=0.01, anchor=anchor, anchor_mode=mode)


def batch(step: int) -> torch.Tensor:
    return torch.randn(4 * WORLD, 7, generator=torch.Generator().manual_seed(step))


def single_process(kind: str, mode: str, steps: int) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    model = make_model()
    optimizer = make_optimizer(model, kind, mode)
    log = []
    for step in range(steps):
        optimizer.zero_grad()
        if kind == "awc":
            model(batch(100 + step)).backward()
            optimizer.observe_replay_gradient()
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        log.append([loss.item(), optimizer.anchor_penalty.item()])
    return log, {name: p.detach().clone() for name, p in model.named_parameters()}


def make_engine(stage: int, kind: str, mode: str):
    model = make_model()
    optimizer = make_optimizer(model, kind, mode)
    config = {**CONFIG, "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def train(engine, optimizer, kind: str, steps: range) -> list[list[float]]:
    log = []
    mine = slice(4 * RANK, 4 * RANK + 4)
    for step in steps:
        if kind == "awc":
            engine.set_gradient_accumulation_boundary(True)
            engine.backward(engine(batch(100 + step)[mine]))
            observe_replay_gradient(engine.optimizer, optimizer)
        loss = engine(batch(step)[mine])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        log.append([mean.item() / WORLD, global_penalty(optimizer).item()])
    return log


def full_weights(engine) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


def compare(label: str, log, weights, expected_log, expected_weights) -> None:
    torch.testing.assert_close(
        torch.tensor(log), torch.tensor(expected_log), rtol=1e-6, atol=1e-6, msg=lambda m: f"{label}: {m}"
    )
    for name, expected in expected_weights.items():
        torch.testing.assert_close(
            weights[name], expected, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{label} {n}: {m}"
        )


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an optional extension compiled at first use
    deepspeed.init_distributed(dist_backend="gloo")
    for kind, mode in (("ewc", "coupled"), ("l2_sp", "coupled"), ("awc", "coupled"), ("ewc", "proximal")):
        expected_log, expected_weights = single_process(kind, mode, 6)
        assert expected_log[-1][1] > 0
        for stage in (1, 2, 3):
            label = f"stage {stage} {kind} {mode}"
            engine, optimizer = make_engine(stage, kind, mode)
            log = train(engine, optimizer, kind, range(3))
            folder = os.path.join(FOLDER, label.replace(" ", "-"))
            engine.save_checkpoint(folder, tag="three")
            log += train(engine, optimizer, kind, range(3, 6))
            compare(label, log, full_weights(engine), expected_log, expected_weights)

            engine, optimizer = make_engine(stage, kind, mode)
            train(engine, optimizer, kind, range(50, 51))  # so that restored state has something to replace
            engine.load_checkpoint(folder, tag="three")
            resumed = train(engine, optimizer, kind, range(3, 6))
            compare(f"{label} resumed", resumed, full_weights(engine), expected_log[3:], expected_weights)
            if RANK == 0:
                print(f"ok {label}", flush=True)
    torch.distributed.destroy_process_group()


main()

"""Trains the model for a given time; see README.md.

The last checkpoint is always in ``WORK/state.pt``; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fast_ops
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from architecture import ARCHITECTURE, build
from corpus import Chapter, fetch, parse, split
from data import IGNORED, Rows, save_tokenizer, train_tokenizer
from evaluate import perplexity
from quantization import as_exported
from tokenizers import Tokenizer
from torch import nn

LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 0.04
WARMUP = 0.02
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
# From this part of the time on, the forward pass sees the weights as exported.
QUANTIZE_FROM = 0.6
# How far a step moves the routing bias of an expert that had too many or too few tokens, while the
# learning rate is at its maximum.
BALANCE_RATE = 0.01
STATE = "state.pt"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--text", type=Path, help="verses; default: Debian's, downloaded")
    parser.add_argument("--minutes", type=float, default=60, help="training time")
    parser.add_argument("--steps", type=int, help="train this many steps instead")
    parser.add_argument(
        "--rows", type=int, default=2, help="rows of a worker's batch; half are chat"
    )
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--architecture", type=Path, help="JSON that replaces sizes")
    return parser.parse_args(arguments)


@dataclass
class Balancer:
    """Moves routing biases against the load: DeepSeek's balancing without an auxiliary loss."""

    model: Any
    loads: dict[Any, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Counts each router's choices from now on."""
        for layer in self.model.model.layers:
            if not layer.mlp.is_hash:
                layer.mlp.gate.register_forward_hook(self._count)

    def _count(self, gate: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        if not torch.is_grad_enabled():  # no step follows
            return
        load = torch.bincount(output[2].flatten(), minlength=gate.num_experts).float()
        self.loads[gate] = self.loads.get(gate, 0) + load

    def update(self, factor: float) -> float:
        """Nudges the biases by `factor` of the rate; returns the largest load over the mean."""
        worst = 1.0
        average(list(self.loads.values()))
        for gate, load in self.loads.items():
            mean = load.mean()
            gate.e_score_correction_bias += factor * BALANCE_RATE * torch.sign(mean - load)
            worst = max(worst, float(load.max() / mean))
        self.loads.clear()
        return worst


class Training:
    """A model, its optimizer and where it stands."""

    def __init__(
        self, options: argparse.Namespace, tokenizer: Tokenizer, chapters: list[Chapter]
    ) -> None:
        """Builds the model, or takes up the state of an earlier run."""
        self.options = options
        self.model = build(architecture(options.architecture), options.seed)
        fast_ops.install(self.model)
        self.balancer = Balancer(self.model)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": matrices},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
        )
        if (options.work / STATE).exists():
            self._load()
        seed = (options.seed * 1_000 + self.step) * options.workers + rank()
        self.rows = Rows(tokenizer, chapters, options.length, seed)

    @property
    def progress(self) -> float:
        """The part of the time, or of the steps, that is over."""
        if self.options.steps:
            return float(self.step / self.options.steps)
        return float(self.seconds / 60 / self.options.minutes)

    def run_step(self) -> tuple[float, float]:
        """One step; returns its loss and the routers' imbalance."""
        start = time.monotonic()
        chats = self.options.rows // 2
        batches = [self.rows.text(self.options.rows - chats)]
        if chats:
            batches.append(self.rows.chat(chats))
        learned = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batches)
        loss = torch.zeros(())
        with as_exported(self.model, self.progress >= QUANTIZE_FROM):
            for tokens, labels in batches:
                part = self._loss(tokens, labels) / learned
                part.backward()
                loss += part.detach()
        average([loss, *(p.grad for p in self.model.parameters() if p.grad is not None)])
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        factor = schedule(self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        imbalance = self.balancer.update(factor)
        self.step += 1
        self.tokens += int(self.options.workers * self.options.rows * self.options.length)
        seconds = torch.tensor([time.monotonic() - start])
        average([seconds])
        self.seconds += float(seconds)
        return float(loss), imbalance

    def _loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The sum over the tokens to be learned; each is told by those before it."""
        hidden = self.model.model(tokens, use_cache=False).last_hidden_state
        target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        learned = (target != IGNORED).nonzero().squeeze(1)
        logits = self.model.lm_head(hidden.flatten(0, 1).index_select(0, learned))
        return nn.functional.cross_entropy(logits, target[learned], reduction="sum")

    def save(self) -> None:
        """Replaces the checkpoint."""
        path = self.options.work / STATE
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "options": {k: str(v) for k, v in vars(self.options).items()},
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _load(self) -> None:
        state = torch.load(self.options.work / STATE)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds = state["seconds"]


def rank() -> int:
    """This worker's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def average(tensors: list[torch.Tensor]) -> None:
    """Replaces tensors by their mean over the workers, which are alike afterwards."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def architecture(sizes: Path | None) -> dict[str, Any]:
    """Returns the architecture, some sizes replaced by those of a JSON file."""
    return ARCHITECTURE if sizes is None else ARCHITECTURE | json.loads(sizes.read_text())


def schedule(progress: float) -> float:
    """The learning rate's factor: a linear rise, then a cosine down to `FINAL_LEARNING_RATE`."""
    if progress < WARMUP:
        return max(progress, WARMUP / 50) / WARMUP
    fallen = min(1.0, (progress - WARMUP) / (1 - WARMUP))
    low = FINAL_LEARNING_RATE
    return low + (1 - low) * (1 + math.cos(math.pi * fallen)) / 2


def prepare(options: argparse.Namespace) -> tuple[Tokenizer, list[Chapter], list[Chapter]]:
    """Returns the tokenizer (trained at the first call) and the two parts of the corpus."""
    text = (options.text or fetch(options.work)).read_text(encoding="utf-8")
    train, held_out = split(parse(text))
    sizes = architecture(options.architecture)
    folder = options.work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        tokenizer = train_tokenizer([chapter.text for chapter in train], sizes["vocab_size"])
        save_tokenizer(tokenizer, folder, sizes["max_position_embeddings"])
    return Tokenizer.from_file(str(folder / "tokenizer.json")), train, held_out


def work(worker: int, options: argparse.Namespace, rendezvous: str) -> None:
    """Trains, as one of the workers."""
    torch.set_num_threads(1)
    if options.workers > 1:
        dist.init_process_group("gloo", rendezvous, rank=worker, world_size=options.workers)
    tokenizer, train, held_out = prepare(options)
    training = Training(options, tokenizer, train)
    saved = training.seconds
    losses: list[float] = []
    while training.progress < 1:
        loss, imbalance = training.run_step()
        losses.append(loss)
        if worker == 0 and training.step % 20 == 0:
            rate = training.tokens / training.seconds
            print(
                f"step {training.step}  {training.seconds / 60:.1f} min  loss "
                f"{sum(losses) / len(losses):.3f}  imbalance {imbalance:.2f}  {rate:.0f} tokens/s",
                flush=True,
            )
            losses.clear()
        if worker == 0 and training.seconds - saved > 60 * options.save_minutes:
            saved = training.seconds
            training.save()
            texts = [chapter.text for chapter in held_out[:4]]
            ppl, bits = perplexity(training.model, tokenizer, texts, options.length)
            print(f"held out: perplexity {ppl:.2f}, {bits:.3f} bits per byte", flush=True)
    if worker == 0:
        training.save()


def main(arguments: list[str] | None = None) -> None:
    """Trains."""
    options = parse_arguments(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options)
    if options.workers == 1:
        work(0, options, "")
        return
    rendezvous = options.work / "rendezvous"
    rendezvous.unlink(missing_ok=True)
    mp.spawn(work, (options, f"file://{rendezvous.resolve()}"), nprocs=options.workers)


if __name__ == "__main__":
    main()

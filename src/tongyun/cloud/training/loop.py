"""The training loop: one step after another, written down so that it can go on later.

A step depends on the recipe, the tokens and the step's number, never on what ran
before in this process. A run that was interrupted and resumed therefore ends with
the same weights, bit for bit, as one that was not.
"""

from __future__ import annotations

import csv
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tongyun.cloud.training.corpus import Windows
from tongyun.cloud.training.evaluate import score_tokens
from tongyun.cloud.training.forward import RouterRecord, new_model, summed_loss
from tongyun.cloud.training.optimizer import Optimizers, learning_rate
from tongyun.cloud.training.recipe import Recipe, Stage
from tongyun.errors import InputError, ServiceError
from tongyun.model.qwen3 import Qwen3

CURVE_COLUMNS = ("step", "tokens", "sequence", "loss", "balance", "held_out_loss", "lr", "seconds")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step of the loss curve.

    Losses in nats per token, `lr` as a part of the recipe's rates, `seconds` of training
    up to the step's end, evaluations included.
    """

    step: int
    tokens: int
    sequence: int
    loss: float
    balance: float
    held_out_loss: float | None
    lr: float
    seconds: float

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Point:
        held_out = row["held_out_loss"]
        return cls(
            step=int(row["step"]),
            tokens=int(row["tokens"]),
            sequence=int(row["sequence"]),
            loss=float(row["loss"]),
            balance=float(row["balance"]),
            held_out_loss=float(held_out) if held_out else None,
            lr=float(row["lr"]),
            seconds=float(row["seconds"]),
        )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The corpus as tokens: what is trained on, and a part of what is held out."""

    train: NDArray[np.uint16]
    quick: NDArray[np.uint16]


def use_threads(count: int) -> None:
    """CPU threads of this process. Sums are cut by threads, so their number decides the last bits."""
    torch.set_num_threads(count)


def stage_at(step: int, recipe: Recipe) -> tuple[Stage, int]:
    """The stage of a step, and the step at which that stage begins."""
    steps = recipe.training.steps
    begun = [(stage, math.ceil(stage.start * steps)) for stage in recipe.training.stages]
    return next(pair for pair in reversed(begun) if pair[1] <= step)


class Run:
    """The state of a training run, kept in `directory` between processes."""

    def __init__(self, recipe: Recipe, tokens: Tokens, directory: Path, digest: str) -> None:
        self.recipe, self.tokens, self.directory, self.digest = recipe, tokens, directory, digest
        self.model: Qwen3 = new_model(recipe.model_config, recipe.seed)
        self.router = RouterRecord(self.model)
        self.optimizers = Optimizers.of(self.model, recipe.optimizer)
        self.curve: list[Point] = []

    @property
    def step(self) -> int:
        return len(self.curve)

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    def train(self, report: Callable[[Point], None], *, until: int | None = None) -> None:
        """Steps up to `until` (the recipe's end if None), saved along the way and at the end."""
        training = self.recipe.training
        last = training.steps if until is None else min(until, training.steps)
        while self.step < last:
            report(self._advance())
            if self.step % training.checkpoint_every == 0 or self.step == last:
                self.save()

    def _advance(self) -> Point:
        begun = time.perf_counter()
        step, training = self.step, self.recipe.training
        stage, stage_start = stage_at(step, self.recipe)
        rows_a_step = training.batch_tokens // stage.sequence
        windows = Windows(tokens=self.tokens.train, sequence=stage.sequence, seed=self.recipe.seed)
        rows = torch.from_numpy(windows.rows((step - stage_start) * rows_a_step, rows_a_step))
        loss, balance = self._gradients(rows)
        if not math.isfinite(loss):
            raise ServiceError(f"step {step}: the loss is {loss}; the last checkpoint is {self.checkpoint}")
        factor = learning_rate(step, training)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.clip)
        self.optimizers.step(factor)
        done = (step + 1) % training.evaluate_every == 0 or step + 1 == training.steps
        point = Point(
            step=step,
            tokens=(step + 1) * training.batch_tokens,
            sequence=stage.sequence,
            loss=loss,
            balance=balance,
            held_out_loss=self._held_out() if done else None,
            lr=factor,
            seconds=(self.curve[-1].seconds if self.curve else 0.0) + time.perf_counter() - begun,
        )
        self.curve.append(point)
        return point

    def _gradients(self, rows: torch.Tensor) -> tuple[float, float]:
        """Mean loss and balance of a batch; gradients are summed over its micro-batches."""
        training = self.recipe.training
        parts = torch.split(rows, training.micro_tokens // (rows.shape[1] - 1))
        total, balances = 0.0, 0.0
        for part in parts:
            inputs, targets = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            loss = summed_loss(self.model, inputs, targets) / training.batch_tokens
            balance = self.router.balance() / len(parts)
            (loss + training.balance * balance).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            balances += float(balance.detach())
        return total, balances

    def _held_out(self) -> float:
        evaluation = self.recipe.evaluation
        nats, count = score_tokens(
            self.model, self.tokens.quick, context=evaluation.context, stride=evaluation.context
        )
        return nats / count

    def save(self) -> None:
        """Write everything needed to go on, under a temporary name and then renamed."""
        self.directory.mkdir(parents=True, exist_ok=True)
        state = {
            "digest": self.digest,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state(),
            "curve": [[getattr(point, column) for column in CURVE_COLUMNS] for point in self.curve],
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)
        write_curve(self.curve, self.directory / "curve.csv")

    def restore(self) -> None:
        """Go on from the checkpoint; one that another recipe or other data made is refused."""
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.checkpoint}: cannot be read: {first}") from None
        if state["digest"] != self.digest:
            raise InputError(
                f"{self.checkpoint}: made by another recipe, corpus or tokenizer; "
                "give another --output, or --restart to discard it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizers.restore(state["optimizers"])
        self.curve = [Point(**dict(zip(CURVE_COLUMNS, row, strict=True))) for row in state["curve"]]


def write_curve(curve: list[Point], file: Path) -> None:
    """The loss curve as CSV, one row a step."""
    partial = file.with_suffix(".partial")
    with partial.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(CURVE_COLUMNS)
        for point in curve:
            values = (getattr(point, column) for column in CURVE_COLUMNS)
            writer.writerow(f"{v:.5g}" if isinstance(v, float) else "" if v is None else v for v in values)
    partial.replace(file)


def read_curve(file: Path) -> list[Point]:
    with file.open(newline="") as lines:
        return [Point.from_row(row) for row in csv.DictReader(lines)]

"""Save a model that was trained here so that anyone can load it.

Decides the storage type; the layout is `weights`' business. Knows no optimizer, and
nothing of how the model came to be.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tongyun.model.qwen3 import Qwen3
from tongyun.model.weights import parameters, write_checkpoint


def save_model(model: Qwen3, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` as the hub lays them out.

    Weights are rounded to `dtype`. The tokenizer's files are written by whoever has one.
    """
    state = model.state_dict()
    weights = {p.name: state[p.name].to("cpu", dtype) for p in parameters(model.config)}
    write_checkpoint(directory, weights, model.config)

"""A model that was trained here gives the same logits in transformers, from its saved files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from driver import tiny

from tongyun.cloud.training.forward import causal, new_model
from tongyun.model.checkpoint import save_model
from tongyun.model.weights import load_model


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_gives_the_same_logits(tmp_path: Path, sparse: bool, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(tiny(tied=True, sparse=sparse), eos_token_ids=(0, 2))
    model = new_model(config, seed=7)
    save_model(model, tmp_path, dtype)
    if dtype == torch.bfloat16:
        model = load_model(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, config.vocab, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden_TD = model(tokens, torch.arange(40), causal(40))
        expected = reference(tokens[None]).logits[0]
    torch.testing.assert_close(model.logits(hidden_TD), expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]

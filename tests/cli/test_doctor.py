"""`dp-flash doctor`: what is installed, and how each layer of a model is treated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dp_flash_hf.cli.doctor import keep_few_layers
from dp_flash_hf.cli.main import main
from tests.cli import printed_rows


def test_doctor_tells_versions_and_attention(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    rows = dict(printed_rows(capsys.readouterr().out))
    assert rows["torch"] == torch.__version__
    assert "computed by torch" in rows["attention"]


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_doctor_accounts_for_every_parameter_of_a_model(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=30, num_attention_heads=2, num_key_value_heads=1
    )
    config.save_pretrained(tmp_path)
    main(["doctor", "--model", str(tmp_path), "--task", task, "--length", "9"])
    trial = printed_rows(capsys.readouterr().out.partition("Llama")[2])
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
    head = 60 * 16 if task == "causal-lm" else 2 * 16
    assert sum(int(row[3].replace(",", "")) for row in trial) == 60 * 16 + 2 * layer + 16 + head  # 2 of the 30 layers
    assert {row[0] for row in trial} == {"Embedding", "Linear", "LlamaRMSNorm"}


def test_the_trial_keeps_one_layer_of_each_kind() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    config = LlamaConfig(num_hidden_layers=6)
    config.layer_types = kinds
    keep_few_layers(config)
    assert config.num_hidden_layers == 4
    assert config.layer_types == kinds[:4]

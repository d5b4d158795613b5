"""`dp-flash doctor`: what is installed, and how each layer of a model is treated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dp_flash_hf.cli.doctor import _PACKAGES, _version, keep_few_layers
from dp_flash_hf.cli.main import main
from tests.cli import printed_rows
from tests.support import ROOT


def test_doctor_tells_versions_and_attention(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    rows = dict(printed_rows(capsys.readouterr().out))
    assert rows["torch"].startswith(torch.__version__)
    assert "computed by torch" in rows["attention"]


@pytest.mark.parametrize("package", _PACKAGES)
def test_doctor_says_when_a_version_is_newer_than_tested(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tested,) = re.findall(rf"^{package}==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    major = int(tested.partition(".")[0])
    for installed, newer in ((tested, False), (f"{tested}+cpu", False), (f"{tested}.1", True), (f"{major + 1}.0rc1", True)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, installed=installed: installed)
        said = f"{installed}, newer than {tested}, which this release was tested with" if newer else installed
        assert _version(package) == said
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    assert _version(package) == "0.0.1"


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

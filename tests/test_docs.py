"""The code that README and docs print, run as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.accelerator import Accelerator

from dp_flash_hf.cli import main as cli
from dp_flash_hf.errors import PrivacyError
from tests.support import ROOT

VOCABULARY, PADDING = 31, 0


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def block(page: str, containing: str) -> str:
    (found,) = (text for text in blocks(page) if containing in text)
    return found


def collate(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PADDING)
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": ids.masked_fill(ids == PADDING, -100)}


def collate_examples(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return collate([example["input_ids"] for example in examples])


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """What the examples take as given: a saved model, data, a collator, a Trainer's arguments."""
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PADDING,
        use_cache=False,
    )
    model = hf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, VOCABULARY, (3 + row % 5,), generator=generator).tolist() for row in range(96)]
    return {
        **{name: getattr(hf, name) for name in ("AutoModelForCausalLM", "Trainer")},
        "name": str(tmp_path / "model"),
        "args": hf.TrainingArguments(
            str(tmp_path / "out"),
            per_device_train_batch_size=16,
            max_steps=3,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
        ),
        "data": [{"input_ids": row, "labels": row} for row in rows],
        "collator": collate_examples,
        "model": model,
        "dataset": rows,
        "collate": collate,
        "optimizer": (optimizer := torch.optim.AdamW(model.parameters(), lr=1e-3)),
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "accelerator": Accelerator(cpu=True),
    }


def test_the_two_lines(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("README.md", ".attach(trainer)"), names)
    assert "epsilon <= " in capsys.readouterr().out
    assert names["dp"].report().steps == 3
    assert 0 < names["dp"].report().epsilon <= 8


def test_the_loop_of_ones_own(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(block("README.md", "private.backward(batch)"), names)
    assert "epsilon <= " in capsys.readouterr().out
    assert names["private"].report().steps == names["private"].report().planned_steps == 15
    assert not any(torch.equal(old, new) for old, new in zip(before, names["model"].parameters(), strict=True))


def test_the_loop_from_the_parts(names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(block("docs/extending.md", "mechanism.release()"), names)
    assert "epsilon <= " in capsys.readouterr().out
    assert names["mechanism"].account.steps == names["plan"].steps == 20
    assert not any(torch.equal(old, new) for old, new in zip(before, names["model"].parameters(), strict=True))


def test_noise_in_the_forward_pass(capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {
        f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    config = hf.BartConfig(**sizes, d_model=16, vocab_size=VOCABULARY, max_position_embeddings=16, use_cache=False)
    model: Any = hf.BartForConditionalGeneration(config)
    model.eval().requires_grad_(False)
    model.set_attn_implementation("dp_flash")
    ids = torch.randint(4, VOCABULARY, (3, 9))
    exec(block("README.md", "verify_cut("), {"model": model, "batch": {"input_ids": ids, "decoder_input_ids": ids[:, :5]}})
    assert "epsilon <= 1.9" in capsys.readouterr().out  # 5 of 64 rows


def test_the_settings(names: dict[str, Any]) -> None:
    from dp_flash_hf import PrivacyConfig

    exec(block("README.md", 'privacy_unit="user_id"'), {"PrivacyConfig": PrivacyConfig})


def worked_rule() -> str:
    """Its blocks, one after the other; what comes after them is another example."""
    code = "".join(blocks("docs/extending.md"))
    return code[: code.index("from dp_flash_hf.attention")]


def test_the_worked_rule() -> None:
    exec(worked_rule(), {"__name__": "example"})


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("record_product(ctx.weight, x, z, ctx.layout)", "record_product(ctx.weight, x, g, ctx.layout)"),
        ("record_product(ctx.weight, x, z, ctx.layout)", "record_product(ctx.weight, x, z * 1.001, ctx.layout)"),
        ("record_product(ctx.weight, x, z, ctx.layout)", "pass"),
    ],
)
def test_the_checker_refutes_a_wrong_rule(right: str, wrong: str) -> None:
    code = worked_rule()
    assert code.count(right) == 1
    with pytest.raises(PrivacyError, match=r"inner\.weight"):
        exec(code.replace(right, wrong), {"__name__": "example"})


def test_every_link_within_the_project_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_planning_command_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = (line for text in blocks("README.md", "bash") for line in text.splitlines() if "plan --units" in line)
    cli.main(shlex.split(line)[1:])
    assert "10000 units, 512 expected per step" in capsys.readouterr().out


def test_the_planning_of_memory_prints_the_table_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    (line,) = (line for text in blocks("README.md", "bash") for line in text.splitlines() if "plan --memory" in line)
    cli.main([word.replace("path/or/name", str(tmp_path)) for word in line.split()[1:]])
    printed = capsys.readouterr().out
    (table,) = (text for text in blocks("README.md", "text") if "two_pass │" in text)
    assert table in printed

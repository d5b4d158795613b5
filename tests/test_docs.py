"""README and docs: the code runs as printed, commands are commands, links lead somewhere, and what is named exists."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import pkgutil
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest
import transformers as hf

from dp_flash_hf.cli import main as cli
from dp_flash_hf.errors import PrivacyError
from tests.support import ROOT, house, pages
from tests.support.examples import SETUPS
from tests.support.pages import PAGES
from tests.test_layout import WINGS

EXAMPLES = [example for page in PAGES for example in pages.examples(page)]
COMMANDS = [(page, words) for page in PAGES for words in pages.commands(page)]
# What shell blocks run that is not ours: nothing can be said of it here.
OTHERS = {"pip", "git", "docker", "kubectl", "export", "ray", "nvidia-smi"}


class Parsed(BaseException):
    """Raised where a command would begin to work."""


def flash_commands() -> list[Any]:
    """Every command line for `dp-flash`, under its own name or as a module that a launcher starts."""
    found = []
    for page, words in COMMANDS:
        for name in ("dp-flash", "dp_flash_hf.cli"):
            if name in words:
                arguments = words[words.index(name) + 1 :]
                found.append(pytest.param(arguments, id=f"{page}:{' '.join(arguments[:3])}"))
    return found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.page}:{example.setup}")
def test_code_runs_as_printed(example: pages.Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = SETUPS[example.setup](tmp_path)
    names = next(setup)
    for block in example.blocks:
        exec(compile(block, example.page, "exec"), names)
    with pytest.raises(StopIteration):
        setup.send(capsys.readouterr().out)


def test_a_block_without_a_setup_or_a_reason_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, fine in (
        ("```python\nx = 1\n```\n", False),
        ("<!-- setup: nothing -->\n\nSome words.\n\n```python\nx = 1\n```\n", False),
        ("<!-- setup: nothing -->\n```python\nx = 1\n```\n", True),
        ("<!-- skip: needs a GPU -->\n\n```python\nx = 1\n```\n", True),
    ):
        monkeypatch.setattr(pages, "read", lambda page, text=text: text)
        if fine:
            pages.examples("page")
        else:
            with pytest.raises(ValueError, match="setup: NAME"):
                pages.examples("page")


def test_every_setup_is_used() -> None:
    assert {example.setup for example in EXAMPLES} == SETUPS.keys()


def worked_rule() -> str:
    (example,) = (example for example in EXAMPLES if "@register_rule" in example.code)
    return example.code


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


@pytest.mark.parametrize("arguments", flash_commands())
def test_dp_flash_understands_its_command_lines(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are stopped after their arguments are read: for `train`, those of the recipe too."""

    def stop(*_: Any, **__: Any) -> NoReturn:
        raise Parsed

    if arguments[0] == "train":
        recipe = importlib.import_module(f"dp_flash_hf.recipes.{arguments[1]}")
        read_options = recipe.read_options
        monkeypatch.setattr(recipe, "read_options", lambda *given: stop(read_options(*given)))
        # KEYS stands for what a table says. bf16 is refused where there is no GPU, unless a CPU is asked for.
        arguments = [*(word for word in arguments if not word.isupper()), "use_cpu=true"]
    else:
        parse = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *given: stop(parse(*given)))
    with pytest.raises(Parsed):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value[:3])
)
def test_commands_name_what_there_is(page: str, words: list[str]) -> None:
    program, *arguments = itertools.dropwhile(lambda word: re.match(r"\w+=[^$]", word), words)  # NAME=value before a command
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program in ("python", "torchrun", "accelerate"):
        if "-m" in arguments:
            module = arguments[arguments.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None
        for word in arguments:
            if re.fullmatch(r"[\w/]+\.(py|yaml)", word):
                assert (ROOT / word).exists()
    elif program == "pytest":
        for word in arguments:
            if word.startswith("tests"):
                assert (ROOT / word.partition("::")[0]).exists()
    else:
        assert program in {*OTHERS, "dp-flash"} or re.match(r"\w+=\$\(", program)  # NAME=$(command)


def test_the_planning_command_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {shlex.join(words) for _, words in COMMANDS if words[:3] == ["dp-flash", "plan", "--units"]}
    assert lines
    for line in lines:
        cli.main(shlex.split(line)[1:])
        assert "units, " in capsys.readouterr().out


def test_the_planning_of_memory_prints_the_table_as_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path)
    tables = {
        block.text
        for page in PAGES
        for block in pages.blocks(page, "text")
        if "│    two_pass │" in block.text and "weights" in block.text
    }
    words = next(words for _, words in COMMANDS if words[:3] == ["dp-flash", "plan", "--memory"] and "--ranks" not in words)
    cli.main([word.replace("path/or/name", str(tmp_path)) for word in words[1:]])
    printed = capsys.readouterr().out
    assert tables
    assert all(table in printed for table in tables)


def test_the_drawing_of_the_house_has_every_import_point_down() -> None:
    drawn = re.findall(r'id="room-(\w+)" x="\d+" y="(\d+)"', (ROOT / "docs/_static/house.svg").read_text(encoding="utf-8"))
    height = {room: int(y) for room, y in drawn}
    assert set(height) == set(WINGS)
    for room, others in house.rooms(house.files(ROOT)).items():
        assert all(height[room] < height[other] for other in others), f"{room} imports {others}"


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_lead_somewhere(page: str) -> None:
    for link in pages.links(page):
        target, _, anchor = link.partition("#")
        if urlsplit(link).scheme:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in pages.anchors(path), link


@pytest.mark.parametrize("page", PAGES)
def test_links_to_other_places_are_addresses(page: str) -> None:
    for link in pages.links(page):
        address = urlsplit(link)
        if address.scheme:
            assert address.scheme == "https", link
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", address.netloc), link


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_in_code_exists(page: str) -> None:
    text = pages.prose(page)
    for name in re.findall(r"`(dp_flash_hf(?:\.\w+)+)\b", text):
        pkgutil.resolve_name(name)
    for path in re.findall(r"\b((?:tests|patches|recipes|docs)/[\w./]+?\.(?:py|yaml|md))\b", text):
        assert (ROOT / path).exists(), path

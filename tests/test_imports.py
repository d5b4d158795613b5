"""What an import costs and does: names on demand, nothing heavy before, attention registered wherever models come from."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dp_flash_hf


def _run(script: str, *arguments: str, cwd: Path | None = None) -> str:
    """What a new interpreter prints that runs these lines."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Names.


def _typed_names() -> dict[str, str]:
    """Public names by what type checkers read: the module that each is imported from."""
    tree = ast.parse(Path(dp_flash_hf.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ours = [node for node in block.body if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dp_flash_hf.")]
    return {alias.name: str(node.module).removeprefix("dp_flash_hf.") for node in ours for alias in node.names}


def test_names_are_the_same_to_type_checkers_and_at_run_time() -> None:
    assert _typed_names() == dp_flash_hf._MODULE_OF
    assert sorted(dp_flash_hf._MODULE_OF) == sorted(dp_flash_hf.__all__)


def test_every_public_name_resolves() -> None:
    everything: dict[str, object] = {}
    exec("from dp_flash_hf import *", everything)  # as in a notebook
    for name in dp_flash_hf.__all__:
        assert everything[name] is getattr(dp_flash_hf, name)
        assert everything[name].__name__ == name  # type: ignore[attr-defined]
    assert set(dp_flash_hf.__all__) | {"__version__"} <= set(dir(dp_flash_hf))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dp_flash_hf' has no attribute 'DPCalback'"):
        _ = dp_flash_hf.DPCalback  # type: ignore[attr-defined]


# Cost.

ADDED = """
import sys
before = set(sys.modules)
{}
added = set(sys.modules) - before
print(len(added), *sorted({{name.partition(".")[0] for name in added}} - sys.stdlib_module_names))
"""


def test_a_bare_import_loads_one_module() -> None:
    assert _run(ADDED.format("import dp_flash_hf")).split()[1:] == ["dp_flash_hf"]
    assert _run(ADDED.format("import typing, dp_flash_hf; print([m for m in sys.modules if 'dp_flash_hf.' in m])"))[:2] == "[]"


def test_help_loads_nothing_but_the_command_line() -> None:
    """And of the standard library what argparse needs, and little else."""
    script = "from dp_flash_hf.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    count, *others = _run(ADDED.format(script)).splitlines()[-1].split()
    assert others == ["dp_flash_hf"]
    assert int(count) < 60


@pytest.mark.complete
def test_with_models_come_the_attention_and_the_patches_only() -> None:
    """Beside Transformers, which waits for neither: attention and patches are imported before any model class is there."""
    script = """
import sys
import transformers
import dp_flash_hf
from dp_flash_hf import patches
from dp_flash_hf.attention import registration
patches.load()
assert "transformers.modeling_utils" not in sys.modules
before = set(sys.modules)
import transformers.modeling_utils
assert not [name for name in set(sys.modules) - before if name.startswith("dp_flash_hf")]
print(*sorted({".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("dp_flash_hf.")}))
print(*{"datasets", "pandas", "dp_accounting", "scipy.signal", "transformers.trainer"} & sys.modules.keys())
"""
    ours, heavy = _run(script).split("\n")[:2]
    wings = {"attention", "patches", "layers", "kernels", "mechanisms", "units", "errors", "validation", "distributed"}
    assert {name.removeprefix("dp_flash_hf.") for name in ours.split()} <= wings
    assert not heavy


# Registration, in processes that import in different orders.

BUILD = """
import torch, transformers
def build(attention="dp_flash"):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes), attn_implementation=attention)
def ran(model):
    model(torch.zeros(1, 3, dtype=torch.long))
    from dp_flash_hf.attention.registration import status
    return status(model)
"""


@pytest.mark.complete
def test_imported_before_transformers_and_in_a_forked_child() -> None:
    script = f"""
import os
import dp_flash_hf
child = os.fork()
{BUILD}
assert ran(build()) == "called"
if child:
    _, how = os.waitpid(child, 0)
    assert how == 0, how
"""
    _run(script)


@pytest.mark.complete
def test_imported_after_transformers_alone() -> None:
    _run(f"import transformers, dp_flash_hf\n{BUILD}\nassert ran(build()) == 'called'")


@pytest.mark.complete
def test_imported_after_a_model_was_built() -> None:
    script = f"""
{BUILD}
model = build("eager")
import dp_flash_hf
model.set_attn_implementation("dp_flash")
assert ran(model) == "called"
assert ran(build()) == "called"
"""
    _run(script)


@pytest.mark.complete
def test_a_module_of_the_package_is_enough() -> None:
    script = f"from dp_flash_hf.integrations.trainer import DPCallback\n{BUILD}\nassert ran(build()) == 'called'"
    _run(script)


@pytest.mark.complete
def test_models_travel_to_spawned_processes(tmp_path: Path) -> None:
    """One that has not run yet, whose first forward is to be checked there, and one that has run here."""
    script = f"""
import dp_flash_hf
{BUILD}
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
if __name__ == "__main__":
    fresh, used = build(), build()
    assert ran(used) == "called"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(ran, [fresh, used])) == ["called", "called"]
"""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.complete
def test_another_version_of_transformers_is_refused_every_time() -> None:
    """Not by the import of this package, but before there is a model; and by each further try, though the first one failed."""
    script = """
import sys
import dp_flash_hf
from importlib.machinery import PathFinder

class Another:  # behind our finder, as Transformers itself is: a version without one of the methods
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "transformers.modeling_utils":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            del module.PreTrainedModel.set_attn_implementation
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(1, Another)
import transformers
for _ in range(2):
    try:
        transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(), attn_implementation="dp_flash")
    except dp_flash_hf.UnsupportedError as error:
        assert "PreTrainedModel.set_attn_implementation" in str(error), error
    else:
        raise SystemExit("a model was built")
"""
    _run(script)


@pytest.mark.complete
def test_threads_that_import_both_sides_at_once_do_not_wait_for_each_other() -> None:
    """One is importing the registration when another has Transformers' models, and needs the registration to go on."""
    script = """
import sys, threading, time
from importlib.machinery import PathFinder
import dp_flash_hf
began, failed = threading.Event(), []

class Slow:  # holds our module's import up until that of Transformers' models is under way
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "dp_flash_hf.attention.registration":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            began.set()
            while "transformers.modeling_utils" not in sys.modules:
                time.sleep(0.01)
            execute(module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Slow)

def run(code):
    try:
        exec(code)
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=run, args=[code]) for code in (
    "import dp_flash_hf.attention.registration",
    "began.wait(); import transformers.modeling_utils",
)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failed, failed
import transformers
assert transformers.PreTrainedModel.post_init._wrapped_by_dp_flash
"""
    _run(script)


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert dp_flash_hf.__version__ == version("dp-flash-hf")

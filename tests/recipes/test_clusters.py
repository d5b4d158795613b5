"""Launchers and manifests for clusters: valid where a schema says so, safe, and really run where one machine can."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from kubeflow_trainer_api import models
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig

from dp_flash_hf import PrivacyReport
from tests.support import ROOT

FOLDER = ROOT / "recipes" / "clusters"
PAGE = (ROOT / "docs" / "guides" / "clusters.md").read_text(encoding="utf-8")
ACCELERATE = sorted(FOLDER.glob("accelerate_*.yaml"))
MANIFESTS = sorted(set(FOLDER.glob("*.yaml")) - set(ACCELERATE))
MODELS: dict[tuple[str, str], Any] = {
    ("v1", "PersistentVolumeClaim"): models.IoK8sApiCoreV1PersistentVolumeClaim,
    ("v1", "Service"): models.IoK8sApiCoreV1Service,
    ("batch/v1", "Job"): models.IoK8sApiBatchV1Job,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): models.TrainerV1alpha1TrainingRuntime,
    ("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime"): models.TrainerV1alpha1ClusterTrainingRuntime,
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): models.TrainerV1alpha1TrainJob,
}


def objects(*names: str) -> dict[str, Any]:
    """Every object of the manifests (or of those named), by its kind."""
    files = [FOLDER / name for name in names] or MANIFESTS
    every = [thing for path in files for thing in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    found = {thing["kind"]: thing for thing in every}
    assert len(found) == len(every)
    return found


def validate(thing: dict[str, Any]) -> None:
    """Raise ValueError for a field that the API does not have, or whose value it would not take."""
    model = MODELS[thing["apiVersion"], thing["kind"]]
    known = model.from_dict(thing).to_dict()  # the models drop what they do not know
    if known != thing:
        raise ValueError(f"unknown fields: {json.dumps(known)} is all that is known of {json.dumps(thing)}")


def templates() -> dict[str, Any]:
    """The pods' templates, by the kind of the object that holds them."""
    every = objects()
    (node,) = every["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    return {"Job": every["Job"]["spec"]["template"], "TrainingRuntime": node["template"]["spec"]["template"]}


def dangers(pod: dict[str, Any]) -> list[str]:
    """What of a pod's spec its user did not bargain for."""
    security, found = pod.get("securityContext", {}), []
    if not (security.get("runAsNonRoot") is True and security.get("runAsUser", 0) > 0 and security.get("runAsGroup", 0) > 0):
        found.append("root")
    if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("seccomp")
    if pod.get("automountServiceAccountToken") is not False:
        found.append("token")
    if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers")):
        found.append("host")
    if any("hostPath" in volume for volume in pod["volumes"]):
        found.append("hostPath")
    for container in pod["containers"]:
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged") or "runAsUser" in own:
            found.append("privileges")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            found.append("capabilities")
        if own.get("readOnlyRootFilesystem") is not True:
            found.append("writable root")
        asked = container.get("resources", {})
        if not {"cpu", "memory"} <= asked.get("limits", {}).keys() & asked.get("requests", {}).keys():
            found.append("limits")
    return found


def arguments(kind: str) -> list[str]:
    """What a pod runs: the recipe and its overrides come after `train`."""
    (container,) = templates()[kind]["spec"]["containers"]
    args: list[str] = container.get("args") or objects()["TrainJob"]["spec"]["trainer"]["args"]
    return [*container["command"], *args]


KINDS = sorted(templates())


# Manifests.


@pytest.mark.parametrize("kind", sorted(objects()))
def test_manifests_are_what_the_api_takes(kind: str) -> None:
    validate(objects()[kind])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key whose name the API gives; those below labels, selectors and resources are the user's own."""
    if isinstance(value, dict):
        for key in value:
            yield (*path, key)
            if key not in ("labels", "selector", "limits", "requests"):
                yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


@pytest.mark.parametrize("kind", sorted(objects()))
def test_a_misspelt_field_is_found_wherever_it_is(kind: str) -> None:
    right = objects()[kind]
    validate(right)
    for path in places({key: right[key] for key in ("metadata", "spec")}):
        wrong = copy.deepcopy(right)
        holder = wrong
        for step in path[:-1]:
            holder = holder[step]
        holder[f"{path[-1]}s"] = holder.pop(path[-1])
        with pytest.raises(ValueError):
            validate(wrong)


def test_a_value_of_the_wrong_kind_is_found() -> None:
    for path, value in {
        ("spec", "completions"): "2",
        ("spec", "completionMode"): "indexed",
        ("spec", "template", "spec", "restartPolicy"): "never",
        ("spec", "template", "spec", "securityContext", "runAsNonRoot"): "yes",
        ("spec", "template", "spec", "containers"): {},
    }.items():
        wrong = objects()["Job"]
        holder = wrong
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = value
        with pytest.raises((ValueError, TypeError, AttributeError)):
            validate(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_pods_can_do_no_more_than_train(kind: str) -> None:
    assert dangers(templates()[kind]["spec"]) == []


@pytest.mark.parametrize(
    ("path", "danger"),
    [
        (("securityContext", "runAsNonRoot"), "root"),
        (("securityContext", "runAsUser"), "root"),
        (("securityContext", "seccompProfile"), "seccomp"),
        (("automountServiceAccountToken",), "token"),
        (("containers", 0, "securityContext"), "writable root"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), "privileges"),
        (("containers", 0, "securityContext", "capabilities"), "capabilities"),
        (("containers", 0, "securityContext", "readOnlyRootFilesystem"), "writable root"),
        (("containers", 0, "resources", "limits", "memory"), "limits"),
        (("containers", 0, "resources", "requests"), "limits"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_that_could_is_found(kind: str, path: tuple[Any, ...], danger: str) -> None:
    pod = templates()[kind]["spec"]
    holder = pod
    for step in path[:-1]:
        holder = holder[step]
    del holder[path[-1]]
    assert danger in dangers(pod)


@pytest.mark.parametrize("kind", KINDS)
def test_what_must_outlive_a_pod_is_on_the_shared_volume_and_nothing_else_is(kind: str) -> None:
    claim = objects()["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {thing["kind"] for thing in yaml.safe_load_all((FOLDER / "volume.yaml").read_text())} == {"PersistentVolumeClaim"}
    pod = templates()[kind]["spec"]
    (container,) = pod["containers"]
    volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
    mounts = {mount["mountPath"]: volumes.pop(mount["name"]) for mount in container["volumeMounts"]}
    assert not volumes
    assert mounts.pop("/volume") == {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    assert all(volume["emptyDir"]["sizeLimit"] for volume in mounts.values())
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert {environment["HOME"], "/tmp", "/dev/shm"} == mounts.keys()
    options = dict(argument.split("=", 1) for argument in arguments(kind) if "=" in argument)
    assert options["output_dir"].startswith("/volume/runs/")
    assert all(options[key].startswith("/volume/") for key in ("model", "dataset"))
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert options["resume_from_checkpoint"] == "true"


def test_pods_of_the_job_find_each_other_and_come_back() -> None:
    job, service = objects()["Job"], objects()["Service"]
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    environment = {entry["name"]: entry for entry in pod["containers"][0]["env"]}
    (port,) = service["spec"]["ports"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(environment["PET_NNODES"]["value"]) == 2
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["PET_MASTER_ADDR"]["value"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert environment["PET_MASTER_PORT"]["value"] == str(port["port"])
    assert environment["PET_NODE_RANK"]["valueFrom"]["fieldRef"] == {
        "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    }
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it: the Job makes new pods
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["backoffLimit"] > 0


def test_the_train_job_uses_the_runtime_and_all_its_pods_come_back() -> None:
    job, runtime = objects()["TrainJob"], objects()["TrainingRuntime"]
    group, kind, name = (job["spec"]["runtimeRef"][key] for key in ("apiGroup", "kind", "name"))
    assert (f"{group}/v1alpha1", kind, name) == (runtime["apiVersion"], runtime["kind"], runtime["metadata"]["name"])
    validate(runtime | {"kind": "ClusterTrainingRuntime"})  # as the page says
    assert runtime["spec"]["mlPolicy"]["torch"] == {}
    spec = runtime["spec"]["template"]["spec"]
    (node,) = spec["replicatedJobs"]
    # Where Trainer puts numNodes, args and the variables of torchrun: by these names.
    assert node["name"] == node["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert node["template"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert node["template"]["spec"]["backoffLimit"] == 0  # a pod's end is the JobSet's to answer, with new pods for all
    assert spec["failurePolicy"]["maxRestarts"] > 0


def test_both_manifests_train_the_same() -> None:
    assert arguments("Job") == arguments("TrainingRuntime")
    pods = [copy.deepcopy(templates()[kind]["spec"]) for kind in KINDS]
    for pod in pods:
        pod.pop("subdomain", None)
        for container in pod["containers"]:
            container.pop("args", None)
            container.pop("name")
            container["env"] = [entry for entry in container["env"] if not entry["name"].startswith("PET_")]
    assert pods[0] == pods[1]


def test_the_image_is_the_one_of_the_pods_and_can_build_the_package(tmp_path: Path) -> None:
    lines = (FOLDER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    tag = re.search(r" -t (\S+) ", lines[0])
    assert tag
    assert {pod["spec"]["containers"][0]["image"] for pod in templates().values()} == {tag[1]}
    security = templates()["Job"]["spec"]["securityContext"]
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}" in lines
    for line in lines:
        if line.startswith("COPY "):
            (*sources, target) = line.split()[1:]
            for source in sources:
                path = ROOT / source
                if path.is_dir():
                    shutil.copytree(path, tmp_path / target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(path, tmp_path / target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr


# Commands.


def commands(first: str) -> list[list[str]]:
    """The commands of the page that begin with `first`, with this machine for HOST."""
    lines = [
        line for text in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in text.replace("\\\n", " ").splitlines()
    ]
    line = [line.replace("HOST", "127.0.0.1").replace("--machine_rank R", "--machine_rank 1") for line in lines]
    return [shlex.split(text) for text in line if text.startswith(first)]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_takes_its_configurations(path: Path, tmp_path: Path) -> None:
    load: Any = load_config_from_file
    config = load(str(path))
    assert config.num_processes > 1
    assert config.mixed_precision == "no"
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(path.read_text().replace("num_processes", "num_procs"))
    with pytest.raises(ValueError, match="num_procs"):
        load(str(wrong))


def launched(command: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, str]]:
    """What `accelerate launch` makes of a command: its settings, and the environment of the processes."""
    monkeypatch.chdir(ROOT)
    (launch, *rest) = command[1:]
    assert launch == "launch"
    parser: Any = launch_command_parser
    validated: Any = _validate_launch_command
    args, _, _ = validated(parser().parse_args(rest))
    return args, prepare_multi_gpu_env(args)


def test_accelerate_launch_sees_machines_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    one, several, _ = commands("accelerate launch")
    args, _ = launched(one, monkeypatch)
    assert (args.nproc_per_node, args.module, args.training_script) == ("8", True, "dp_flash_hf.cli")
    args, _ = launched(several, monkeypatch)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", 1)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "127.0.0.1:29500")


def test_accelerate_launch_asks_for_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, sharded = commands("accelerate launch")
    _, environment = launched(sharded, monkeypatch)
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type is StateDictType.SHARDED_STATE_DICT
    assert not plugin.activation_checkpointing
    for key in yaml.safe_load((FOLDER / "accelerate_fsdp2.yaml").read_text())["fsdp_config"]:
        assert any(name == key.upper() for name in environment), f"{key} is not an option of accelerate launch"


# Real runs.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the volume: models/SmolLM2-360M and data/train.jsonl, both tiny."""
    folder = tmp_path_factory.mktemp("volume")
    model = folder / "models" / "SmolLM2-360M"
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, bos_token_id=None
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)  # type: ignore[no-untyped-call]
    ByT5Tokenizer(extra_ids=0).save_pretrained(model)
    (folder / "data").mkdir()
    rows = [{"dialogue": f"{row}?", "summary": "aaaa" if row % 2 else "bbbb"} for row in range(128)]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def sizes(data: Path, folder: Path) -> list[str]:
    """Overrides that make a recipe tiny: 16 units of each process in each of 2 parts of 2 steps."""
    return [
        f"model={data}/models/SmolLM2-360M",
        f"dataset={data}/data/train.jsonl",
        f"output_dir={folder}",
        "eval_dataset=null",
        "prompt_column=dialogue",
        "text_column=summary",
        "max_length=16",
        "per_device_train_batch_size=16",
        "gradient_accumulation_steps=2",
        "max_steps=2",
        "save_strategy=steps",
        "save_steps=1",
        "warmup_steps=0",
        "target_delta=1e-3",
        "report_to=none",
        "disable_tqdm=true",
        "use_cpu=true",
        "bf16=false",
    ]


def environment(number: int, changes: dict[str, str]) -> dict[str, str]:
    """What the launcher of node `number` starts with: nothing that an earlier launcher set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PET_", "ACCELERATE_", "RAY_", "FSDP_"))}
    local = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PET_NODE_RANK": str(number)}
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # Ray would call home, and leave a token there
    return kept | local | ray | changes


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


PROGRAMS = {
    "torchrun": ["-m", "torch.distributed.run"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
    "python": [],
}


def run_together(*commands: list[str], folder: Path, changes: dict[str, str] | None = None, fails: bool = False) -> str:
    """Run these commands at the same time, and return what they print. None of their processes outlives the test.

    Raise AssertionError unless all succeed, or, if that is expected, all fail.
    """
    prints = [folder / f"printed_{number}" for number in range(len(commands))]
    started = []
    for number, (command, prints_to) in enumerate(zip(commands, prints, strict=True)):
        with prints_to.open("wb") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, *PROGRAMS[command[0]], *command[1:]],
                    env=environment(number, changes or {}),
                    cwd=ROOT,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a group of its own, to be ended with all that it starts
                )
            )
    try:
        codes = [process.wait(timeout=500) for process in started]
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        printed = "\n".join(path.read_text(errors="replace") for path in prints)
        print(printed)
    assert [code != 0 for code in codes] == [fails] * len(codes)
    return printed


def check(folder: Path, processes: int) -> None:
    """Raise AssertionError unless the run is whole, and of so many processes."""
    report = PrivacyReport.from_json((folder / "report.json").read_text(encoding="utf-8"))
    assert (report.n_units, report.expected_batch_size, report.steps) == (128, 32 * processes, 2)
    assert report.private
    assert json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


DYING = """
# lora_finetune, but the first time its first process dies when the first checkpoint is written.
import os, signal
from pathlib import Path
from transformers import Trainer
from dp_flash_hf.recipes.lora_finetune import main

write = Trainer._save_checkpoint

def write_and_die(self, *args, **kwargs):
    write(self, *args, **kwargs)
    died = Path(__file__).with_name("died")
    if self.args.process_index == 0 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)

Trainer._save_checkpoint = write_and_die
"""


def pods(folder: Path) -> dict[str, str]:
    """The variables of torchrun as the Job or Kubeflow sets them, for one process a pod, and a home of their own."""
    rendezvous = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": free_port()}
    return {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", **rendezvous, "HOME": str(folder)}


@pytest.mark.complete
def test_two_pods_train_as_one_run(data: Path, tmp_path: Path) -> None:
    """The pods' own command, which is the same for the Job and for Kubeflow; a folder is their volume."""
    command = [*arguments("Job"), *sizes(data, tmp_path / "run")]
    printed = run_together(command, command, folder=tmp_path, changes=pods(tmp_path))
    check(tmp_path / "run", 2)
    assert f"no checkpoint in {tmp_path / 'run'}" in printed


@pytest.mark.complete
def test_pods_fail_together_and_go_on_together(data: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    recipe = [str(tmp_path / "dying.py") if part == "lora_finetune" else part for part in arguments("Job")]
    command = [*recipe, *sizes(data, tmp_path / "run")]
    run_together(command, command, folder=tmp_path, fails=True, changes=pods(tmp_path))
    printed = run_together(command, command, folder=tmp_path, changes=pods(tmp_path))
    check(tmp_path / "run", 2)
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-1'}" in printed


@pytest.mark.complete
def test_torchrun_on_one_machine_starts_again_what_died(data: Path, tmp_path: Path) -> None:
    command, _ = commands("torchrun")
    (tmp_path / "dying.py").write_text(DYING)
    changed = {"lora_finetune": str(tmp_path / "dying.py"), "--nproc_per_node=8": "--nproc_per_node=2"}
    assert changed.keys() <= set(command)
    command = [*(changed.get(part, part) for part in command), *sizes(data, tmp_path / "run")]
    exported = dict(text.split("=") for _, text in commands("export"))
    printed = run_together(command, folder=tmp_path, changes=exported)
    check(tmp_path / "run", 2)
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-1'}" in printed


@pytest.mark.slow
def test_torchrun_on_several_machines(data: Path, tmp_path: Path) -> None:
    """Two agents of one process each, whose rendezvous is at HOST."""
    _, command = commands("torchrun")
    endpoint = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    changed = {"--rdzv_endpoint=127.0.0.1:29500": endpoint, "--nproc_per_node=8": "--nproc_per_node=1"}
    assert changed.keys() <= set(command)
    command = [*(changed.get(part, part) for part in command), *sizes(data, tmp_path / "run")]
    run_together(command, command, folder=tmp_path)
    check(tmp_path / "run", 2)


@pytest.mark.slow
def test_accelerate_launch_on_one_machine(data: Path, tmp_path: Path) -> None:
    command, _, _ = commands("accelerate launch")
    command = [*command[:2], "--cpu", "--num_processes", "1", *command[2:]]
    run_together([*command, *sizes(data, tmp_path / "run")], folder=tmp_path)
    check(tmp_path / "run", 1)


@pytest.mark.slow
def test_accelerate_launch_on_several_machines(data: Path, tmp_path: Path) -> None:
    """Two launchers of one process each; where there is no GPU, gloo joins them."""
    _, command, _ = commands("accelerate launch")
    here = [
        *command[:2],
        "--num_processes",
        "2",
        "--main_process_port",
        free_port(),
        *command[2:],
        *sizes(data, tmp_path / "run"),
    ]
    rank = here.index("--machine_rank") + 1
    run_together(*([*here[:rank], machine, *here[rank + 1 :]] for machine in "01"), folder=tmp_path)
    check(tmp_path / "run", 2)


LIFTED = """
from tests.support.ranks import fsdp_on_cpu

lifted = fsdp_on_cpu()  # Accelerate takes FSDP for CPUs too
lifted.__enter__()
"""


@pytest.mark.complete
def test_accelerate_launch_with_fsdp2(data: Path, tmp_path: Path) -> None:
    """The first process is killed when it has written its part of the first checkpoint, and the command is given again."""
    (tmp_path / "dying.py").write_text(DYING.replace("lora_finetune", "full_finetune") + LIFTED)
    *_, command = commands("accelerate launch")
    assert "full_finetune" in command
    command = [str(tmp_path / "dying.py") if part == "full_finetune" else part for part in command]
    command = [*command[:2], "--num_processes", "2", "--main_process_port", free_port(), *command[2:]]
    command += sizes(data, tmp_path / "run")
    run_together(command, folder=tmp_path, fails=True)
    printed = run_together(command, folder=tmp_path)
    check(tmp_path / "run", 2)
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-1'}" in printed
    assert (tmp_path / "run" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()


LOCAL_RAY = """
import runpy, sys, ray
ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_local_ray(recipe: str, data: Path, folder: Path, restarts: int) -> str:
    """What the page's command prints, for two workers on the CPU and `folder` as storage."""
    (command,) = (command for command in commands("python") if "recipes/clusters/ray_train.py" in command)
    script, *options = command[1:]
    assert options[:6] == ["--workers", "8", "--gpu", "--storage", "/shared", "lora_finetune"]
    here = ["--workers", "2", "--storage", str(folder), "--restarts", str(restarts), recipe, *options[6:]]
    overrides = [override for override in sizes(data, folder) if not override.startswith("output_dir=")]  # below the storage
    return run_together(["python", "-c", LOCAL_RAY, script, *here, *overrides], folder=folder)


@pytest.mark.complete
def test_ray_train_with_two_workers(data: Path, tmp_path: Path) -> None:
    printed = on_local_ray("lora_finetune", data, tmp_path, restarts=0)
    check(tmp_path / "run", 2)
    assert "no checkpoint in run" in printed
    assert "LOAD_FAST" not in printed  # what dill reads, and datasets hashes, reached dill and no log


@pytest.mark.slow
def test_ray_train_goes_on_when_a_worker_dies(data: Path, tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    printed = on_local_ray("dying.py", data, tmp_path, restarts=1)
    check(tmp_path / "run", 2)
    assert "resuming from run/checkpoint-1" in printed

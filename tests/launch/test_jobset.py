"""The JobSet of `launch/gke.sh`, against a schema of the parts it uses (JobSet v1alpha2, Job batch/v1, Pod v1)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

jsonschema = pytest.importorskip("jsonschema")

LAUNCHER = Path(__file__).parents[2] / "launch" / "gke.sh"
COMMON = ["--name", "n", "--image", "registry/jaxcl:1", "--machines", "4", "--dry-run"]
TPU = ["--tpu", "tpu-v5-lite-podslice:4x4:4", "--slices", "2"]
GPU = ["--gpus", "8", "--gpu-type", "nvidia-h100-80gb", "--claim", "runs"]
HOSTILE = ["run", 'a "b" \\ $(HOME) $$x;é', "c: [d, #e]\ttab\nline", "%NAME%", "- x", "yes", "1.0", ""]


def record(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object of these fields, all of which must be there unless `required` names some, and of no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }


def listed(items: dict[str, Any], minimum: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": minimum}


TEXT = {"type": "string"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
COUNT = {"type": "integer", "minimum": 1}
LABEL = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
FIELD = {"oneOf": [record(fieldRef=record(fieldPath=TEXT)), record(secretKeyRef=record(name=LABEL, key=TEXT))]}
TOKEN = {"name": "JAXCL_TOKEN", "valueFrom": {"secretKeyRef": {"name": "n-token", "key": "token"}}}
CONTAINER = record(
    name=LABEL,
    image={"type": "string", "minLength": 1},
    command=listed(TEXT, 1),
    args=listed(TEXT, 1),
    env=listed({"oneOf": [record(name=TEXT, value=TEXT), record(name=TEXT, valueFrom=FIELD)]}),
    ports=listed(record(containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=record(limits={"type": "object", "additionalProperties": {"type": "string", "pattern": "^[1-9][0-9]*$"}}),
    volumeMounts=listed(record(name=LABEL, mountPath={"type": "string", "pattern": "^/"})),
)
POD = record(
    restartPolicy={"enum": ["Never", "OnFailure"]},
    terminationGracePeriodSeconds={"type": "integer", "minimum": 0},
    nodeSelector=TEXTS,
    containers=listed(CONTAINER, 1),
    volumes=listed(record(name=LABEL, persistentVolumeClaim=record(claimName=LABEL))),
)
JOB = record(
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed"]},
    backoffLimit={"type": "integer", "minimum": 0},
    template=record(spec=POD),
)
JOBSET = record(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=record(name=LABEL, annotations=TEXTS),
    spec=record(
        failurePolicy=record(maxRestarts={"type": "integer", "minimum": 0}),
        replicatedJobs=listed(record(name=LABEL, replicas=COUNT, template=record(spec=JOB)), 1),
    ),
)


def manifest(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([str(LAUNCHER), *COMMON, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("machine", [TPU, GPU])
def test_the_jobset_fits_the_schema(machine: list[str]) -> None:
    jsonschema.validate(manifest(*machine, "run", "x.yaml"), JOBSET)


def test_the_schema_can_fail() -> None:
    found = manifest(*GPU, "run", "x.yaml")
    found["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "4"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, JOBSET)


def pod_of(found: dict[str, Any]) -> dict[str, Any]:
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def expanded(argument: str) -> str:
    """What Kubernetes makes of an argument without a known `$(NAME)` in it."""
    assert "$(" not in argument.replace("$$", "")
    return argument.replace("$$", "$")


def test_every_word_arrives() -> None:
    container = pod_of(manifest(*TPU, *HOSTILE))["containers"][0]
    assert container["command"] == ["python3", "-m", "jaxcl"]
    assert [expanded(argument) for argument in container["args"]] == HOSTILE


def test_gpu_machines_are_told_where_they_meet_and_tpu_machines_are_told_by_gke() -> None:
    found = manifest(*GPU, "run", "x.yaml")
    environment = {one["name"]: one for one in pod_of(found)["containers"][0]["env"]}
    assert environment["JAX_COORDINATOR_ADDRESS"]["value"] == "n-workers-0-0.n:8476"
    assert environment["JAX_NUM_PROCESSES"]["value"] == "4"
    assert environment["JAXCL_TOKEN"] == TOKEN
    path = environment["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert pod_of(found)["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "runs"}}]
    found = manifest(*TPU, "run", "x.yaml")
    assert pod_of(found)["containers"][0]["env"] == [TOKEN]
    assert pod_of(found)["containers"][0]["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert found["spec"]["replicatedJobs"][0]["replicas"] == 2


KUBECTL = """#!/bin/sh
case "$*" in
  *apply*) cat >>"$FOLDER/applied"; echo --- >>"$FOLDER/applied" ;;
  *"get jobset"*) echo Completed ;;
esac
echo "$*" >>"$FOLDER/calls"
"""


def test_the_token_is_a_secret_and_on_no_command_line(tmp_path: Path) -> None:
    for name, text in (("kubectl", KUBECTL), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FOLDER": str(tmp_path),
        "JAXCL_TOKEN": 'a"b',
    }
    arguments = [*COMMON[:-1], *GPU, "run", "x.yaml"]
    subprocess.run([str(LAUNCHER), *arguments], env=environment, check=True, timeout=60)
    secret, jobset, _ = yaml.safe_load_all((tmp_path / "applied").read_text())
    assert (secret["kind"], secret["metadata"], secret["stringData"]) == (
        "Secret",
        {"name": "n-token"},
        {"token": 'a"b'},
    )
    assert pod_of(jobset)["containers"][0]["env"][0] == TOKEN
    assert 'a"b' not in (tmp_path / "calls").read_text()

"""check_mpijob.py MPIJOB OPENMPI_SH: the job has the shape of the MPI Operator's v2beta1.

Fields: https://github.com/kubeflow/mpi-operator, pkg/apis/kubeflow/v2beta1/types.go.
"""

import re
import sys

import yaml

JOB_FIELDS = {
    "slotsPerWorker": int,
    "runLauncherAsWorker": bool,
    "runPolicy": dict,
    "mpiReplicaSpecs": dict,
    "sshAuthMountPath": str,
    "launcherCreationPolicy": str,
    "mpiImplementation": str,
}
RUN_POLICY_FIELDS = {
    "cleanPodPolicy": str,
    "ttlSecondsAfterFinished": int,
    "activeDeadlineSeconds": int,
    "backoffLimit": int,
    "schedulingPolicy": dict,
    "suspend": bool,
    "managedBy": str,
}
REPLICA_FIELDS = {"replicas": int, "template": dict, "restartPolicy": str}


def check_fields(where, value, fields):
    for name, content in value.items():
        assert name in fields, f"{where} has no field {name}"
        kind = fields[name]
        assert type(content) is kind, f"{where}.{name} is not of type {kind.__name__}"


def container_of(name, replica):
    check_fields(name, replica, REPLICA_FIELDS)
    containers = replica["template"]["spec"]["containers"]
    assert len(containers) == 1, f"{name}: one container"
    assert containers[0]["name"] and containers[0]["image"], f"{name}: name and image"
    for entry in containers[0].get("env", []):
        assert type(entry["value"]) is str, f"{name}: {entry['name']} is not a string"
    return containers[0]


def main(job_path, settings_path):
    with open(job_path) as file:
        job = yaml.safe_load(file)
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"}
    assert job["apiVersion"] == "kubeflow.org/v2beta1" and job["kind"] == "MPIJob"
    assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    check_fields("spec", spec, JOB_FIELDS)
    check_fields("spec.runPolicy", spec["runPolicy"], RUN_POLICY_FIELDS)
    assert spec["runPolicy"]["cleanPodPolicy"] in ("None", "Running", "All")
    assert spec["launcherCreationPolicy"] in ("AtStartup", "WaitForWorkersReady")
    replicas = spec["mpiReplicaSpecs"]
    assert set(replicas) == {"Launcher", "Worker"} and replicas["Launcher"]["replicas"] == 1
    launcher = container_of("Launcher", replicas["Launcher"])
    worker = container_of("Worker", replicas["Worker"])
    assert launcher["image"] == worker["image"]

    words = launcher["command"] + launcher["args"]
    assert all(type(word) is str for word in words), "a word of the command is not a string"
    ranks = int(words[words.index("-n") + 1])
    assert ranks == spec["slotsPerWorker"] * replicas["Worker"]["replicas"], "a slot for every rank"
    labels = replicas["Worker"]["template"]["metadata"]["labels"]
    for spread in replicas["Worker"]["template"]["spec"]["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()

    environment = {entry["name"]: entry["value"] for entry in launcher["env"]}
    with open(settings_path) as file:
        settings = re.findall(r"^export (\w+)=(\S+)$", file.read(), re.MULTILINE)
    assert settings, f"{settings_path} sets nothing"
    for name, value in settings:
        assert environment.get(name) == value, f"{name} differs from {settings_path}"


main(*sys.argv[1:])

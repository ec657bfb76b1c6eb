import copy
import shlex
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline import config

ROOT = Path(__file__).parents[2]
CLUSTER_TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
CLUSTER = yaml.safe_load(CLUSTER_TEXT)
JOB = yaml.safe_load((ROOT / "kubernetes/rayjob.yaml").read_text(encoding="utf-8"))
GROUPS = {n: t for n, t in CLUSTER["available_node_types"].items() if n != "head"}


def as_ray_up_checks_it(cluster):
    """Ray's own way from the file to a checked config: its defaults, then its schema and rules."""
    validate_config(prepare_config(copy.deepcopy(cluster)))


def without(cluster, *path):
    broken = copy.deepcopy(cluster)
    parent = broken
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return broken


def with_value(cluster, value, *path):
    broken = copy.deepcopy(cluster)
    parent = broken
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return broken


def test_cluster_yaml_is_valid_for_the_pinned_ray():
    as_ray_up_checks_it(CLUSTER)


@pytest.mark.parametrize(
    "broken",
    [
        with_value(CLUSTER, 1, "spot_price"),
        with_value(CLUSTER, "twenty", "max_workers"),
        without(CLUSTER, "available_node_types", "score", "resources"),
        without(CLUSTER, "available_node_types", "decode", "node_config"),
        with_value(CLUSTER, "many", "available_node_types", "decode", "resources", "CPU"),
        with_value(CLUSTER, 0, "available_node_types", "decode", "initial_workers"),
        with_value(CLUSTER, [1], "setup_commands"),
    ],
    ids=[
        "unknown key",
        "text for a number",
        "no resources",
        "no node config",
        "text for CPUs",
        "unknown key of a node type",
        "number for a command",
    ],
)
def test_a_file_that_breaks_the_schema_is_refused(broken):
    with pytest.raises(jsonschema.ValidationError):
        as_ray_up_checks_it(broken)


@pytest.mark.parametrize(
    "broken",
    [
        with_value(CLUSTER, "master", "head_node_type"),
        with_value(CLUSTER, 21, "available_node_types", "decode", "min_workers"),
    ],
    ids=["head of no known type", "more nodes at least than at most"],
)
def test_a_file_that_contradicts_itself_is_refused(broken):
    with pytest.raises(ValueError):
        as_ray_up_checks_it(broken)


def test_every_node_type_says_what_to_launch_from_one_image():
    types = CLUSTER["available_node_types"]
    assert CLUSTER["head_node_type"] in types
    assert all(t["node_config"]["InstanceType"] for t in types.values())
    assert len({t["node_config"]["ImageId"] for t in types.values()}) == 1


def test_the_head_takes_no_work_and_is_no_spot_node():
    head = CLUSTER["available_node_types"][CLUSTER["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_groups_are_spot_nodes_that_scale_from_nothing_within_the_total():
    for group in GROUPS.values():
        assert group["min_workers"] == 0 < group["max_workers"]
        assert group["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert sum(g["max_workers"] for g in GROUPS.values()) == CLUSTER["max_workers"]


def test_one_group_has_gpus_and_the_other_has_none():
    gpus = {name: group["resources"].get("GPU", 0) for name, group in GROUPS.items()}
    assert gpus["score"] >= 1
    assert gpus["decode"] == 0


def test_every_node_gets_what_the_setup_commands_install():
    mounts = {k: v for k, v in CLUSTER["file_mounts"].items() if not v.startswith("~")}
    assert mounts
    assert all((ROOT / local).exists() for local in mounts.values())
    setup = "\n".join(CLUSTER["setup_commands"])
    assert "-r ~/topiq/requirements.lock" in setup
    assert "~/topiq/requirements.lock" in mounts
    packages = {ROOT / p for p in ("topiq_core", "pipeline", "jobs", "pyproject.toml")}
    assert packages <= {ROOT / local for local in mounts.values()}


def test_no_package_index_and_no_secret_is_named():
    lowered = CLUSTER_TEXT.lower()
    assert not [w for w in ("://", "aws_secret", "password") if w in lowered]


def test_rayjob_is_a_run_with_a_head_and_two_groups():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    assert set(groups) == {"decode", "score"}
    for group in groups.values():
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert limits_of(groups["score"])["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in limits_of(groups["decode"])


def test_rayjob_pods_all_run_one_image_of_the_pinned_ray():
    cluster = JOB["spec"]["rayClusterSpec"]
    parts = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len({p["template"]["spec"]["containers"][0]["image"] for p in parts}) == 1
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert f"\nray=={cluster['rayVersion']} " in lock


def test_rayjob_command_is_one_that_we_understand():
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.score"]
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    resolved = config.load(settings=settings)
    groups = {g["groupName"]: g for g in JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    cpus = int(groups["decode"]["rayStartParams"]["num-cpus"])
    assert resolved.decode_tasks == groups["decode"]["maxReplicas"] * cpus
    assert resolved.score_actors == groups["score"]["maxReplicas"]


def limits_of(group):
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]

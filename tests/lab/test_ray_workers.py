"""Workers on a real Ray cluster on this machine; skipped where Ray is not installed."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from tests.command import mistake
from tests.lab.test_sweep import place as place
from tests.lab.test_sweep import states

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
COMMAND = [sys.executable, "-m", "headway", "sweep", "grid.py", "--dir", "s", "--json"]
ON_RAY = [*COMMAND, "--on", "ray", "--workers", "2"]


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_absent(place):
    said = mistake("sweep", "grid.py", "--on", "ray")
    assert "--on ray needs Ray: pip install 'headway[cluster]'" in said


@needs_ray
def test_there_is_no_cluster(place):
    assert "no Ray cluster runs here" in mistake("sweep", "grid.py", "--on", "ray")


@pytest.fixture
def cluster(place, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # and not 60
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


@needs_ray
@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder(place, cluster):
    folder = os.open(place, os.O_RDONLY)  # a path that means something else in another process
    said = mistake("sweep", "grid.py", "--dir", f"/proc/self/fd/{folder}", "--on", "ray")
    os.close(folder)
    assert "does not see /proc/self/fd/" in said


@needs_ray
@pytest.mark.slow
def test_ray_dies_and_the_sweep_goes_on_without_it(place, cluster):
    with subprocess.Popen(
        ON_RAY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        while not list((place / "s" / "runs").glob("*/result.json")):
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        cluster.shutdown()
        said = first.communicate()[1].strip().splitlines()
    assert first.returncode == 1 and "the workers on Ray have ended" in said[-1]
    before = states(place / "s")
    done = subprocess.run(
        [*COMMAND, "--workers", "2"], stdout=subprocess.PIPE, text=True, check=True
    )
    value = json.loads(done.stdout.splitlines()[-1])
    assert (value["done"], value["failed"]) == (5, 0)
    after = states(place / "s")
    assert all(after[key] == state for key, state in before.items())


@needs_ray
@pytest.mark.slow
def test_ray_starts_workers(place, cluster):
    done = subprocess.run(ON_RAY, stdout=subprocess.PIPE, text=True, check=True)
    value = json.loads(done.stdout.splitlines()[-1])
    assert (value["runs"], value["done"], value["failed"]) == (5, 5, 0)
    assert not list((place / "s" / "queues").iterdir())
    assert not list((place / "s").glob("runs/*/lease"))

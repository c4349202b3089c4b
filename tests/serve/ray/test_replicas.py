"""Two replicas under load, one of them killed. Without Ray, nothing of this can run."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lorary.cli._serve_ray import failed_start
from lorary.errors import ConfigError
from lorary.serve.ray.app import Cluster, RaySettings, application
from tests.pages import ROOT


def test_settings_are_checked_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        application(None, None, None, RaySettings(replicas=0, cpus=-1, drain=float("nan")))  # type: ignore[arg-type]
    assert str(raised.value) == (
        "cannot serve with Ray:\n"
        "  - replicas: is 0, and must be at least 1\n"
        "  - cpus: is -1, and must be at least 0\n"
        "  - drain: is nan, and must be at least 0"
    )


def test_each_replica_gets_a_gpu_or_an_equal_share_of_the_cores() -> None:
    assert Cluster(True, 9.0, 0.0).settings(2, 5.0) == RaySettings(2, cpus=4, gpus=0, drain=5.0)
    assert Cluster(True, 64.0, 8.0).settings(8, 5.0) == RaySettings(8, cpus=8, gpus=1, drain=5.0)
    assert Cluster(False, 2.0, 0.0).settings(3, 5.0) == RaySettings(3, cpus=1, gpus=0, drain=5.0)
    with pytest.raises(ConfigError, match=r"--replicas: is 3, and 2 CPUs are there, one for each at least"):
        Cluster(True, 2.0, 0.0).settings(3, 5.0)
    with pytest.raises(ConfigError, match=r"--replicas: is 9, and 8 GPUs are there"):
        Cluster(False, 64.0, 8.0).settings(9, 5.0)


@pytest.mark.slow
def test_no_request_is_lost_or_wrong_when_a_replica_is_killed() -> None:
    pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'ray[serve]'")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.clients.ray_replicas"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "48 requests, 0 wrong or lost" in ran.stdout


RAISED = """The deployment failed to start 1 times in a row. Error:
Traceback (most recent call last):
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "open.py", line 41, in open_engine
    raise FileError("cannot serve these adapters:", problems)
lorary.errors.FileError: cannot serve these adapters:
  - bad: adapter_model.safetensors: the file has 36,764: it is cut short
"""


def test_what_a_replica_raised_is_shown_without_the_way_there() -> None:
    status = SimpleNamespace(deployments={"Engine": SimpleNamespace(message=RAISED)})
    assert str(failed_start(status, RuntimeError("deploying failed"))) == (
        "the replicas did not start:\n"
        "  - lorary.errors.FileError: cannot serve these adapters:\n"
        "  - bad: adapter_model.safetensors: the file has 36,764: it is cut short"
    )
    assert str(failed_start(None, RuntimeError("no answer"))) == "the replicas did not start:\n  - no answer"

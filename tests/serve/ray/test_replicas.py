"""Two replicas under load, one of them killed. Without Ray, nothing of this can run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorary.errors import ConfigError
from lorary.serve.ray.app import RaySettings, application
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


@pytest.mark.slow
def test_no_request_is_lost_or_wrong_when_a_replica_is_killed() -> None:
    pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'ray[serve]'")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "NO_PROXY": "127.0.0.1"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.clients.ray_replicas"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "48 requests, 0 wrong or lost" in ran.stdout

"""The shipped description of etcd's messages is the compiled etcd.proto."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compile-etcd-proto"


@pytest.mark.skipif(importlib.util.find_spec("grpc_tools") is None, reason="needs grpcio-tools")
def test_the_shipped_descriptor_is_up_to_date() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "--check"], check=False)

    assert result.returncode == 0

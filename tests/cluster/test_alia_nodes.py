"""ALIA-40b's configuration on a simulated cluster: more nodes are as much quicker as its longest chain allows."""

from __future__ import annotations

from pathlib import Path

from tests.cluster_table import NODES, makespans


def test_eight_outputs_on_up_to_eight_nodes(tmp_path: Path) -> None:
    rows = makespans(tmp_path)
    assert [row.nodes for row in rows] == [*NODES]
    assert min(row.efficiency for row in rows) >= 0.8
    seconds = [row.seconds for row in rows]
    assert seconds == sorted(seconds, reverse=True)
    assert rows[0].chain[1].startswith("make awq/")  # one node's calibration bounds them all

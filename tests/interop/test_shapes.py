"""The tensor table agrees with the model that transformers builds from the same config."""

from __future__ import annotations

import json

import pytest

from . import need

need("torch")
need("transformers")

from make_tiny_v4 import OFFICIAL_CONFIG, Knobs, shapes_from_table, shapes_from_transformers  # noqa: E402

pytestmark = pytest.mark.interop


def test_official_config():
    config = json.loads(OFFICIAL_CONFIG.read_text())
    assert shapes_from_transformers(config) == shapes_from_table(config)


@pytest.mark.parametrize(
    "knobs",
    [
        Knobs(),
        Knobs(variant="flash-base", mtp_layers=2),
        Knobs(variant="pro-like", experts=13, heads=16, o_groups=4, hash_layers=1),
        Knobs(moe=96, hidden=384, head_dim=128, layers=7, mtp_layers=0),
    ],
    ids=str,
)
def test_tiny_configs(knobs):
    config = knobs.config(500)
    assert shapes_from_transformers(config) == shapes_from_table(config)

"""What `flash_attn: fa2` does under the shared prefix is said at the start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from helpers.recipes import photo_rows, tokenized, write_rows
from llava_orpo.training import checks


@pytest.mark.parametrize("keys, lines", [({}, 1), ({"shared_prefix": False}, 0), ({"flash_attn": "sdpa"}, 0)])
def test_flash_attention_s_part_is_said_once(tmp_path, monkeypatch, keys, lines):
    said: list[str] = []
    quiet = SimpleNamespace(info_rank0=said.append, warning_rank0=lambda line: None)
    monkeypatch.setattr(checks, "logger", quiet)
    write_rows(tmp_path, photo_rows(1, 2))
    tokenized(tmp_path, {"flash_attn": "fa2", "finetuning_type": "lora", **keys})
    assert len([line for line in said if line.startswith("flash_attn: fa2 serves the vision tower alone")]) == lines

"""The script that prunes, saves and loads every type: what it says of one that works, and of one that does not exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def test_a_type_is_pruned_saved_and_loaded_again(script: Callable[[str], Any]) -> None:
    end_to_end = script("end_to_end")
    good = {"type": "llama", **{method: end_to_end.examine("llama", "one-shot", 0.1) for method in end_to_end.METHODS}}
    assert good["one-shot"]["shape"] == "uniform"
    assert good["one-shot"]["difference"] <= 1e-4
    bad = {
        "type": "no-such",
        **{method: end_to_end.examine("no-such", "one-shot", 0.1) for method in end_to_end.METHODS},
    }
    assert "KeyError" in bad["one-shot"]["failed"]
    assert end_to_end.summary([good, bad]).splitlines()[0] == "one-shot: 1 uniform, 1 failed of 2"

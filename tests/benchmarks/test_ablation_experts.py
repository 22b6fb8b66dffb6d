import json
from pathlib import Path

import pytest
import torch

from benchmarks import ablation_experts
from benchmarks.ablation_experts import Data, build, evaluate, read_log, table


@pytest.fixture
def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation_experts, "DRAWN", 3)
    monkeypatch.setattr(ablation_experts, "DESCRIBED", 2)


def test_both_arms_start_as_one_function(tiny_llm: Path, tiny_codes: Path) -> None:
    found = []
    for arm in ("separate", "shared"):
        transformer, tokenizer = build(arm, str(tiny_llm))
        found.append(evaluate(transformer, Data([tiny_codes], tokenizer)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert all(value > 0 for value in found[0].values())


def test_separate_experts_forget_nothing_and_shared_weights_do(
    tiny_llm: Path, tiny_codes: Path, tmp_path: Path, shrink: None
) -> None:
    arguments = ["--language", str(tiny_llm), "--shards", str(tiny_codes), "--out", str(tmp_path)]
    ablation_experts.main([*arguments, "--rates", "1e-2", "--steps", "3", "--every", "2"])
    for arm in ("separate", "shared"):
        lines = read_log(tmp_path / f"{arm}-0.01.jsonl")
        assert [line["step"] for line in lines[1:]] == [0, 1, 2, 3]
        assert [line["step"] for line in lines[1:] if "held out" in line] == [0, 2, 3]
        first, last = lines[1]["held out"], lines[-1]["held out"]
        assert last["drawing loss"] < first["drawing loss"]
        for language in ablation_experts.TEXTS:
            assert (last[f"text {language} loss"] == first[f"text {language} loss"]) == (arm == "separate")
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    assert len((tmp_path / "ablation.md").read_text(encoding="utf-8").splitlines()) == 4


def test_a_whole_run_is_kept_and_a_torn_one_is_repeated(
    tiny_llm: Path, tiny_codes: Path, tmp_path: Path, shrink: None
) -> None:
    arguments = ["--language", str(tiny_llm), "--shards", str(tiny_codes), "--out", str(tmp_path), "--arm", "shared"]
    path = tmp_path / "shared-0.001.jsonl"
    ablation_experts.main([*arguments, "--rates", "1e-3", "--steps", "2"])
    whole = path.read_text(encoding="utf-8")
    ablation_experts.main([*arguments, "--rates", "1e-3", "--steps", "2"])
    assert path.read_text(encoding="utf-8") == whole
    path.write_text(whole[: len(whole) // 2], encoding="utf-8")
    ablation_experts.main([*arguments, "--rates", "1e-3", "--steps", "2"])
    again = [line | {"seconds": 0} for line in read_log(path)]
    assert again == [json.loads(line) | {"seconds": 0} for line in whole.splitlines()]
    with pytest.raises(SystemExit, match="other settings"):
        ablation_experts.main([*arguments, "--rates", "1e-3", "--steps", "4"])


def test_samples_are_those_of_the_step_whatever_came_before(tiny_llm: Path, tiny_codes: Path) -> None:
    _, tokenizer = build("separate", str(tiny_llm))
    one, other = Data([tiny_codes], tokenizer), Data([tiny_codes], tokenizer)
    one.batch(0)
    for first, second in zip(one.batch(1), other.batch(1), strict=True):
        assert first.caption == second.caption
        assert torch.equal(first.codes_RC, second.codes_RC)


def test_the_table_has_a_row_for_each_run() -> None:
    held_out = dict.fromkeys(ablation_experts.PANELS, 1.0)
    run = [
        {"arm": "shared", "rate": 1e-4, "steps": 1, "trained": 2e6},
        {"step": 0, "held out": held_out},
        {"step": 1, "seconds": 0.5, "held out": held_out},
    ]
    rows = table([run, run]).splitlines()
    assert rows[2:] == [f"| shared | 0.0001 | 1 | 2.0 | 0.50 | {' | '.join(['1.000 → 1.000'] * 6)} |"] * 2

"""Several processes give what one gives. A group of one process runs here, groups of two under torchrun."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mars.adapter import read_adapter
from mars.checkpoint import load_model
from mars.errors import CheckpointError, ConfigError, TrainingError
from mars.model.transformer import MarsTransformer, is_language, read_prefixes
from mars.sequence.interleaved import ImagePart, Part, TextPart, interleaved
from mars.sequence.layout import drawn_image, read_image, text_segment
from mars.training.cross_entropy import token_loss
from mars.training.distributed import ShardedProcess, join
from mars.training.interleaved import interleaved_losses
from mars.training.losses import captioning_loss
from mars.training.upscale import upscale_loss
from tests.conftest import toml
from tests.training.conftest import Stage, start, steps

ADAMW = {"name": "adamw", "learning_rate": 3e-3, "warmup": 2}
MUON = {"name": "muon", "learning_rate": 3e-3, "matrix_rate": 0.03, "warmup": 2, "average": 0.9}
SEMVIE = {"share_norms": False, "duplicate_output": False, "visual_layers": [0, 2]}


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ShardedProcess]:
    """A group of this process alone: everything is sharded, into one part."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/.store", rank=0, world_size=1)
    yield ShardedProcess(torch.device("cpu"))
    dist.destroy_process_group()


def close(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> bool:
    """Whether losses and norms agree; how much of a batch is padding is each process's own."""

    def figures(values: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in values.items() if not name.endswith("padding")}

    return all(
        figures(one) == pytest.approx(figures(other), rel=1e-4, abs=1e-6)
        for one, other in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": ADAMW},
        {"optimizer": MUON, "accumulate": 2},
        {"optimizer": ADAMW, "recompute": True},
    ],
    ids=["adamw", "muon-in-parts", "recompute"],
)
@pytest.mark.parametrize("semvie", [None, SEMVIE], ids=["pocket", "shared-output"])
def test_sharding_changes_no_loss(
    stage: Stage, process: ShardedProcess, changes: dict[str, Any], semvie: dict[str, Any] | None
) -> None:
    table = stage(**changes)
    if semvie:
        table["model"]["semvie"] = semvie
    wanted = steps(start(table), 8)
    assert len({frozenset(losses) for losses in wanted}) == 2  # both tasks occurred
    trainer = start(table, process)
    assert close(steps(trainer, 8), wanted)


def test_sharding_frozen_weights_of_bf16_changes_little(stage: Stage, process: ShardedProcess) -> None:
    table = stage(precision="bf16", optimizer=ADAMW)
    wanted, found = steps(start(table), 6), steps(start(table, process), 6)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_an_adapter_that_is_trained_sharded_is_the_same(
    stage: Stage, process: ShardedProcess, tiny_model: Path, tmp_path: Path
) -> None:
    table = stage(stage="align", lora={"rank": 2}, optimizer=ADAMW, steps=4)
    table["model"] = {"start_from": str(tiny_model)}
    wanted, found = start(table), start(table | {"out": str(tmp_path / "sharded")}, process)
    assert close(steps(found, 3), steps(wanted, 3))
    wanted.train()
    found.train()
    one, other = (read_adapter(trainer.config.out / "adapter") for trainer in (wanted, found))
    assert one.base_digest == other.base_digest
    for name, matrix in one.tensors().items():
        assert torch.allclose(other.tensors()[name], matrix, atol=1e-5)


CODES = torch.arange(24).view(4, 2, 3)


def caption(transformer: MarsTransformer) -> Tensor:
    """Nothing but keys and values leads back to the last visual expert."""
    captions = [[70, 71, 72], [80], [3, 4, 5, 6], [2]]
    return captioning_loss(transformer, CODES, captions, hints=[[9]] * 4, end=2)


def edit(transformer: MarsTransformer) -> Tensor:
    """Image, text, image: both experts run with a graph, one of them twice."""
    cache = transformer.new_cache()
    transformer(read_image(CODES, transformer.vocabulary), cache)
    transformer(text_segment([[1, 5, 6]] * 4), cache)
    segment = drawn_image(CODES.flip(0), transformer.vocabulary)
    hidden = transformer(segment, cache)
    assert segment.targets is not None
    targets = segment.targets - transformer.vocabulary.first_code
    return token_loss(hidden.flatten(0, 1), transformer.visual_table, targets.flatten()).loss


def upscale(transformer: MarsTransformer) -> Tensor:
    """Text without a graph, then two images."""
    prefixes = read_prefixes(transformer, [[1, 5], [1], [1, 2, 3], [1]])
    return upscale_loss(transformer, CODES, torch.arange(96).view(4, 4, 6) % 64, prefixes, side=2)


def story(transformer: MarsTransformer) -> Tensor:
    """Text, image, text that predicts an image, image: the frozen head is passed, and its logits made again."""
    image = ImagePart(codes_RC=CODES[0])
    parts: list[Part] = [TextPart(ids=(1, 5)), image, TextPart(ids=(6, 7)), image]
    losses = interleaved_losses(transformer, interleaved([parts] * 2, transformer.vocabulary, end=2))
    return losses["total"] + losses["begin_image_loss"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("loss", [caption, edit, upscale, story])
def test_gradients_come_back_through_every_layout(
    stage: Stage, process: ShardedProcess, loss: Callable[[MarsTransformer], Tensor], recompute: bool
) -> None:
    table = stage(recompute=recompute)
    table["model"]["semvie"] = SEMVIE | {"low_input": True}
    plain, sharded = start(table), start(table, process)
    loss(plain.transformer).backward()
    with process.synchronizing(sharded.transformer, last=True):
        loss(sharded.transformer).backward()
    wanted = {name: weight.grad for name, weight in plain.weights.items() if weight.grad is not None}
    found = process.whole({name: weight.grad for name, weight in sharded.weights.items() if weight.grad is not None})
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_frozen_weights_have_no_gradients_and_no_state(stage: Stage, process: ShardedProcess) -> None:
    trainer = start(stage(optimizer=MUON), process)
    before = process.whole(trainer.transformer.language_tensors())
    steps(trainer, 4)
    after = process.whole(trainer.transformer.language_tensors())
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = {id(weight) for weight in trainer.weights.values()}
    assert {id(weight) for optimizer in trainer.optimizers for weight in optimizer.state} == trained
    for name, weight in trainer.transformer.named_parameters():
        assert isinstance(weight, DTensor) or (is_language(name) and name.endswith("norm.weight"))
        assert (weight.grad is None) or not is_language(name)
    held = (value for optimizer in trainer.optimizers for one in optimizer.state.values() for value in one.values())
    assert all(isinstance(value, DTensor) or value.dim() == 0 for value in held)


@pytest.mark.parametrize("sharded_first", [True, False])
def test_a_sharded_run_and_a_whole_one_continue_each_other(
    stage: Stage, tmp_path: Path, process: ShardedProcess, sharded_first: bool
) -> None:
    wanted = start(stage(optimizer=MUON, out=str(tmp_path / "whole")))
    losses = steps(wanted, 8)
    order = (process, None) if sharded_first else (None, process)
    table = stage(optimizer=MUON)
    first = start(table, order[0])
    assert close(steps(first, 4), losses[:4])
    first.save()
    second = start(table, order[1])
    assert second.step == 4
    assert close(steps(second, 4), losses[4:])
    found = process.whole(second.weights)
    assert all(torch.allclose(found[name], weight, atol=1e-4) for name, weight in wanted.weights.items())


def test_a_held_out_loss_between_steps_changes_nothing(stage: Stage, process: ShardedProcess) -> None:
    table = stage(optimizer=MUON)
    table["data"]["held_out"] = ["concept", "picture"]
    wanted, trainer = start(table), start(table, process)
    losses = steps(wanted, 3), steps(trainer, 3)
    scores = wanted.held_out_loss(), trainer.held_out_loss()
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert close([*losses[1], *steps(trainer, 3)], [*losses[0], *steps(wanted, 3)])


def test_weights_that_do_not_fit_are_refused(stage: Stage, process: ShardedProcess) -> None:
    trainer = start(stage(), process)
    whole = process.whole(trainer.weights)
    name = "visual_embedding.weight"
    for wrong, message in ((whole[name][:-1], "must be"), (whole[name] * torch.nan, "NaN")):
        with pytest.raises(CheckpointError, match=message):
            process.load(whole | {name: wrong}, into=trainer.weights, where="there")
    process.load(whole, into=trainer.weights, where="there")
    assert torch.equal(process.whole(trainer.weights)[name], whole[name])


def test_an_error_of_the_main_process_is_everyones(process: ShardedProcess, tmp_path: Path) -> None:
    def fail() -> None:
        raise TrainingError("no")

    with pytest.raises(TrainingError, match="no"):
        process.decide(fail)
    with pytest.raises(TrainingError), process.folder(tmp_path / "whole"):
        fail()
    assert list(tmp_path.glob("*whole*")) == []
    with process.folder(tmp_path / "whole") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "whole").exists()
    assert (tmp_path / "whole" / "file").is_file()


def test_a_process_without_others_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(torch.device("cpu")) as process:
        assert (process.rank, process.world, process.is_main) == (0, 1, True)
    assert not dist.is_initialized()


def test_half_an_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    message = "LOCAL_RANK must be as well; start several processes by torchrun"
    with pytest.raises(ConfigError, match=message), join(torch.device("cpu")):
        pass


SCRIPT = """
import json, sys, torch
from torch.distributed.tensor import DTensor
from mars.config import from_dict
from mars.training.distributed import join
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer

def held(tensors):
    local = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
    return sum(one.numel() * one.element_size() for one in local)

table, count = json.loads(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
with join(torch.device("cpu")) as process:
    trainer = Trainer(from_dict(StageConfig, table), process=process)
    step = trainer.step
    losses = [trainer.train_step() for _ in range(count)]
    transformer = trainer.transformer
    states = [state for one in trainer.optimizers for slots in one.state.values() for state in slots.values()]
    told = {
        "rank": process.rank, "step": step, "losses": losses,
        "language": held(transformer.language_tensors().values()),
        "visual": held(transformer.visual_tensors().values()),
        "states": held(states),
        "gradients": held(one.grad for one in transformer.parameters() if one.grad is not None),
        "frozen_gradients": held(one.grad for one in transformer.language_tensors().values() if one.grad is not None),
    }
    trainer.save()
    print(json.dumps(told) + "\\n", end="", flush=True)
"""


@contextmanager
def torchrun(*arguments: object, processes: int = 2) -> Iterator[subprocess.Popen[str]]:
    """Processes that torchrun starts; none outlives the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            yield started
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)  # processes that wait for each other


def output(*arguments: object, processes: int = 2) -> str:
    """What processes that end well print."""
    with torchrun(*arguments, processes=processes) as started:
        out, err = started.communicate(timeout=300)
        assert started.returncode == 0, err
    return out


def run(tmp_path: Path, table: dict[str, Any], count: int, *, processes: int) -> list[dict[str, Any]]:
    """What each process of a training tells."""
    (tmp_path / "script.py").write_text(SCRIPT, "utf-8")
    printed = output(tmp_path / "script.py", json.dumps(table), count, processes=processes)
    return sorted(map(json.loads, printed.splitlines()), key=lambda one: int(one["rank"]))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_losses_of_one_and_hold_half(
    stage: Stage, tmp_path: Path, optimizer: dict[str, Any], accumulate: int
) -> None:
    table = stage(optimizer=optimizer, accumulate=accumulate, batch_size=7)
    table["data"]["held_out"] = ["concept", "picture"]
    (one,) = run(tmp_path, table | {"out": str(tmp_path / "one")}, 12, processes=1)
    two = run(tmp_path, table | {"out": str(tmp_path / "two")}, 12, processes=2)
    tasks = {name.split("/")[0] for losses in one["losses"] for name in losses if "/" in name}
    assert tasks == {"text_to_image", "captioning"}
    for process in two:
        assert close(process["losses"], one["losses"])
        assert process["frozen_gradients"] == 0
        for name in ("language", "visual", "states", "gradients"):
            assert process[name] == pytest.approx(one[name] / 2, rel=0.05), name
    score = [
        json.loads((tmp_path / name / "last" / "state.json").read_text("utf-8"))["progress"]["score"]
        for name in ("one", "two")
    ]
    assert score[0] == pytest.approx(score[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (2, 3)])
def test_a_checkpoint_is_continued_by_another_number_of_processes(
    stage: Stage, tmp_path: Path, first: int, second: int
) -> None:
    table = stage(optimizer=MUON)
    (whole,) = run(tmp_path, table | {"out": str(tmp_path / "whole")}, 12, processes=1)
    begun = run(tmp_path, table, 6, processes=first)
    ended = run(tmp_path, table, 6, processes=second)
    assert {process["step"] for process in ended} == {6}
    assert close([*begun[0]["losses"], *ended[0]["losses"]], whole["losses"])
    found, wanted = (load_model(tmp_path / name / "last").transformer.visual_tensors() for name in ("run", "whole"))
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)


def log_of(folder: Path) -> list[dict[str, float]]:
    """Losses and norms that a run logged."""
    lines = (folder / "log.jsonl").read_text("utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name == "step" or "/" in name or "norm" in name}
        for line in lines
    ]


def write_config(path: Path, table: dict[str, Any]) -> Path:
    """A configuration file."""
    path.write_text(toml(table), "utf-8")
    return path


@pytest.mark.slow
def test_the_command_under_torchrun_leaves_what_one_process_leaves(stage: Stage, tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        table = stage(out=str(tmp_path / name), steps=10, report_every=2, save_every=4, sample_every=5, keep=5)
        output("-m", "mars", "train", write_config(tmp_path / f"{name}.toml", table), processes=processes)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [line["step"] for line in two] == [2, 4, 6, 8, 10]
    assert close(two, one)
    for folder in ("checkpoints", "model", "samples"):
        names = [sorted(path.name for path in (tmp_path / run / folder).iterdir()) for run in ("one", "two")]
        assert names[0] == names[1]
    found, wanted = (load_model(tmp_path / name / "model").transformer.visual_tensors() for name in ("two", "one"))
    assert all(torch.allclose(found[name], wanted[name], atol=2e-3) for name in wanted)  # fp16


SPOILED = """
import json, sys, torch
from mars.config import from_dict
from mars.training.distributed import join
from mars.training.stages import StageConfig
from mars.training.tasks import TextToImage
from mars.training.trainer import Trainer

learned = TextToImage.losses
with join(torch.device("cpu")) as process:
    trainer = Trainer(from_dict(StageConfig, json.loads(sys.argv[1])), process=process)

    def losses(task, batch):
        found = learned(task, batch)
        return found | {"total": found["total"] * (torch.nan if process.rank and trainer.step else 1)}

    TextToImage.losses = losses
    trainer.train()
"""


@pytest.mark.slow
def test_a_run_that_one_process_spoils_ends_with_the_batches_of_all(stage: Stage, tmp_path: Path) -> None:
    table = stage(tasks={"text_to_image": 1.0}, max_skipped=2)
    (tmp_path / "script.py").write_text(SPOILED, "utf-8")
    with torchrun(tmp_path / "script.py", json.dumps(table)) as started:
        _, err = started.communicate(timeout=300)
    assert started.returncode
    assert f"2 steps in a row; the batch is in {tmp_path / 'run' / 'skipped-step-000002-rank-*.json'}" in err
    parts = [json.loads(path.read_text("utf-8")) for path in sorted((tmp_path / "run").glob("skipped-*"))]
    values = [part["values"] for part in parts]
    assert [math.isfinite(one["text_to_image/total"]) for one in values] == [True, False]  # whose it was
    assert not any(math.isfinite(one["gradient_norm"]) for one in values)
    whole = [one.codes.tolist() for one in start(table | {"out": str(tmp_path / "alone")}).mix.draw(2)[1]]
    assert [[one["codes"] for one in part["examples"]] for part in parts] == [whole[0::2], whole[1::2]]


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_a_step_that_is_saved(stage: Stage, tmp_path: Path) -> None:
    table = stage(steps=1_000_000, report_every=1, optimizer=ADAMW | {"decay": 1})
    log = tmp_path / "run" / "log.jsonl"
    with torchrun("-m", "mars", "train", write_config(tmp_path / "long.toml", table)) as started:
        while started.poll() is None and not (log.is_file() and len(log.read_text("utf-8").splitlines()) > 3):
            time.sleep(0.2)
        started.terminate()
        _, err = started.communicate(timeout=120)
    assert err.count("this step is finished and saved") == 1
    resumed = start(table)
    assert resumed.step >= 4
    assert f"stopped at step {resumed.step}, which is saved" in err

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mars.checkpoint import codes_digest, load_image_tokenizer, load_model
from mars.config import from_dict
from mars.data.documents import CodedImage, Document, Text, write_documents
from mars.errors import CheckpointError, ConfigError, DataError
from mars.sequence.interleaved import ImagePart, TextPart
from mars.training.document_tasks import Page
from mars.training.stages import StageConfig
from mars.training.trainer import Trainer

Open = Callable[..., Trainer]


def document(index: int, *parts: Text | CodedImage, split: str = "train") -> Document:
    return Document(key=f"d{index}", split=split, source="t", licence="CC0", parts=parts)


def image(index: int, role: Any = "drawn", grid: tuple[int, int] = (2, 3)) -> CodedImage:
    codes = np.random.default_rng(index).integers(0, 64, grid, dtype=np.int32)
    return CodedImage(codes=codes, role=role)


def edit(index: int, split: str = "train") -> Document:
    return document(index, image(index, "source"), Text(text=f"make it {index}", learned=False), image(99), split=split)


def story(index: int, split: str = "train") -> Document:
    texts = (Text(text="once"), Text(text=f"then {index}"))
    return document(index, texts[0], image(index), texts[1], image(index + 1, grid=(2, 2 + index % 2)), split=split)


@pytest.fixture
def open_run(stage: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path) -> Open:
    """A trainer of tasks over 12 edits and 12 stories, some held out."""

    def opened(tasks: dict[str, float], *, documents: list[Document] | None = None, **changes: Any) -> Trainer:
        digest = codes_digest(load_image_tokenizer(tiny_model)[0])
        found = [make(index) for make in (edit, story) for index in range(12)]
        found += [make(index, split="concept") for make in (edit, story) for index in range(12, 15)]
        write_documents(tmp_path / "d.parquet", found if documents is None else documents, tokenizer=digest)
        table = stage(tasks=tasks, steps=6, batch_size=4)
        table["data"] |= {"documents": [str(tmp_path / "d.parquet")], "held_out": ["concept"]}
        return Trainer(from_dict(StageConfig, table | changes))

    return opened


@pytest.mark.parametrize("task", ["editing", "interleaved"])
def test_training_lowers_the_loss_on_what_it_sees(open_run: Open, task: str) -> None:
    trainer = open_run({task: 1.0}, steps=60, guidance_dropout=0.0)
    first = [trainer.train_step()[f"{task}/loss"] for _ in range(4)]
    for _ in range(40):
        trainer.train_step()
    assert sum(trainer.train_step()[f"{task}/loss"] for _ in range(4)) < 0.8 * sum(first)


def test_tasks_of_documents_mix_with_the_others_and_a_run_can_be_continued(open_run: Open) -> None:
    tasks = {"editing": 1.0, "interleaved": 1.0, "text_to_image": 1.0, "captioning": 1.0}
    whole = open_run(tasks, steps=12)
    losses = [whole.train_step() for _ in range(12)]
    assert {name.split("/")[0] for values in losses for name in values if "/" in name} == tasks.keys()
    first = open_run(tasks, steps=12)
    for _ in range(5):
        first.train_step()
    first.save()
    second = open_run(tasks, steps=12)
    assert [second.train_step() for _ in range(7)] == losses[5:]
    assert all(torch.equal(weight, second.weights[name]) for name, weight in whole.weights.items())


@pytest.mark.parametrize("task", ["editing", "interleaved"])
def test_documents_alone_need_no_shards(open_run: Open, tmp_path: Path, task: str) -> None:
    run = open_run({task: 1.0}, data={"documents": [str(tmp_path / "d.parquet")]}, save_every=3)
    assert run.info.grids == (((2, 3),) if task == "editing" else ((2, 2), (2, 3)))
    assert run.train()
    load_model(tmp_path / "run" / "model")
    open_run({task: 1.0}, data={"documents": [str(tmp_path / "d.parquet")]}, steps=7)  # and continues
    with pytest.raises(ConfigError, match="data.documents must stay 15 documents, sha256:.*, got 1 documents, sha256:"):
        open_run(
            {task: 1.0},
            documents=[edit(0) if task == "editing" else story(0)],
            data={"documents": [str(tmp_path / "d.parquet")]},
        )


def test_each_task_takes_the_documents_that_are_its_own(open_run: Open) -> None:
    trainer = open_run({"editing": 1.0, "interleaved": 1.0}, guidance_dropout=0.0)
    bos = trainer.mix.context.text_tokenizer.bos_id
    encode = trainer.mix.context.encode
    for number in range(6):
        for name, task in trainer.mix.tasks.items():
            for page in task.draw(number, torch.Generator().manual_seed(0)):
                first, second = page.parts[0], page.parts[1]
                if name == "editing":
                    assert isinstance(first, ImagePart)
                    assert first.role == "source"
                    assert isinstance(second, TextPart)
                    assert list(second.ids)[: len(encode("make it "))] == encode("make it ")
                else:
                    assert isinstance(first, TextPart)
                    assert list(first.ids) == [bos, *encode("once")]


def test_instructions_are_dropped_as_often_as_asked(open_run: Open) -> None:
    task = open_run({"editing": 1.0}, guidance_dropout=0.5).mix.tasks["editing"]
    pages = [page for number in range(100) for page in task.draw(number, torch.Generator().manual_seed(number))]
    empty = [page for page in pages if isinstance(page.parts[1], TextPart) and not page.parts[1].ids]
    assert 0.4 < len(empty) / len(pages) < 0.6


def test_a_batch_of_several_layouts_is_the_mean_over_targets(open_run: Open) -> None:
    task = open_run({"interleaved": 1.0}).mix.tasks["interleaved"]
    pages = [page for number in range(8) for page in task.draw(number, torch.Generator())]
    assert len({len(page.parts) for page in pages} | {page.parts[3].codes_RC.shape for page in pages}) == 3
    wanted = sum(task.targets([page]) * float(task.losses([page])["loss"]) for page in pages) / task.targets(pages)
    assert float(task.losses(pages)["loss"]) == pytest.approx(wanted, rel=1e-5)
    assert task.flops(pages) == sum(task.flops([page]) for page in pages)


def test_held_out_documents_are_measured(open_run: Open) -> None:
    trainer = open_run({"editing": 1.0})
    assert len(trainer.mix.main.held_out()) == 3
    assert isinstance(trainer.mix.main.held_out()[0], Page)
    assert trainer.held_out_loss() is not None


def test_documents_that_cannot_be_learned_are_one_line(open_run: Open, stage: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold no document of the split train for tasks.editing"):
        open_run({"editing": 1.0}, documents=[story(1), edit(2, split="concept")])
    with pytest.raises(ConfigError, match="max_grid must be at least 9"):
        open_run({"interleaved": 1.0}, documents=[document(0, Text(text="a"), image(0, grid=(9, 1)))])
    table = stage(tasks={"editing": 1.0})
    write_documents(tmp_path / "other.parquet", [edit(1)], tokenizer="sha256:other")
    table["data"] |= {"documents": [str(tmp_path / "other.parquet")]}
    with pytest.raises(CheckpointError, match="hold codes of image tokenizer sha256:other"):
        Trainer(from_dict(StageConfig, table))

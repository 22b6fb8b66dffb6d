import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from mars.config import from_dict
from mars.errors import ConfigError
from mars.training.process import Process
from mars.training.setup import open_stage
from mars.training.stages import StageConfig
from mars.training.task import TaskContext
from mars.training.tasks import CYCLE, Captioning, Drawing, Reading, TaskMix, TextToImage

Stage = Callable[..., dict[str, Any]]


class OneOf(Process):
    """One of several processes, as far as data goes."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.world = rank, world


@pytest.fixture
def mix(stage: Stage) -> Callable[..., TaskMix]:
    """The tasks of the tiny stage, changed; `process` may be one of several."""

    def build(*, process: Process | None = None, **changes: Any) -> TaskMix:
        config = from_dict(StageConfig, stage(**changes))
        opened = open_stage(config)
        context = TaskContext(
            config=config,
            process=process or Process(torch.device("cpu")),
            transformer=opened.transformer,
            text_tokenizer=opened.text_tokenizer,
            loaders=opened.loaders,
        )
        return TaskMix(context)

    return build


SHARES = {"text_to_image": 0.6, "captioning": 0.25, "top_rows": 0.15}


def test_every_thousand_steps_have_each_task_exactly_as_often_as_asked(mix: Callable[..., TaskMix]) -> None:
    tasks = mix(tasks=SHARES, top_rows=1)
    for cycle in range(2):
        drawn = Counter(tasks.draw(step)[0].name for step in range(cycle * CYCLE, (cycle + 1) * CYCLE))
        assert drawn == {name: share * CYCLE for name, share in SHARES.items()}
    first = [tasks.draw(step)[0].name for step in range(40)]
    assert len(set(first)) == 3  # mixed, not one after the other
    assert first != [tasks.draw(step)[0].name for step in range(CYCLE, CYCLE + 40)]


def test_a_rare_task_is_learned_all_the_same(mix: Callable[..., TaskMix]) -> None:
    tasks = mix(tasks={"text_to_image": 1.0, "captioning": 1e-5})
    assert Counter(tasks.draw(step)[0].name for step in range(CYCLE))["captioning"] == 1


def test_what_a_step_learns_does_not_depend_on_what_was_drawn_before(mix: Callable[..., TaskMix]) -> None:
    one, other = mix(tasks=SHARES), mix(tasks=SHARES)
    wanted = [one.draw(step) for step in range(30)]
    for step in torch.randperm(30).tolist():
        task, batch = other.draw(step)
        assert task.name == wanted[step][0].name
        for found, right in zip(batch, wanted[step][1], strict=True):
            assert torch.equal(found.codes, right.codes)
            assert vars(found).keys() == vars(right).keys()
            assert all(vars(found)[name] == vars(right)[name] for name in vars(found) if name != "codes")


def pictures(tasks: TaskMix, batch: Sequence[Drawing | Reading]) -> list[int]:
    """The numbers of the pictures, which all of their captions name."""
    texts = [
        tasks.context.text_tokenizer.decode(one.prompt if isinstance(one, Drawing) else one.caption) for one in batch
    ]
    return [int(re.findall(r"\d+", text)[0]) for text in texts]


def test_each_task_sees_every_picture_once_per_epoch_of_its_own(mix: Callable[..., TaskMix]) -> None:
    tasks = mix(tasks={"text_to_image": 0.7, "top_rows": 0.3}, top_rows=1, guidance_dropout=0.0)
    seen: dict[str, list[int]] = {"text_to_image": [], "top_rows": []}
    for step in range(40):
        task, batch = tasks.draw(step)
        seen[task.name] += pictures(tasks, batch)
    for numbers in seen.values():
        assert len(numbers) >= 48
        assert sorted(numbers[:24]) == sorted(numbers[24:48]) == list(range(24))
        assert numbers[:24] != numbers[24:48]


def test_what_is_written_of_pictures_can_be_other_captions_than_those_that_are_drawn(
    mix: Callable[..., TaskMix], stage: Stage
) -> None:
    data = stage()["data"] | {"kinds": {"name": 1.0}, "described": {"tags": 1.0}}
    tasks = mix(tasks=SHARES, top_rows=1, data=data, guidance_dropout=0.0)
    decode = tasks.context.text_tokenizer.decode
    for step in range(24):
        _, batch = tasks.draw(step)
        for one in batch:
            if isinstance(one, Reading):
                assert re.fullmatch(r"(图 )?t\d+", decode(one.caption))
            else:
                assert re.fullmatch(r"(图 )?\d+", decode(one.prompt[1:]))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batch_of_one(mix: Callable[..., TaskMix], world: int) -> None:
    alone = mix(tasks=SHARES)
    several = [mix(tasks=SHARES, process=OneOf(rank, world)) for rank in range(world)]
    for step in range(12):
        task, whole = alone.draw(step)
        for rank, tasks in enumerate(several):
            found, part = tasks.draw(step)
            assert found.name == task.name
            assert [vars(one)["codes"].tolist() for one in part] == [one.codes.tolist() for one in whole[rank::world]]
            assert [getattr(one, "prompt", None) for one in part] == [
                getattr(one, "prompt", None) for one in whole[rank::world]
            ]


def test_captions_are_emptied_as_often_as_asked_when_drawing_and_never_when_writing(
    mix: Callable[..., TaskMix],
) -> None:
    tasks = mix(tasks={"text_to_image": 0.5, "captioning": 0.5}, guidance_dropout=0.15, steps=10_000)
    empty = total = 0
    for step in range(600):
        task, batch = tasks.draw(step)
        if isinstance(task, Captioning):
            assert all(one.caption and one.hint for one in batch)
        else:
            assert all(one.prompt[0] == tasks.context.text_tokenizer.bos_id for one in batch)
            empty, total = empty + sum(len(one.prompt) == 1 for one in batch), total + len(batch)
    assert empty / total == pytest.approx(0.15, abs=0.03)
    assert all(len(one.prompt) > 1 for step in range(20) for one in drawings(mix(guidance_dropout=0.0), step))


def drawings(tasks: TaskMix, step: int) -> list[Drawing]:
    return [one for one in tasks.draw(step)[1] if isinstance(one, Drawing)]


def test_top_rows_are_drawn_of_as_many_more_pictures(mix: Callable[..., TaskMix]) -> None:
    tasks = mix(tasks={"top_rows": 1.0}, top_rows=1)
    _, batch = tasks.draw(0)
    rows, columns = tasks.context.codes.drawn.grids[0]
    assert (len(batch), {tuple(one.codes.shape) for one in batch}) == (6 * rows, {(1, columns)})
    assert tasks.main.targets(batch) == 6 * rows * columns


def test_prompts_ahead_are_those_of_the_next_steps(mix: Callable[..., TaskMix]) -> None:
    tasks = mix(tasks=SHARES, steps=30)
    wanted = [one.prompt for step in range(9, 30) for one in drawings(tasks, step)]
    tasks.draw(8)
    assert list(tasks.prompts_ahead()) == wanted
    assert list(tasks.prompts_ahead()) == wanted  # looking ahead moves nothing


def test_losses_of_a_task_are_means_over_its_targets(mix: Callable[..., TaskMix]) -> None:
    for name, share in (("text_to_image", 1.0), ("captioning", 1.0)):
        tasks = mix(tasks={name: share}, guidance_dropout=0.5)
        task, batch = tasks.draw(0)
        whole = task.losses(batch)["total"].detach()
        parts = [(task.losses(part)["total"].detach(), task.targets(part)) for part in (batch[:1], batch[1:])]
        mean = sum(loss * count for loss, count in parts) / task.targets(batch)
        torch.testing.assert_close(mean, whole, rtol=1e-5, atol=0.0)


def test_z_loss_is_added_to_what_is_trained_on_and_not_to_the_log(mix: Callable[..., TaskMix]) -> None:
    for name in ("text_to_image", "captioning"):
        plain, added = (mix(tasks={name: 1.0}, z_loss=weight) for weight in (0.0, 0.1))
        task, batch = plain.draw(0)
        without, found = task.losses(batch), added.draw(0)[0].losses(batch)
        assert found["total"] > without["total"]
        torch.testing.assert_close(found["loss"], without["loss"])


def test_flops_of_captions_count_when_they_are_read(mix: Callable[..., TaskMix]) -> None:
    tasks = mix(tasks={"text_to_image": 1.0})
    task, batch = tasks.draw(0)
    assert isinstance(task, TextToImage)
    task.losses(batch)
    first, read = task.flops(batch), list(tasks.context.prefixes.lengths)
    task.losses(batch)
    again = task.flops(batch)
    assert tasks.context.prefixes.lengths == []
    count = tasks.context.flops
    alone = sum(count.train_text_to_image(caption=len(one.prompt), codes=6) for one in batch)
    assert again < alone < first  # the first also read captions of the next steps
    assert first - again == sum(count.read_text(length) for length in read)


def test_held_out_pictures_have_their_captions_and_are_others(stage: Stage, mix: Callable[..., TaskMix]) -> None:
    data = stage()["data"] | {"held_out": ["concept", "picture"]}
    tasks = mix(data=data, tasks={"text_to_image": 1.0})
    held_out = tasks.main.held_out()
    assert len(held_out) == 8
    assert sorted(pictures(tasks, held_out)) == list(range(24, 32))
    assert mix(tasks={"text_to_image": 1.0}).main.held_out() == []
    halves = [mix(data=data, process=OneOf(rank, 3)).main.held_out() for rank in range(3)]
    assert [len(half) for half in halves] == [2, 2, 2]  # all processes have as many
    assert mix(data=data, process=OneOf(0, 9), batch_size=9).main.held_out() == []


def test_captions_of_a_language_without_a_hint_are_one_line(stage: Stage, mix: Callable[..., TaskMix]) -> None:
    data = stage()["data"] | {"languages": {"en": 1.0, "und": 0.5}}
    mix(data=data, tasks={"text_to_image": 1.0})
    with pytest.raises(ConfigError, match=r"data\.languages must be some of en, zh for tasks\.captioning, got und"):
        mix(data=data)

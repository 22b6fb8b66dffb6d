import pytest
import torch

from benchmarks.paraphrase_oracle import pick_by_captions, share_right, trained_captions
from mars.data.shards import Caption, Picture, Record
from mars.evaluation.questions import Question


def picture(key: str, *, split: str, **texts: str) -> Picture:
    captions = tuple(Caption(text=text, language="en", kind=kind) for kind, text in texts.items())
    record = Record(
        key=key, concept=key, style="a", split=split, source="a", licence="CC0-1.0", captions=captions,
    )  # fmt: skip
    return Picture(record=record, content=b"")


SHARD = {
    "pizza": picture("pizza", split="train", name="pizza", tags="food, slice", paraphrase="cheese"),
    "wedge": picture("wedge", split="train", name="Cheese wedge", tags="food"),
    "burger": picture("burger", split="train", name="burger", tags="food, cheese"),
    "fondue": picture("fondue", split="concept", name="fondue", tags="cheese, food"),
}


def test_tags_pick_what_training_says_them_of_and_no_held_out_caption_or_picture() -> None:
    captions = trained_captions(SHARD, "en")
    assert captions["pizza"] == ["pizza", "food, slice"]
    assert "fondue" not in captions
    assert set(pick_by_captions("cheese", captions)) == {"wedge", "burger"}
    assert pick_by_captions("slice, food", captions) == ["pizza"]
    assert pick_by_captions("rocket", captions) == []
    assert pick_by_captions("burg", captions) == []  # no word
    assert pick_by_captions("芝士", {"a": ["芝士汉堡"], "b": ["汉堡"]}) == ["a"]


def test_equals_share_the_score() -> None:
    features = {
        "pizza": torch.tensor([1.0, 0.0]),
        "wedge": torch.tensor([0.9, 0.1]),
        "burger": torch.tensor([0.0, 1.0]),
    }
    question = Question(key="pizza", prompts={"en": "cheese"}, candidates=("pizza", "burger"))
    assert share_right(question, ["wedge", "burger"], features) == pytest.approx(0.5)
    assert share_right(question, ["wedge"], features) == 1.0
    assert share_right(question, [], features) == 0.0

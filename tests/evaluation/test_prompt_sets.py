import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mars.errors import DataError, PromptError, RequestError
from mars.evaluation import drawing
from mars.evaluation.drawing import Artist, pixels_digest
from mars.evaluation.prompt_sets import (
    PromptFile,
    draw_prompt_file,
    read_coco,
    read_compbench,
    read_geneval,
    score_prompt_file,
)
from mars.generation.sampling import Sampling
from mars.pipeline import MarsPipeline

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 3}], "prompt": "three cups"},
]
COCO = {
    "images": [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in range(1, 7)],
    "annotations": [
        {"id": 10 * number + one, "image_id": number, "caption": f"caption {one}\n of {number} "}
        for number in range(1, 7)
        for one in range(5)
    ],
}


@pytest.fixture
def artist(pipe: MarsPipeline, monkeypatch: pytest.MonkeyPatch) -> Artist:
    monkeypatch.setattr(drawing, "BATCH", 2)
    return Artist(pipe=pipe, sampling=Sampling(temperature=0.5), seed=5)


@pytest.fixture
def geneval(tmp_path: Path) -> PromptFile:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in GENEVAL))
    return read_geneval(file, n=3)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_geneval_finds_its_folders_and_lines(artist: Artist, geneval: PromptFile, tmp_path: Path) -> None:
    draw_prompt_file(artist, geneval, out=tmp_path / "out")
    folders = sorted(one for one in (tmp_path / "out").iterdir() if one.is_dir())
    assert [folder.name for folder in folders] == ["00000", "00001"]
    for folder, line in zip(folders, GENEVAL, strict=True):
        assert json.loads((folder / "metadata.jsonl").read_text()) == line
        assert sorted(one.name for one in (folder / "samples").iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_compbench_finds_prompts_and_their_order_in_names(artist: Artist, tmp_path: Path) -> None:
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl.\na red car\n\n")
    wanted = read_compbench(tmp_path / "color_val.txt", n=2)
    draw_prompt_file(artist, wanted, out=tmp_path / "out")
    names = [one.name for one in (tmp_path / "out/samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))  # as BLIP_vqa.py does
    assert [name.split("_")[0] for name in names] == ["a green bench and a blue bowl."] * 2 + ["a red car"] * 2
    assert names[0].endswith("_000000.png")
    for wrong in ("a/b", "a_b", "word " * 60):
        (tmp_path / "wrong.txt").write_text(wrong)
        with pytest.raises(DataError, match="the scorer takes prompts from file names"):
            read_compbench(tmp_path / "wrong.txt")


def test_coco_gives_each_picture_one_caption_and_the_true_ones_name(artist: Artist, tmp_path: Path) -> None:
    (tmp_path / "captions_val2014.json").write_text(json.dumps(COCO))
    wanted = read_coco(tmp_path / "captions_val2014.json", count=3)
    assert wanted == read_coco(tmp_path / "captions_val2014.json", count=3)
    assert len(read_coco(tmp_path / "captions_val2014.json").orders) == 6
    draw_prompt_file(artist, wanted, out=tmp_path / "out")
    captions = json.loads((tmp_path / "out/captions.json").read_text())
    assert {one.stem for one in (tmp_path / "out/images").iterdir()} == captions.keys()
    for name, caption in captions.items():
        assert caption.split() == ["caption", caption.split()[1], "of", str(int(name[-12:]))]
    with pytest.raises(RequestError, match="one picture for a caption, got n = 2"):
        read_coco(tmp_path / "captions_val2014.json", n=2)


def test_a_run_cut_short_goes_on_and_ends_the_same(artist: Artist, geneval: PromptFile, tmp_path: Path) -> None:
    lines = draw_prompt_file(artist, geneval, out=tmp_path / "whole")
    assert [line["seed"] for line in lines] == [5, 6, 7, 8, 9, 10]
    draw_prompt_file(artist, geneval, out=tmp_path / "cut")
    whole = files(tmp_path / "whole")
    assert files(tmp_path / "cut") == whole
    kept = (tmp_path / "cut/00000/samples/0001.png").stat().st_mtime_ns
    for name in ("00001/samples/0000.png", "00001/samples/0002.png", "drawn.jsonl"):
        (tmp_path / "cut" / name).unlink()
    assert draw_prompt_file(artist, geneval, out=tmp_path / "cut") == lines
    assert files(tmp_path / "cut") == whole
    assert (tmp_path / "cut/00000/samples/0001.png").stat().st_mtime_ns == kept
    with Image.open(tmp_path / "cut" / lines[4]["file"]) as image:
        assert pixels_digest(image) == lines[4]["pixels"]


def test_a_folder_of_something_else_is_left_alone(artist: Artist, geneval: PromptFile, tmp_path: Path) -> None:
    draw_prompt_file(artist, geneval, out=tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(RequestError, match="of another model, prompt file or setting"):
        draw_prompt_file(replace(artist, seed=6), geneval, out=tmp_path / "out")
    assert files(tmp_path / "out") == before
    with pytest.raises(RequestError, match="must be new or of the same run"):
        draw_prompt_file(artist, geneval, out=tmp_path)
    with pytest.raises(DataError, match="at least one prompt"):
        draw_prompt_file(artist, PromptFile(orders=[]), out=tmp_path / "new")
    long = replace(geneval, orders=[*geneval.orders, replace(geneval.orders[0], prompt="x" * 5000)])
    with pytest.raises(PromptError):
        draw_prompt_file(artist, long, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"images": 3, "annotations": []}', "3"])
def test_a_file_that_is_none_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "file").write_text(content)
    with pytest.raises(DataError, match="must be a captions"):
        read_coco(tmp_path / "file")
    (tmp_path / "file").write_text(content or "no json")
    with pytest.raises(DataError, match="line 1, must be a JSON object with a prompt"):
        read_geneval(tmp_path / "file")
    with pytest.raises(DataError, match="must be a prompt file"):
        read_geneval(tmp_path / "none")


def test_what_can_be_scored_here_is(artist: Artist, geneval: PromptFile, clip_folder: Path, tmp_path: Path) -> None:
    lines = draw_prompt_file(artist, geneval, out=tmp_path / "out")
    true = tmp_path / "true"
    true.mkdir()
    for number in range(3):
        Image.new("RGB", (60, 40 + number), (80 * number, 10, 90)).save(true / f"{number}.jpg")
    report = score_prompt_file(
        lines, artist=artist, out=tmp_path / "out", clip=clip_folder, true=true, features=str(clip_folder)
    )
    assert report == json.loads((tmp_path / "out/report.json").read_text())
    assert (report["pictures"], report["prompts"]) == (6, 2)
    assert report["clip"]["choices"] == 2
    assert report["distribution"]["true_pictures"] == 3
    assert report["distribution"]["fid"] > 0
    for one in list(true.iterdir())[1:]:
        one.unlink()
    with pytest.raises(DataError, match="at least 2 true pictures"):
        score_prompt_file(lines, artist=artist, out=tmp_path / "out", true=true, features=str(clip_folder))

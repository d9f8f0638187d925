"""The whole command on real digits and on folders of images: features, probes, and what becomes of bad images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from methods.diffeat_extract.running import execute
from pomona.errors import CheckFailed, DataError, MissingError, OutputError, UsageError
from pomona.io.images import Images
from pomona.methods.diffeat_extract import extraction, report
from pomona.methods.diffeat_extract.config import Config
from small_unet import save_small_unet


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_unet(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def go(tmp_path: Path, unet: Path) -> Any:
    """Run the method on the small model; the output is in the test's own folder."""

    def go(*inputs: str, output: str | None = "out", **more: Any) -> Any:
        where = tmp_path / output if output is not None else None
        return execute(*inputs, **{"model": str(unet), "dtype": "float32", "output": where, **more})

    return go


def table(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def folder_of_images(folder: Path, count: int = 12, side: int = 8) -> Path:
    """Grey images in two folders, one for each class."""
    random = np.random.default_rng(0)
    for number in range(count):
        place = folder / ("pear", "plum")[number % 2] / f"{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side), dtype=np.uint8)).save(place)
    return folder


def test_features_are_the_pooled_maps_of_the_whole_pass_at_the_image_with_its_noise(
    go: Any, tmp_path: Path, unet: Path
) -> None:
    """Against diffusers' own forward pass with a hook, one image at a time, and NumPy for all else."""
    import torch
    from diffusers import UNet2DModel

    from pomona.methods.diffeat_extract.noising import noise

    config = Config(block=("mid", "u0r0"), timestep=(30, 700), pool=(1, 2))
    go("builtin:digits", config=config, output="out.parquet", limit=5, seed=3)
    rows = table(tmp_path / "out.parquet")
    model = UNet2DModel.from_pretrained(unet).eval()
    seen: dict[str, Any] = {}
    model.mid_block.register_forward_hook(lambda *a: seen.update(mid=a[2]))
    model.up_blocks[0].resnets[0].register_forward_hook(lambda *a: seen.update(u0r0=a[2]))
    bars = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for row, picture in zip(rows, Images(["builtin:digits"], config, limit=5), strict=True):
        image = picture.content.astype(np.float64) / 127.5 - 1
        for t in (30, 700):
            eps = noise(3, picture.id, t, 0, 0, (1, 8, 8)).numpy()
            noisy = np.sqrt(bars[t]) * image[None] + np.sqrt(1 - bars[t]) * eps
            with torch.no_grad():
                model(torch.from_numpy(noisy[None]).float(), t)
            for name in ("mid", "u0r0"):
                maps = seen[name][0].double().numpy()
                channels, side, _ = maps.shape
                for pool in (1, 2):
                    cells = maps.reshape(channels, pool, side // pool, pool, side // pool).mean(axis=(2, 4))
                    np.testing.assert_allclose(row[f"t{t}_{name}_p{pool}"], cells.ravel(), atol=2e-5)


def test_rows_keep_id_label_and_every_other_field_in_order(go: Any, tmp_path: Path) -> None:
    folder_of_images(tmp_path / "images", 4)
    lines = [
        {"image": f"{name}/{n:02}.png", "id": f"i{n}", "label": name, "photographer": "Ann", "iso": 100 * n}
        for n, name in enumerate(("pear", "plum", "pear", "plum"))
    ]
    (tmp_path / "images/list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary, code, _ = go(str(tmp_path / "images/list.jsonl"), output="out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert code == 0 and summary["images"] == 4 and summary["output"] == str(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if not k.startswith("t90")} for row in rows] == [
        {"id": f"i{n}", "label": line["label"], "photographer": "Ann", "iso": 100 * n} for n, line in enumerate(lines)
    ]
    assert all(len(row["t90_u0r0_p2"]) == summary["dims"] for row in rows)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_and_order_change_no_feature(go: Any, tmp_path: Path, batch: int) -> None:
    """To 1e-5 with other batches; the order alone changes not a bit where the batch is one image."""
    folder_of_images(tmp_path / "images", 12)
    lines = [{"image": f"{('pear', 'plum')[n % 2]}/{n:02}.png", "id": f"i{n}", "label": n % 2} for n in range(12)]
    for name, order in (("straight", range(12)), ("shuffled", np.random.default_rng(1).permutation(12))):
        text = "".join(json.dumps(lines[n]) + "\n" for n in order)
        (tmp_path / f"images/{name}.jsonl").write_text(text)
    found = {}
    for name, size in (("straight", 12), ("shuffled", batch)):
        go(str(tmp_path / f"images/{name}.jsonl"), output=f"{name}.parquet", batch_size=size if batch > 1 else 1)
        found[name] = {row["id"]: row["t90_u0r0_p2"] for row in table(tmp_path / f"{name}.parquet")}
    for key, features in found["straight"].items():
        if batch == 1:
            assert features == found["shuffled"][key]
        np.testing.assert_allclose(found["shuffled"][key], features, atol=1e-5)


def test_several_blocks_and_times_in_one_run_are_what_each_alone_gives(go: Any, tmp_path: Path) -> None:
    go(config=Config(block=("u0r0", "stem"), timestep=(10, 90), pool=(2,)), output="all.parquet", limit=6, batch_size=1)
    go(config=Config(block=("stem",), timestep=(90,), pool=(2,)), output="one.parquet", limit=6, batch_size=1)
    assert [row["t90_stem_p2"] for row in table(tmp_path / "all.parquet")] == [
        row["t90_stem_p2"] for row in table(tmp_path / "one.parquet")
    ]


def test_averaged_noise_and_more_views_have_the_shapes_they_should(go: Any, tmp_path: Path) -> None:
    folder_of_images(tmp_path / "images", 4, side=16)
    views = Config(views=3, flip=True, image_size=8)
    go(str(tmp_path / "images"), config=views, output="views.parquet")
    rows = table(tmp_path / "views.parquet")
    assert [(row["id"], row["view"]) for row in rows[:4]] == [
        ("pear/00.png", 0),
        ("pear/00.png", 1),
        ("pear/00.png", 2),
        ("pear/02.png", 0),
    ]
    go(str(tmp_path / "images"), config=Config(image_size=8), output="plain.parquet")
    plain = {row["id"]: row["t90_u0r0_p2"] for row in table(tmp_path / "plain.parquet")}
    for row in rows:
        close = np.allclose(row["t90_u0r0_p2"], plain[row["id"]], atol=1e-5)
        assert close == (row["view"] == 0), "the first view is the middle crop with the noise it has alone"
    averaged = []
    for draws in (1, 40):
        go(
            str(tmp_path / "images"),
            config=Config(noise_average=draws, image_size=8),
            output=f"{draws}.parquet",
            seed=1,
        )
        go(
            str(tmp_path / "images"),
            config=Config(noise_average=draws, image_size=8),
            output=f"{draws}b.parquet",
            seed=2,
        )
        one, other = (
            np.array([row["t90_u0r0_p2"] for row in table(tmp_path / f"{draws}{end}.parquet")]) for end in ("", "b")
        )
        averaged.append(np.linalg.norm(one - other))
    assert averaged[1] < averaged[0] / 4, "noise averages out as the root of the number of draws, about 6.3"


def test_a_damaged_image_stops_the_run_or_is_set_aside_with_its_reason(go: Any, tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "images", 6)
    victim = folder / "pear/02.png"
    victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(DataError, match=r"02\.png"):
        go(str(folder), output="out.parquet")
    assert not (tmp_path / "out.parquet").exists()
    rejects = tmp_path / "bad.jsonl"
    summary, code, _ = go(str(folder), config=Config(rejects=rejects), output="out.parquet", resume=True)
    assert (code, summary["images"], summary["rejected"]) == (3, 5, 1)
    (entry,) = [json.loads(line) for line in rejects.read_bytes().splitlines()]
    assert entry["id"] == "pear/02.png" and entry["reason"]
    assert len(table(tmp_path / "out.parquet")) == 5


def test_where_no_image_can_be_read_nothing_is_written(go: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"no")
    for output in ("out.parquet", None):
        with pytest.raises(DataError, match="no image could be read; of the first: not an image"):
            go(str(tmp_path / "images"), config=Config(rejects=tmp_path / "bad.jsonl"), output=output)
        assert not (tmp_path / "out.parquet").exists()
        (entry,) = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_bytes().splitlines()]
        assert entry["id"] == "a.png"
        (tmp_path / "bad.jsonl").unlink()


def test_where_rejects_go_is_looked_at_before_any_work(go: Any, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("{}\n")
    for place, kind, said in (
        ("out.parquet", UsageError, "this is the output"),
        ("old.jsonl", OutputError, "exists"),
        ("", OutputError, "it is a directory"),
        ("none/bad.jsonl", OutputError, "the folder does not exist"),
    ):
        with pytest.raises(kind, match=said):
            go(config=Config(rejects=tmp_path / place), output="out.parquet", limit=2)
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]


def test_a_run_that_a_bad_image_stopped_goes_on_with_rejects(go: Any, tmp_path: Path) -> None:
    """What was done before is kept, and the output does not tell where rejects went."""
    folder = folder_of_images(tmp_path / "images", 6)
    (folder / "plum/05.png").write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        go(str(folder), config=Config(shard_size=2), output="out.parquet")
    assert (tmp_path / "out.parquet.journal").exists()
    for name in ("bad.jsonl", "elsewhere.jsonl"):
        config = Config(shard_size=2, rejects=tmp_path / name)
        assert go(str(folder), config=config, output="out.parquet", resume=True)[1] == 3


def test_a_field_that_parquet_cannot_hold_is_named_before_any_work(go: Any, tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "images", 4)
    lines = [{"image": f"pear/{n:02}.png", "iso": value} for n, value in ((0, 100), (2, "auto"))]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for output in ("out.parquet", "out"):
        for dry_run in (False, True):
            with pytest.raises(OutputError, match='field "iso"'):
                go(str(folder / "list.jsonl"), output=output, dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert go(str(folder / "list.jsonl"), output="out.jsonl")[0]["images"] == 2


def test_a_dry_run_finds_what_is_wrong_with_records(go: Any, tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path / "images", 4)
    (folder / "list.jsonl").write_text('{"image": "pear/00.png"}\n{"picture": 1}\n')
    with pytest.raises(DataError, match=r'list\.jsonl:2: field "image" is missing'):
        go(str(folder / "list.jsonl"), dry_run=True)
    plan, code, _ = go(str(folder / "list.jsonl"), config=Config(rejects=tmp_path / "bad.jsonl"), dry_run=True)
    assert (plan["images"], plan["rejected"], code) == (2, 1, 3)


def test_standard_output_is_not_resumed_and_blocks_are_not_written_to_a_file(go: Any) -> None:
    with pytest.raises(UsageError, match="--resume needs -o"):
        go(output=None, resume=True)
    with pytest.raises(UsageError, match="leave -o out"):
        go(config=Config(list_blocks=True), output="out.jsonl")


def test_without_an_output_rows_go_to_standard_output(go: Any) -> None:
    summary, code, rows = go(output=None, limit=70)
    assert summary == {} and code == 0 and len(rows) == 70
    assert rows[0]["id"] == "digit-0000" and rows[0]["label"] == 0 and len(rows[0]["t90_u0r0_p2"]) > 0


def test_a_probe_has_its_controls_beside_it_and_a_bound_it_can_fail(go: Any, tmp_path: Path) -> None:
    config = Config(probe="linear", shots="1,5", draws=2, fail_under=0.999)
    with pytest.raises(CheckFailed, match="below --fail-under"):
        go(config=config, limit=300)
    found = json.loads((tmp_path / "out/report.json").read_bytes())
    rows = {(row["kind"], row["shots"]): row for row in found["probe"]["rows"]}
    assert rows.keys() == {(kind, count) for kind in ("features", "random", "pixels") for count in ("1", "5")}
    assert rows["pixels", "5"]["mean"] > rows["pixels", "1"]["mean"] > 0.2
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows.values())
    behind = rows["pixels", "5"]["behind"]["t90_u0r0_p2"]["mean"]
    assert behind == pytest.approx(rows["features", "5"]["mean"] - rows["pixels", "5"]["mean"])


def test_a_sweep_chooses_without_the_test_images(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the labels of the test images turned about, the choice and its validation stay what they were."""
    from pomona.methods.diffeat_extract.probing import study as studies

    config = Config(sweep=True, block=("stem", "mid"), timestep=(10, 300), pool=(1, 2), shots="4", draws=2)
    summary, _, _ = go(config=config, limit=400)
    before = json.loads((tmp_path / "out/report.json").read_bytes())["sweep"]
    keep = studies.Study.table
    turned: list[Any] = []

    def table_of_turned(self: Any, contenders: Any) -> Any:
        labels = self.task.labels.copy()
        labels[self.task.test] = (labels[self.task.test] + 1) % 10
        turned.append(len(self.task.test))
        return keep(dataclasses.replace(self, task=dataclasses.replace(self.task, labels=labels)), contenders)

    monkeypatch.setattr(studies.Study, "table", table_of_turned)
    go(config=config, limit=400, output="again")
    after = json.loads((tmp_path / "again/report.json").read_bytes())["sweep"]
    assert turned and after["validation"] == before["validation"] and after["chosen"] == before["chosen"]
    assert after["rows"][0]["mean"] != before["rows"][0]["mean"]
    assert summary["probe"]["column"] == before["chosen"] and len(before["validation"]) == 8
    best = max(before["validation"].values(), key=lambda cell: cell["mean"])
    assert before["validation"][before["chosen"]] == best


def test_a_resumed_run_reads_only_what_is_missing_and_ends_with_the_same_bytes(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pomona.io.shards import Shards

    config = Config(shard_size=10, probe="linear", shots="1", draws=2)
    go(config=config, limit=60, output="whole")
    keep, written = Shards.write, []

    def write(self: Any, index: int, *rest: Any) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(index)
        keep(self, index, *rest)

    monkeypatch.setattr(Shards, "write", write)
    with pytest.raises(KeyboardInterrupt):
        go(config=config, limit=60, output="out")
    monkeypatch.setattr(Shards, "write", lambda self, index, *rest: (written.append(index), keep(self, index, *rest)))
    go(config=config, limit=60, output="out", resume=True)
    assert written[:6] == [0, 1, 2, 3, 4, 5]
    for file in ("features.parquet", "report.json", "report.md"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(block=("u9r0",)), "u9r0"),
        (Config(timestep=(1000,)), "0 to 999"),
        (Config(pool=(5,)), "cells a side"),
        (Config(sweep=True, block=("mid",)), "give -o DIR"),
        (Config(cka=True), "give -o DIR"),
        (Config(head="difformer"), "give -o DIR"),
        (Config(head="diffeed", block=("stem",)), "the last that DifFeed feeds back to"),
        (Config(preset="paper-2307"), "--preset paper-2307: --block 24: the model's blocks are 1 to"),
    ],
)
def test_what_the_model_does_not_have_is_refused_with_what_there_is(go: Any, config: Config, message: str) -> None:
    with pytest.raises(UsageError) as error:
        go(config=config, output="out.parquet")
    assert message in f"{error.value} {error.value.hint}"


def test_a_colour_image_is_refused_by_a_model_of_grey_ones(go: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 10, 10)).save(tmp_path / "red.png")
    with pytest.raises(DataError, match=r"red\.png: .*grey"):
        go(str(tmp_path), output="out.parquet")


def test_a_model_of_latents_is_refused(go: Any, tmp_path: Path) -> None:
    model = save_small_unet(tmp_path / "latents", channels=4)
    with pytest.raises(DataError, match="4 channels"):
        go(model=str(model))


def test_the_plan_of_a_dry_run_is_what_the_run_then_does(go: Any, tmp_path: Path) -> None:
    config = Config(block=("stem", "mid"), timestep=(5, 50), pool=(1,))
    plan, code, _ = go(config=config, limit=9, dry_run=True)
    assert code == 0 and not (tmp_path / "out").exists()
    summary, _, _ = go(config=config, limit=9)
    assert plan["images"] == summary["images"] == 9 and sum(plan["columns"].values()) == summary["dims"]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("labels", "config", "said"),
    [
        ([None] * 4, Config(probe="linear"), "have no labels"),
        (["pear", "plum", "pear", "plum", "kiwi"], Config(probe="linear", shots="1"), 'label "kiwi" has one image'),
        (["pear", "plum"] * 2, Config(probe="linear", shots="2"), "1 image to learn from, fewer than 2"),
        (["pear", "plum"] * 3, Config(sweep=True, shots="2"), "1 image in the half of those to learn from"),
    ],
)
def test_images_that_cannot_be_probed_are_refused_before_any_goes_through_the_model(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: Any, config: Config, said: str, dry_run: bool
) -> None:
    folder_of_images(tmp_path / "images", 6)
    names = sorted(path.relative_to(tmp_path / "images") for path in (tmp_path / "images").rglob("*.png"))
    told = [{"image": str(name), "label": label} for name, label in zip(names, labels, strict=False)]
    (tmp_path / "images/list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    monkeypatch.setattr(extraction.FeatureReader, "__call__", None)
    config = dataclasses.replace(config, test_share=0.4)
    with pytest.raises(DataError, match=said):
        go(str(tmp_path / "images/list.jsonl"), config=config, dry_run=dry_run)


def test_a_choice_among_columns_is_named_where_its_accuracy_is_told(go: Any, tmp_path: Path) -> None:
    config = Config(
        block=("stem", "mid"), timestep=(9,), pool=(1,), probe="linear", shots="1", draws=1, controls="none"
    )
    summary, _, _ = go(config=config, limit=80)
    (told,) = (line for line in (tmp_path / "out/report.md").read_text().splitlines() if line.startswith("t9"))
    assert told.replace("&#95;", "_").startswith(f"{summary['probe']['column']}, 1 label of each class: ")


def test_the_report_says_how_much_it_leaves_out(go: Any, tmp_path: Path) -> None:
    """And that some noise beats none only where none was among the times."""
    times = tuple(range(5, 65, 5))
    config = Config(sweep=True, block=("mid",), timestep=times, pool=(1,), shots="1", draws=1, controls="none")
    go(config=config, limit=80)
    report = (tmp_path / "out/report.md").read_text()
    (told,) = (line for line in report.splitlines() if line.startswith("Noise, by the best cell"))
    assert "t = 45 " in told and "and 3 more; " in told and "none" not in told
    assert "is left at t = 45 and 3 more." in report


def test_differences_of_nothing_are_not_below_it() -> None:
    assert report._points({"mean": -0.0002, "low": -0.2, "high": 0.1}) == "+0.0 points (-20.0 to +10.0)"


def test_what_makes_a_model_takes_no_probe_and_no_other_input(go: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--train-model and --probe exclude each other"):
        Config(train_model=5, probe="linear")
    (tmp_path / "adm.pt").touch()
    with pytest.raises(UsageError, match="no use for photos"):
        go("photos", config=Config(convert=tmp_path / "adm.pt"), model=None)
    with pytest.raises(UsageError, match="no use for --model"):
        go(config=Config(convert=tmp_path / "adm.pt"))
    with pytest.raises(MissingError, match=r"none\.pt: no such file"):
        go(config=Config(convert=tmp_path / "none.pt"), model=None)
    with pytest.raises(MissingError, match="cannot be read: EOFError"):
        go(config=Config(convert=tmp_path / "adm.pt"), model=None, dry_run=True)


def test_the_report_tells_the_cost_of_both_passes_of_difffeed(go: Any, tmp_path: Path) -> None:
    """The first ends at the last block that feeds back, the second where the head reads."""
    config = Config(head="diffeed", timestep=(9,), shots="all", epochs=1, controls="none")
    plan, _, _ = go(config=config, limit=60, dry_run=True)
    go(config=config, limit=60)
    found = json.loads((tmp_path / "out/report.json").read_bytes())
    cost = {block["number"]: block["flops"] for block in found["blocks"]}
    blocks = len(cost)
    first = max(blocks + 1 - block["number"] for block in found["blocks"] if block["name"] in ("d0r0", "d1r0"))
    (read,) = (block for block in found["blocks"] if block["name"] == found["reading"]["blocks"][0])
    spent = sum(flops for end in (first, read["number"]) for number, flops in cost.items() if number <= end)
    assert plan["gflop_per_image"] == round(spent / 1e9, 3) > 0
    assert found["share"] == pytest.approx(
        sum(b["share"] for b in found["blocks"] if b["number"] in (first, read["number"]))
    )
    assert "The two passes of DifFeed cost" in (tmp_path / "out/report.md").read_text()


def test_a_list_of_blocks_is_one_record_a_block(go: Any) -> None:
    summary, code, rows = go(config=Config(list_blocks=True), output=None)
    assert (summary, code) == ({}, 0)
    assert [row["number"] for row in rows] == list(range(1, len(rows) + 1)) and rows[0]["name"] == "stem"


def test_presets_set_what_is_not_given(go: Any) -> None:
    from pomona.methods.diffeat_extract.reading import settled

    paper = settled(Config(preset="paper-2307"))
    assert (paper.block, paper.timestep, paper.pool, paper.linear) == (("24",), (90,), (2,), "sgd")
    assert settled(Config(preset="paper-2307", block=("19",))).block == ("19",)
    successor = settled(Config(preset="paper-2311"))
    assert (successor.block, successor.timestep, successor.head) == (("24",), (150,), "diffeed")
    assert settled(Config(preset="paper-2311", probe="linear")).head == "none"

"""Images of a run: every layout gives the same pixels, copies are found behind any file, everything is counted."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from image_inputs import lines, png
from pomona.errors import DataError, MissingError, OutputError, UnavailableError
from pomona.io.atomic import partial_path
from pomona.methods.madaug_train import decoding
from pomona.methods.madaug_train.config import Config
from pomona.methods.madaug_train.data import Inputs, Prepared, open_prepared
from pomona.methods.madaug_train.splits import parts
from pomona.runtime.progress import Quiet
from pomona.runtime.settings import Settings

GREY = np.random.default_rng(0).integers(0, 256, (24, 6, 5), dtype=np.uint8)
LABELS = ["ape", "bee"] * 12
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 6, 5, 3), dtype=np.uint8)


def inputs(*names: object, settings: Settings | None = None, **options: Any) -> Inputs:
    return Inputs(Config(**options), settings or Settings(), [str(name) for name in names])


def prepared(folder: Path, *names: object, **options: Any) -> Prepared:
    folder.mkdir(exist_ok=True)
    return inputs(*names, **options).prepare(folder, Quiet())[0]


def encoded(array: NDArray[np.uint8], form: str) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert("RGB") if form in ("rgb", "WEBP") else image).save(
        file, "PNG" if form == "rgb" else form, **({"lossless": True} if form == "WEBP" else {})
    )
    return file.getvalue()


def folder_of(root: Path, images: NDArray[np.uint8], form: str = "PNG") -> Path:
    for place, (image, label) in enumerate(zip(images, LABELS, strict=False)):
        path = root / label / f"{place:02d}.{'png' if form == 'rgb' else form.lower()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, form))
    return root


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def by_label(found: Prepared) -> NDArray[np.uint8]:
    """As they were written, whatever the order of a folder."""
    return found.images[np.argsort(found.labels, kind="stable")]


IN_ORDER = np.concatenate([GREY[::2], GREY[1::2]])


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "rgb", "BMP", "TIFF", "WEBP"])
def test_files_of_every_kind_give_the_pixels_of_an_array_and_stay_grey(tmp_path: Path, form: str) -> None:
    found = prepared(tmp_path / "kept", folder_of(tmp_path / "in", GREY, form))
    assert found.images.shape == (24, 1, 6, 5) and found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images[:, 0], IN_ORDER)
    assert found.labels.tolist() == [0] * 12 + [1] * 12 and found.names == ["ape", "bee"]
    assert found.ids[0] == f"ape/00.{'png' if form == 'rgb' else form.lower()}"


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_an_image_is_grey_only_where_three_channels_are_equal(tmp_path: Path, channel: int) -> None:
    nearly = np.repeat(GREY[..., None], 3, 3)
    nearly[20, 3, 3, channel] ^= 1
    found = prepared(tmp_path / "kept", npz(tmp_path / "a.npz", x=nearly, y=LABELS))
    np.testing.assert_array_equal(found.images, nearly.transpose(0, 3, 1, 2))


def test_arrays_need_no_pillow_and_files_say_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "in", GREY)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert len(prepared(tmp_path / "kept", npz(tmp_path / "a.npz", x=COLOUR, y=LABELS)).images) == 24
    for work in (lambda: prepared(tmp_path / "kept", tmp_path / "in"), lambda: prepared(tmp_path / "1", image_size=4)):
        with pytest.raises(UnavailableError) as caught:
            work()
        assert caught.value.hint == "pip install 'pomona[vision]'"


@pytest.mark.parametrize("most", [1, 2, 1000])
def test_one_colour_image_makes_all_of_them_colour_wherever_it_stands(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_CHUNK", most)
    for place in (0, 11, 23):
        mixed = [COLOUR[at] if at == place else GREY[at] for at in range(24)]
        table = [{"image": f"{at}.png", "label": LABELS[at]} for at in range(24)]
        for at, image in enumerate(mixed):
            (tmp_path / f"{at}.png").write_bytes(png(image))
        found = prepared(tmp_path / f"kept{place}", lines(tmp_path / "a.jsonl", table))
        expected = np.stack([COLOUR[at] if at == place else np.repeat(GREY[at][..., None], 3, 2) for at in range(24)])
        np.testing.assert_array_equal(found.images, expected.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(np.load(found.folder / "images.npy"), found.images)


def test_copies_are_found_in_another_kind_of_file_another_array_and_other_channels(tmp_path: Path) -> None:
    """Twelve images as PNG, again as BMP with three channels, again in an array; a colour image beside them."""
    folder_of(tmp_path / "first", GREY[:12])
    folder_of(tmp_path / "second", GREY[:12], "rgb")
    for path in sorted((tmp_path / "second").rglob("*.png")):
        path.rename(path.with_name(f"again-{path.name}"))
    array = npz(tmp_path / "a.npz", images=np.repeat(GREY[:12, ..., None], 3, 3), labels=np.array(LABELS[:12]))
    colour = npz(tmp_path / "c.npz", images=COLOUR[:2], labels=np.array(LABELS[:2]))
    found = prepared(
        tmp_path / "kept",
        *(tmp_path / "first", tmp_path / "second", array, colour),
        val_fraction=0.4,
        test_fraction=0.3,
    )
    assert found.images.shape[:2] == (38, 3)
    assert found.contents[:12].tolist() == list(range(12)) and found.contents[12:24].tolist() == list(range(12))
    for place in range(24, 36):
        np.testing.assert_array_equal(found.images[place], found.images[found.contents[place]])
        assert found.contents[place] < 12
    assert found.contents[36:].tolist() == [36, 37]
    split = parts(found, found.options, seed=0)
    held = [set(found.contents[part].tolist()) for part in (split.train, split.val, split.test)]
    assert sum(map(len, held)) == 14 and not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


def test_images_that_differ_in_one_pixel_are_no_copies(tmp_path: Path) -> None:
    twice = np.concatenate([GREY, GREY])
    twice[24:, 5, 4] ^= 1
    found = prepared(tmp_path / "kept", npz(tmp_path / "a.npz", x=twice, y=np.array(LABELS * 2)))
    assert found.contents.tolist() == list(range(48))


def test_images_are_scaled_where_sizes_differ_and_refused_otherwise(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", GREY)
    (tmp_path / "in/bee/99.png").write_bytes(png(np.zeros((8, 7), dtype=np.uint8)))
    with pytest.raises(DataError, match=r"bee/99.png has 7 x 8 pixels, and ape/00.png has 5 x 6") as caught:
        prepared(tmp_path / "kept", tmp_path / "in")
    assert caught.value.hint == "--image-size 5 scales all alike and crops the middle"
    assert not list((tmp_path / "kept").iterdir())
    assert prepared(tmp_path / "kept", tmp_path / "in", image_size=5).images.shape == (25, 1, 5, 5)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_the_digits_alone_are_parted_by_number_anew_for_every_seed(tmp_path: Path) -> None:
    found = prepared(tmp_path / "kept")
    digits = load_digits()
    assert found.images.shape == (1797, 1, 8, 8) and found.labels.tolist() == digits.target.tolist()
    assert np.abs(found.images[:, 0] * (16 / 255) - digits.images).max() <= 0.5 * 16 / 255
    split = [parts(found, found.options, seed=seed) for seed in (0, 1)]
    assert all([len(each.train), len(each.val), len(each.test), each.unused] == [200, 200, 1397, 0] for each in split)
    assert not np.array_equal(split[0].test, split[1].test)
    for part in (split[0].train, split[0].val):
        assert set(np.bincount(found.labels[part]).tolist()) <= {19, 20, 21}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"train_images": 100}, [100, 200, 1497]),
        ({"val_images": 50}, [200, 50, 1547]),
        ({"test_fraction": 0.5}, [721, 179, 897]),
    ],
)
def test_what_the_options_say_of_the_digits_goes_before(tmp_path: Path, options: Any, sizes: list[int]) -> None:
    told = inputs("builtin:digits", **options).foretold()
    assert [told["train"], told["val"], told["test"]] == pytest.approx(sizes, abs=4)
    assert sum(told[part] for part in ("train", "val", "test", "unused", "rejected")) == told["images"] == 1797


def test_data_of_their_own_stand_in_for_the_parts_of_the_data(tmp_path: Path) -> None:
    arrays = {"x_train": GREY[:12], "y_train": LABELS[:12], "x_test": GREY[12:16], "y_test": LABELS[12:16]}
    data = npz(tmp_path / "data.npz", **arrays)
    other = npz(tmp_path / "other.npz", x_train=COLOUR[:6, ..., 0], y_train=LABELS[:6])
    found = prepared(tmp_path / "kept", data, test=str(other), val_fraction=0.34)
    assert found.splits == ["train"] * 12 + [None] * 4 + ["test"] * 6
    split = parts(found, found.options, seed=0)
    assert split.test.tolist() == list(range(16, 22)) and split.unused == 4 and len(split.val) == 4
    assert [entry.get("for") for entry in inputs(data, test=str(other)).sources] == [None, "test"]
    found = prepared(tmp_path / "kept2", data, val=str(other))
    assert found.splits == ["train"] * 12 + ["test"] * 4 + ["validation"] * 6


def test_images_of_one_split_alone_are_parted_anew_and_so_are_all_with_resplit(tmp_path: Path) -> None:
    only_test = npz(tmp_path / "a.npz", x_test=GREY, y_test=LABELS)
    assert prepared(tmp_path / "1", only_test).splits == ["train"] * 24
    both = npz(tmp_path / "b.npz", x_train=GREY[:12], y_train=LABELS[:12], x_test=GREY[12:], y_test=LABELS[12:])
    assert set(prepared(tmp_path / "2", both, resplit=True).splits) == {"train"}


def test_a_copy_of_a_training_image_among_the_test_images_is_exit_4_or_dropped(tmp_path: Path) -> None:
    folder_of(tmp_path / "data", GREY)
    (tmp_path / "test/ape").mkdir(parents=True)
    (tmp_path / "test/bee").mkdir()
    (tmp_path / "test/ape/x.bmp").write_bytes(encoded(GREY[4], "BMP"))
    (tmp_path / "test/bee/y.png").write_bytes(png(255 - GREY[5]))
    options = {"test": str(tmp_path / "test"), "val_fraction": 0.3}
    with pytest.raises(
        DataError, match=r'1 train image is a test image too \("ape/04.png" and "ape/x.bmp"\)'
    ) as caught:
        prepared(tmp_path / "kept", tmp_path / "data", **options)
    assert caught.value.exit_code == 4 and "--overlap drop" in str(caught.value.hint)
    found = prepared(tmp_path / "kept", tmp_path / "data", overlap="drop", **options)
    split = parts(found, found.options, seed=0)
    assert (split.dropped, len(split.test), len(split.train) + len(split.val)) == (1, 2, 23)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": GREY}, "have no labels, so there is nothing to learn"),
        ({"x": GREY, "y": ["ape"] * 24}, 'all images are labelled "ape"'),
        ({"x": GREY, "y": [*LABELS[:23], "cow"]}, 'label "cow" has 1 image to learn from'),
    ],
)
def test_labels_that_teach_nothing_are_refused_before_any_pixel_is_read(
    tmp_path: Path, arrays: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pixel was asked for")

    monkeypatch.setattr(decoding, "pixels", never)
    found = inputs(npz(tmp_path / "a.npz", **arrays))
    for work in (found.foretold, lambda: found.prepare(tmp_path, Quiet())):
        with pytest.raises(DataError, match=said):
            work()


def test_an_image_of_no_split_among_others_is_refused_by_name(tmp_path: Path) -> None:
    for at in range(4):
        (tmp_path / f"{at}.png").write_bytes(png(GREY[at]))
    rows = [
        {"image": f"{at}.png", "label": at % 2, "split": split}
        for at, split in enumerate(["train", "test", "", "test"])
    ]
    with pytest.raises(DataError, match=r"2\.png belongs to no split") as caught:
        inputs(lines(tmp_path / "a.jsonl", rows)).foretold()
    assert "--resplit" in str(caught.value.hint)


# --- accounts --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_set_aside_and_everything_that_came_in_is_counted(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", GREY)
    whole = (tmp_path / "in/ape/02.png").read_bytes()
    (tmp_path / "in/ape/02.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in/bee/03.png").write_bytes(b"")
    (tmp_path / "in/stray.png").write_bytes(whole)
    (tmp_path / "kept").mkdir()
    with pytest.raises(DataError, match=r"stray.png:1: it has no label, and others have"):
        inputs(tmp_path / "in").foretold()
    (tmp_path / "in/stray.png").unlink()
    with pytest.raises(DataError, match=r"ape/02.png: the file is cut off") as caught:
        prepared(tmp_path / "kept", tmp_path / "in")
    assert "--rejects" in str(caught.value.hint) and not list((tmp_path / "kept").iterdir())
    (tmp_path / "in/stray.png").write_bytes(whole)
    read = inputs(tmp_path / "in", rejects=tmp_path / "bad.jsonl", overlap="drop")
    found, rejects = read.prepare(tmp_path / "kept", Quiet())
    assert [(entry["reason"], entry["source"].rsplit("/")[-1]) for entry in rejects] == [
        ("it has no label, and others have", "stray.png"),
        ("the file is cut off", "02.png"),
        ("the file is empty", "03.png"),
    ]
    assert "ape/02.png" not in found.ids and len(found.ids) == len(found.images) == 22
    np.testing.assert_array_equal(found.images[:, 0], np.delete(IN_ORDER, [1, 13], axis=0))
    split = parts(found, found.options, seed=0)
    told = read.foretold()
    assert len(split.train) + len(split.val) + len(split.test) + split.unused + split.dropped + len(rejects) == 25
    assert told["images"] == 25 and told["rejected"] == 1


def test_nothing_that_can_be_read_ends_with_the_rejects_written(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", GREY)
    for path in (tmp_path / "in").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="no image could be read"):
        prepared(tmp_path / "kept", tmp_path / "in", rejects=tmp_path / "bad.jsonl")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 24
    assert not list((tmp_path / "kept").iterdir())


def test_a_class_that_is_lost_in_reading_is_refused_then(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", GREY)
    for path in sorted((tmp_path / "in/bee").iterdir())[1:]:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match='label "bee" has 1 image to learn from'):
        prepared(tmp_path / "kept", tmp_path / "in", rejects=tmp_path / "bad.jsonl")


def test_the_limit_is_of_every_input_by_itself(tmp_path: Path) -> None:
    data = npz(tmp_path / "data.npz", x=GREY, y=LABELS)
    other = npz(tmp_path / "other.npz", x=COLOUR[..., 0], y=LABELS)
    told = inputs(data, test=str(other), settings=Settings(limit=10)).foretold()
    assert (told["images"], told["train"] + told["val"], told["test"]) == (20, 10, 10)


def test_a_forecast_agrees_with_what_is_done_and_says_it_by_class(tmp_path: Path) -> None:
    told = inputs(npz(tmp_path / "a.npz", x=GREY, y=LABELS), settings=Settings(seed=3)).foretold()
    found = prepared(tmp_path / "kept", tmp_path / "a.npz")
    split = parts(found, found.options, seed=3)
    for part in ("train", "val", "test"):
        counts = np.bincount(found.labels[getattr(split, part)]).tolist()
        assert told[part] == sum(counts) and [told["classes"][name][part] for name in found.names] == counts
    json.dumps(told)


# --- the file --------------------------------------------------------------------------------------------------------


def test_another_process_finds_what_was_prepared_and_cannot_change_it(tmp_path: Path) -> None:
    first = prepared(tmp_path / "kept", npz(tmp_path / "a.npz", x=GREY, y=LABELS), val_images=4)
    again = open_prepared(tmp_path / "kept")
    np.testing.assert_array_equal(again.images, first.images)
    assert not again.images.flags.writeable and isinstance(again.images, np.memmap)
    assert (again.names, again.ids, again.splits) == (first.names, first.ids, first.splits)
    assert (again.options, again.digest) == (first.options, first.digest) and again.options.val_images == 4
    assert all(np.array_equal(getattr(again, name), getattr(first, name)) for name in ("labels", "contents"))


def test_a_digest_is_of_pixels_labels_names_and_options(tmp_path: Path) -> None:
    base = {"x": GREY, "y": LABELS}
    digest = prepared(tmp_path / "0", npz(tmp_path / "a.npz", **base)).digest
    assert prepared(tmp_path / "1", npz(tmp_path / "a.npz", **base)).digest == digest
    changed = GREY.copy()
    changed[7, 2, 2] ^= 1
    others = [
        prepared(tmp_path / "2", npz(tmp_path / "a.npz", x=changed, y=LABELS)).digest,
        prepared(tmp_path / "3", npz(tmp_path / "a.npz", x=GREY, y=LABELS[::-1])).digest,
        prepared(tmp_path / "4", npz(tmp_path / "b.npz", **base)).digest,
        prepared(tmp_path / "5", npz(tmp_path / "a.npz", **base), val_fraction=0.3).digest,
    ]
    assert len({digest, *others}) == 5


def test_what_is_missing_cut_off_or_changed_is_never_trained_on(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="missing or damaged"):
        open_prepared(tmp_path)
    data = npz(tmp_path / "a.npz", x=GREY, y=LABELS)
    for name, harm in (
        ("images.npy", lambda data: data[:-1]),
        ("images.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("images.npy", lambda data: b""),
        ("data.json", lambda data: data[:-9]),
        ("data.json", lambda data: b"[]"),
        ("data.json", lambda data: data.replace(b'"labels"', b'"lebals"')),
    ):
        prepared(tmp_path / "kept", data)
        path = tmp_path / "kept" / name
        path.write_bytes(harm(path.read_bytes()))
        with pytest.raises(MissingError, match="missing or damaged"):
            open_prepared(tmp_path / "kept")
        np.testing.assert_array_equal(prepared(tmp_path / "kept", data).images[:, 0], GREY)


def test_complete_images_are_not_decoded_again_and_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = npz(tmp_path / "a.npz", x=GREY, y=LABELS)
    first = prepared(tmp_path / "kept", data)
    partial_path(tmp_path / "kept/images.npy").write_bytes(b"what a killed run has left")
    decoded: list[int] = []
    real = decoding.pixels
    monkeypatch.setattr(decoding, "pixels", lambda *args, **more: decoded.append(1) or real(*args, **more))
    assert prepared(tmp_path / "kept", data).digest == first.digest and not decoded
    (tmp_path / "kept/data.json").unlink()  # a run that was killed between the two
    assert prepared(tmp_path / "kept", data).digest == first.digest and len(decoded) == 24
    npz(data, x=GREY[::-1], y=LABELS)
    np.testing.assert_array_equal(prepared(tmp_path / "kept", data).images[:, 0], GREY[::-1])


def test_what_was_read_otherwise_is_read_again(tmp_path: Path) -> None:
    """The file is the same: which of its arrays, how many images, and whether any may be missing is not."""
    data = npz(tmp_path / "a.npz", x=GREY, y=LABELS)
    (tmp_path / "kept").mkdir()
    assert len(prepared(tmp_path / "kept", data).ids) == 24
    assert prepared(tmp_path / "kept", data, image_field="x", label_field="y").names == ["ape", "bee"]
    few = inputs(data, settings=Settings(limit=10)).prepare(tmp_path / "kept", Quiet())[0]
    assert len(few.ids) == 10
    folder_of(tmp_path / "in", GREY)
    (tmp_path / "in/ape/02.png").write_bytes(b"")
    prepared(tmp_path / "kept", tmp_path / "in", rejects=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"ape/02.png: the file is empty"):
        prepared(tmp_path / "kept", tmp_path / "in")


def test_a_full_disk_is_exit_6_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    partial_path(tmp_path / "kept/images.npy").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="no space left"):
        prepared(tmp_path / "kept", npz(tmp_path / "a.npz", x=GREY, y=LABELS))
    assert not list((tmp_path / "kept").iterdir())


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "in", COLOUR)
    whole = prepared(tmp_path / "1", tmp_path / "in")
    monkeypatch.setattr(decoding, "_CHUNK", 5)
    small = prepared(tmp_path / "2", tmp_path / "in")
    assert small.digest == replace(whole, folder=small.folder).digest
    assert (tmp_path / "1/images.npy").read_bytes() == (tmp_path / "2/images.npy").read_bytes()


def test_contradictions_and_missing_classes_are_told(tmp_path: Path) -> None:
    class Heard(Quiet):
        def __init__(self) -> None:
            self.said: list[str] = []

        def warn(self, message: str) -> None:
            self.said.append(message)

    twins = np.concatenate([GREY, GREY[:3]])
    data = npz(tmp_path / "a.npz", x=twins, y=[*LABELS, "ape", "ape", "ape"])
    test = npz(tmp_path / "t.npz", x=COLOUR[:2, ..., 0], y=["ape", "ape"])
    (tmp_path / "kept").mkdir()
    heard = Heard()
    inputs(data, test=str(test)).prepare(tmp_path / "kept", heard)
    assert heard.said == [
        "3 images have the same pixels as one before them; 1 of them under another label",
        'no test image is labelled "bee"',
    ]

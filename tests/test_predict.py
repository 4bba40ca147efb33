"""Predictions on own images: what is read, what is seen, what is written, what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from base.base_model import ModelOutput
from base.image_files import decode, to_rgb
from data_loader.transforms import EvalTransform, NoTransform
from scripts.predict import main
from scripts.predicting.images import FORMATS, Found, batches, find
from scripts.predicting.student import Predictor, spans, trained_steps
from tests.helpers import PROJECT, train, write_config
from tests.networks import fill_by_name
from trainer import evaluation
from trainer.build import build_data, build_method, build_student, build_task
from trainer.checks import with_settings
from utils.errors import UserError
from utils.files import write_json
from utils.metric import ConfusionMatrix
from utils.parse_config import ConfigParser
from utils.ranks import SINGLE

CPU = torch.device("cpu")


def untrained(folder, root, *flags):
    """Weights with random values in a step folder as a run leaves it, and their config."""
    config = write_config(folder / "toy.json", root)
    argv = ["-c", str(config), *flags]
    parsed = with_settings(ConfigParser.from_args("train", "configs/config_voc.json", argv=argv))
    student = build_student(parsed, build_method(parsed, build_task(parsed)))
    fill_by_name(student)
    step = parsed.step_dir()
    write_json(step / "config.json", parsed.as_dict())
    torch.save({"state_dict": student.state_dict()}, step / "checkpoint-epoch1.pth")
    return step / "checkpoint-epoch1.pth"


@pytest.fixture(scope="module")
def run(toy_root, tmp_path_factory):
    """The weights of both steps of a run."""
    folder = tmp_path_factory.mktemp("run")
    return [untrained(folder, toy_root, "--task_step", str(step)) for step in (0, 1)]


@pytest.fixture
def photos(tmp_path):
    """Three images in two folders, of two sizes."""
    folder = tmp_path / "photos"
    for number, (name, size) in enumerate(
        {"a.png": (64, 48), "sub/a.jpg": (64, 48), "sub/b.tif": (40, 70)}.items()
    ):
        pixels = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)
    return folder


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


# ------------------------------------------------------------------------------------------ reading
GREY = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))


@pytest.mark.parametrize(
    ("image", "ending"),
    [
        (Image.fromarray(GREY), "png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "tif"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "pgm"),
        (Image.fromarray(GREY).convert("P"), "gif"),
        (Image.fromarray(GREY).convert("LA"), "png"),
        (Image.fromarray(GREY).convert("RGBA"), "webp"),
        (Image.fromarray(GREY).convert("RGB").convert("CMYK"), "tif"),
        (Image.fromarray(GREY).convert("RGB"), "bmp"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_any_format_becomes_the_same_rgb(image, ending, tmp_path):
    path = tmp_path / f"image.{ending}"
    image.save(path, **({"lossless": True} if ending == "webp" else {}))
    read = to_rgb(decode(path, FORMATS))
    assert read.mode == "RGB"
    assert np.array_equal(np.asarray(read), np.stack([GREY] * 3, axis=2))


def test_folders_are_searched_and_files_taken_as_they_are(photos):
    (photos / "notes.txt").write_text("no image")
    found, left_out = find([photos, photos / "a.png"])
    assert found == [
        Found(photos / name, Path(name).with_suffix("")) for name in ("a.png", "sub/a.jpg")
    ] + [Found(photos / "sub/b.tif", Path("sub/b"))]
    assert left_out == "1 with an ending of no image (.txt)"
    assert find([photos / "notes.txt"]) == ([Found(photos / "notes.txt", Path("notes"))], "")


def test_hidden_files_and_those_of_other_systems_are_no_images(photos):
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "__MACOSX/sub/a.jpg", "@eaDir/b.jpg"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes((photos / "sub/a.jpg").read_bytes())
    found, left_out = find([photos])
    assert [str(name) for _, name in found] == ["a", "sub/a", "sub/b"]
    assert left_out == "5 hidden"
    assert find([photos / "._a.png"])[0] == [Found(photos / "._a.png", Path("._a"))], "named"
    (photos / "empty").mkdir()
    (photos / "empty/.DS_Store").touch()
    with pytest.raises(UserError, match=r"no image below .*/empty \(left out: 1 hidden\): no"):
        find([photos / "empty"])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_a_size_come_together_and_broken_ones_are_told(photos, workers):
    (photos / "broken.jpg").write_bytes((photos / "sub/a.jpg").read_bytes()[:400])
    paths = [photos / name for name in ("a.png", "broken.jpg", "sub/b.tif", "sub/a.jpg")]
    faults = []
    got = list(batches(paths, NoTransform(), pixels=10000, workers=workers, tell=faults.append))
    assert [(numbers, list(images.shape)) for numbers, images in got] == [
        ([0, 3], [2, 3, 48, 64]),
        ([2], [1, 3, 70, 40]),
    ]
    assert np.array_equal(got[0][1][0].permute(1, 2, 0), pixels_of(photos / "a.png"))
    (fault,) = faults
    assert re.fullmatch(rf"{photos}/broken\.jpg cannot be read: .+", fault)


def test_a_batch_holds_so_many_pixels_at_most(photos):
    paths = [photos / "a.png"] * 5
    for pixels, sizes in ((3 * 64 * 48, [3, 2]), (1, [1] * 5)):
        got = batches(paths, NoTransform(), pixels=pixels, workers=0, tell=print)
        assert [len(images) for _, images in got] == sizes


def test_images_that_wait_for_their_like_are_few(photos):
    """Every image of another size: none waits until all are read."""
    sizes = [(40, 10 + number) for number in range(40)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(photos / f"{number}.png")
    paths = [photos / f"{number}.png" for number in range(40)]
    seen = []

    def transform(image):
        seen.append(image.size)
        return NoTransform()(image)

    got = batches(paths, transform, pixels=40 * 50, workers=0, tell=print)
    next(got)
    assert len(seen) < 20
    assert sum(len(images) for _, images in got) == 39


# ---------------------------------------------------------------------------------------- answering
def test_crop_mode_sees_what_the_evaluation_sees(run, toy_root, tmp_path, monkeypatch):
    """Pixel by pixel, on the images of the test set."""
    seen = []

    class Recorded(ConfusionMatrix):
        def update(self, labels, preds):
            seen.extend(preds.numpy())
            super().update(labels, preds)

    monkeypatch.setattr(evaluation, "ConfusionMatrix", Recorded)
    flags = ("-r", str(run[1]), "--save_dir", str(tmp_path / "runs"))
    train(None, *flags, mode="eval")
    names = (toy_root / "ImageSets/Segmentation/val.txt").read_text().split()
    assert len(seen) == len(names)
    photos = [str(toy_root / f"JPEGImages/{name}.jpg") for name in names]
    out = tmp_path / "out"
    assert main(["-r", str(run[1]), "--mode", "crop", "--out", str(out), *photos]) == 0
    for name, preds in zip(names, seen, strict=True):
        assert np.array_equal(pixels_of(out / f"{name}.png"), preds), name
    assert len(np.unique(seen)) > 10, "one class everywhere proves nothing"


@pytest.mark.parametrize("mode", ["crop", "whole"])
def test_evaluation_and_prediction_see_the_same_image(run, toy_root, tmp_path, mode):
    """Of images that could be read in more than one way: turned by EXIF, or of 16 bits."""
    root = Path(shutil.copytree(toy_root, tmp_path / "toy"))
    exif = Image.Exif()
    exif[0x0112] = 3
    for number, path in enumerate(sorted((root / "JPEGImages").iterdir())):
        image = Image.open(path)
        if number % 2:
            image.transpose(Image.Transpose.ROTATE_180).save(path, "PNG", exif=exif)
        else:
            grey = np.asarray(image.convert("L")).astype(np.uint16)
            Image.fromarray(grey * 257).save(path, "PNG")
    flags = ["-r", str(run[1]), "--data_dir", str(root)]
    if mode == "whole":
        flags += ["--set", "data_loader.args.test.args.transform=false"]
        flags += ["--set", "data_loader.args.test.batch_size=1"]
    data = build_data(ConfigParser.from_args("eval", "configs/config_voc.json", argv=flags), SINGLE)
    data.setup("test")
    samples, predictor = (
        [data.test_set[position] for position in range(6)],
        Predictor.of(run[1], CPU),
    )
    photos = [str(root / f"JPEGImages/{sample.name}.jpg") for sample in samples]
    assert main(["-r", str(run[1]), "--mode", mode, "--out", str(tmp_path / "out"), *photos]) == 0
    for sample in samples:
        (preds,) = predictor.predict(sample.image[None])
        assert np.array_equal(pixels_of(tmp_path / f"out/{sample.name}.png"), preds), sample.name


def test_an_own_order_of_classes_gives_label_ids(toy_root, tmp_path):
    flags = ("--set", "data_loader.args.task.steps=[[20, 3], [7]]", "--task_step", "1")
    predictor = Predictor.of(untrained(tmp_path, toy_root, *flags), CPU)
    ids = predictor.predict(torch.randint(256, (1, 3, 48, 48), dtype=torch.uint8))
    assert ids.dtype == np.uint8
    found = set(np.unique(ids).tolist())
    assert len(found) > 1
    assert found <= {0, 20, 3, 7}
    assert predictor.names[3] == "yellow square (step 0)"
    assert predictor.names[7] == "cyan checked hexagon (step 1)"


def test_examples_of_a_validation_are_what_the_student_sees(run, toy_root):
    predictor = Predictor.of(run[1], CPU)
    data = build_data(predictor.config, SINGLE)
    data.setup("val")
    judge = evaluation.Evaluation(
        predictor.config, SINGLE, data=data, method=predictor.method, student=predictor.model
    )
    state = torch.get_rng_state()
    examples = judge.examples()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(examples) == 4
    for number, (image, labels, preds) in enumerate(examples):
        sample = data.val_set[number]
        assert np.array_equal(image, sample.image.permute(1, 2, 0))
        assert np.array_equal(preds, predictor.predict(sample.image[None])[0])
        assert set(np.unique(labels).tolist()) <= {0, 255, *predictor.task.new}


@pytest.mark.parametrize("method", ["dkd", "mib", "ssul"])
def test_scores_are_of_the_winner(method, toy_root, tmp_path):
    """From 0 to 1; of a class what `confident` says, of background what that leaves."""
    predictor = Predictor.of(untrained(tmp_path, toy_root, "--method", method), CPU)
    images = torch.randint(256, (2, 3, 40, 56), dtype=torch.uint8)
    ids, scores = predictor.scored(images)
    assert ids.shape == scores.shape == (2, 40, 56)
    assert np.array_equal(ids, predictor.predict(images))
    assert 0 <= scores.min() < scores.max() <= 1
    with torch.inference_mode():
        output, size = predictor._see(images, False)
        channels, confident = (part.numpy() for part in predictor.method.confident(output, size))
    wins = ids > 0
    assert wins.any()
    assert np.array_equal(predictor.label_ids[channels][wins], ids[wins])
    assert np.array_equal(scores, np.where(wins, confident, 1 - confident))


@pytest.mark.parametrize(("length", "side"), [(10, 3), (10, 10), (4, 9), (11, 4), (3, 1)])
def test_windows_cover_the_image_and_end_with_it(length, side):
    found = spans(length, side, max(1, side * 2 // 3))
    assert found[0].start == 0
    assert found[-1].stop == length
    assert {row for span in found for row in range(span.start, span.stop)} == set(range(length))
    assert all(span.stop - span.start == min(side, length) for span in found)


def test_windows_are_averaged_on_the_grid_of_the_features(run):
    """Of a network that looks at each cell alone they give the whole image's features."""
    predictor = Predictor.of(run[0], CPU)
    sizes = []

    def network(pixels):
        sizes.append(tuple(pixels.shape[2:]))
        return ModelOutput(F.avg_pool2d(pixels, 16))

    predictor._network = network
    pixels = torch.rand(2, 3, 16 * 5, 16 * 7)
    whole = F.avg_pool2d(pixels, 16)
    assert torch.allclose(predictor.windows(pixels).logits, whole, atol=1e-6)
    assert sizes == [(48, 48)] * (2 * 3)


def test_an_image_of_one_window_is_seen_as_a_whole(run):
    predictor = Predictor.of(run[1], CPU)
    images = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    assert np.array_equal(predictor.predict(images, slide=True), predictor.predict(images))
    odd = predictor.predict(images[..., :31, :47], slide=True)
    assert odd.shape == (2, 31, 47)


@pytest.mark.parametrize("slide", [False, True])
def test_the_smallest_image_has_an_answer(run, slide):
    images = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    assert Predictor.of(run[0], CPU).predict(images, slide=slide).shape == (1, 1, 1)


def test_label_ids_beyond_a_byte(toy_root, tmp_path):
    """16-bit grey PNGs that hold them."""
    names = ["background", *(f"class {number}" for number in range(1, 301))]
    flags = ("--set", f"data_loader.args.class_names={json.dumps(names)}")
    flags += ("--set", "data_loader.args.task.steps=[[299, 300]]")
    weights = untrained(tmp_path, toy_root, *flags)
    photo = next((toy_root / "JPEGImages").glob("*.jpg"))
    assert main(["-r", str(weights), "--out", str(tmp_path / "out"), str(photo)]) == 0
    with Image.open(tmp_path / "out" / f"{photo.stem}.png") as image:
        assert image.mode == "I;16"
        assert {299, 300} & set(np.unique(np.asarray(image)).tolist())


def test_classes_of_a_data_set_that_is_not_there_have_numbers(monkeypatch):
    monkeypatch.setenv("DKD_ADE_ROOT", "/nowhere")
    task = build_task(ConfigParser.from_args("train", "configs/config_ade.json", argv=[]))
    assert task.class_names[150] == "class 150"
    assert task.channel_names()[0] == "background"


# ------------------------------------------------------------------------------------------ writing
def test_every_image_has_its_files_in_its_folder(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["-r", str(run[1]), "--out", str(out), "--scores", str(photos)]) == 0
    assert "3 of 3 images" in capsys.readouterr().out
    kinds = (".png", "_overlay.jpg", "_score.png")
    expected = {f"{name}{kind}" for name in ("a", "sub/a", "sub/b") for kind in kinds}
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == expected | {"classes.json"}
    with Image.open(photos / "sub/b.tif") as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    (ids,), (scores,) = Predictor.of(run[1], CPU).scored(pixels[None])
    assert np.array_equal(pixels_of(out / "sub/b.png"), ids)
    assert np.abs(pixels_of(out / "sub/b_score.png") / 255 - scores).max() <= 0.5 / 255 + 1e-6
    with Image.open(out / "sub/b_overlay.jpg") as image:
        assert image.width > 40, "the legend needs more"
        assert image.height > 70 + 14


def test_the_classes_are_told(run, photos, tmp_path):
    main(["-r", str(run[1]), "--out", str(tmp_path / "out"), str(photos)])
    rows = json.loads((tmp_path / "out/classes.json").read_text())
    assert [row["id"] for row in rows] == list(range(21))
    assert rows[0] == {"id": 0, "name": "background", "step": None, "colour": [0, 0, 0]}
    assert rows[1] == {"id": 1, "name": "red disc", "step": 0, "colour": [128, 0, 0]}
    assert rows[16]["step"] == 1


def test_a_broken_image_does_not_stop_the_others(run, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(["-r", str(run[0]), "--out", str(tmp_path / "out"), str(photos)]) == 1
    told = capsys.readouterr()
    assert f"{photos / 'broken.png'} cannot be read: " in told.err
    assert "3 of 4 images" in told.out
    assert (tmp_path / "out/sub/b.png").is_file()


def refuse_above(limit, monkeypatch, error):
    """Let the network have memory for so many pixels at once."""
    network = Predictor._network

    def limited(predictor, pixels):
        if pixels.shape[0] * pixels.shape[2] * pixels.shape[3] > limit:
            raise error
        return network(predictor, pixels)

    monkeypatch.setattr(Predictor, "_network", limited)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_image_too_large_for_the_memory_is_named(
    run, photos, tmp_path, monkeypatch, capsys, error
):
    Image.new("RGB", (200, 100)).save(photos / "large.png")
    refuse_above(64 * 48, monkeypatch, error)
    for number, flags in enumerate((["-r", str(run[0])], ["--steps", str(run[0].parents[1])])):
        out = tmp_path / f"out{number}"
        assert main([*flags, "--out", str(out), str(photos)]) == 1
        told = capsys.readouterr()
        assert told.err == (
            f"{photos / 'large.png'} of 200×100 pixels is too large for the memory; try --mode "
            "slide, scale it down or cut it into parts.\n"
        )
        assert "3 of 4 images" in told.out
        answered = {path.stem.split("_")[0] for path in out.rglob("*.*") if path.suffix != ".json"}
        assert answered == {"a", "b"}, "also those of a batch that was too large"
    assert main(["-r", str(run[0]), "--mode", "slide", "--out", str(out), str(photos)]) == 0


def test_other_errors_are_no_want_of_memory(run, photos, tmp_path, monkeypatch):
    refuse_above(0, monkeypatch, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(["-r", str(run[0]), "--out", str(tmp_path / "out"), str(photos)])


@pytest.mark.slow
def test_with_little_memory_all_but_the_large_image_are_answered(run, photos, tmp_path):
    """On the machine's own allocators, in a process that may have 400 MB more than it has."""
    Image.new("RGB", (12000, 9000), "red").save(photos / "large.png")
    Image.new("RGB", (3000, 2600), "red").save(photos / "sub/larger.jpg")
    code = (
        "import resource, sys; from scripts.predict import main; import torch\n"
        "torch.set_num_threads(1)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (400 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["-r", run[0], "--out", tmp_path / "out", "--workers", "0", "-d", "cpu", photos]
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    told = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr
    assert "3 of 5 images" in done.stdout
    assert [line.split(";")[0] for line in told] == [
        f"{photos / name} of {size} pixels is too large for the memory"
        for name, size in (("large.png", "12000×9000"), ("sub/larger.jpg", "3000×2600"))
    ]


def test_the_steps_of_a_run_side_by_side(run, photos, tmp_path):
    out = tmp_path / "out"
    flags = ["--mode", "slide", "--out", str(out), str(photos / "sub/a.jpg")]
    assert main(["--steps", str(run[0].parents[1]), *flags]) == 0
    assert {path.name for path in out.iterdir()} == {"classes.json", "a_steps.jpg"}
    with Image.open(out / "a_steps.jpg") as image:
        assert image.width == 6 + 3 * (320 + 6)
        assert image.height > 26 + 240


def from_the_shell(*words):
    command = [sys.executable, PROJECT / "scripts/predict.py", "-d", "cpu", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)


def test_from_the_command_line(run, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = from_the_shell("-r", run[0], "--out", tmp_path / "out", "--workers", "1", photos)
    assert done.returncode == 1
    assert re.fullmatch(rf"{photos}/broken\.png cannot be read: .+\n", done.stderr)
    assert (tmp_path / "out/sub/a.png").is_file()


# ----------------------------------------------------------------------------------------- refusing
@pytest.mark.slow
def test_the_command_line_refuses_in_one_sentence(run, tmp_path):
    done = from_the_shell("-r", run[0], "--out", tmp_path / "out", tmp_path / "none.jpg")
    assert done.returncode == 2
    assert done.stderr == (
        f"predict.py: error: there is no image or folder {tmp_path / 'none.jpg'}.\n"
    )


def refused(*words):
    with pytest.raises(UserError) as caught:
        main([str(word) for word in words])
    return str(caught.value)


def test_images_that_cannot_be_answered(run, photos, tmp_path):
    here = ("-r", run[0], "--out")
    (tmp_path / "empty").mkdir()
    assert "no image below" in refused(*here, tmp_path / "out", tmp_path / "empty")
    assert "which is searched for images" in refused(*here, photos / "out", photos)
    both = photos / "a.png", photos / "sub/a.jpg"
    assert f"{both[0]} and {both[1]} would both be written to {tmp_path}/out/a.png" in refused(
        *here, tmp_path / "out", *both
    )
    assert "would be overwritten" in refused(*here, photos, photos / "a.png")
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_answer(run, photos, toy_root, tmp_path):
    def with_weights(path):
        return refused("-r", path, "--out", tmp_path / "out", photos)

    assert "there is no weight file" in with_weights(tmp_path / "none.pth")
    alone = tmp_path / "alone.pth"
    alone.write_bytes(run[0].read_bytes())
    assert "there is no config.json beside" in with_weights(alone)
    (tmp_path / "config.json").write_bytes((run[1].parent / "config.json").read_bytes())
    assert "does not fit the model" in with_weights(alone)
    (tmp_path / "config.json").write_text('{"data_loader": {"type": "Other"}}')
    assert "'Other', which no shipped config has" in with_weights(alone)
    alone.write_bytes(b"no weights")
    (tmp_path / "config.json").write_bytes((run[0].parent / "config.json").read_bytes())
    assert "alone.pth" in with_weights(alone)


def test_runs_and_flags_that_make_no_sense(run, photos, tmp_path):
    rest = ("--out", tmp_path / "out", photos)
    assert "has no step_0, step_1" in refused("--steps", photos, *rest)
    assert "a sheet of --steps has no scores" in refused("--steps", photos, "--scores", *rest)
    assert "--batch must be at least 1" in refused("-r", run[0], "--batch", "0", *rest)
    assert list(trained_steps(run[0].parents[1])) == [0, 1]


def test_weights_of_another_schedule_are_refused(run, photos, tmp_path):
    """The checkpoint says what it has learnt; the config beside it says something else."""
    checkpoint = torch.load(run[0], weights_only=True)
    steps = [[*range(2, 17)], [1, 17, 18, 19, 20]]
    task = {"dataset": "voc", "name": "mine", "setting": "overlap", "step": 0, "steps": steps}
    torch.save({**checkpoint, "task": task}, tmp_path / "w.pth")
    (tmp_path / "config.json").write_bytes((run[0].parent / "config.json").read_bytes())
    words = refused("-r", tmp_path / "w.pth", "--out", tmp_path / "out", photos)
    assert "is of step 0 of voc overlap mine" in words


def test_the_transform_of_crop_mode_is_that_of_the_config(run, toy_root, tmp_path):
    transform = Predictor.of(run[0], CPU).evaluated
    assert isinstance(transform, EvalTransform)
    assert transform.size == 48
    flags = ("--set", "data_loader.args.test.args.transform=false")
    flags += ("--set", "data_loader.args.test.batch_size=1")
    assert isinstance(
        Predictor.of(untrained(tmp_path, toy_root, *flags), CPU).evaluated, NoTransform
    )

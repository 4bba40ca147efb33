"""What people's machines, editors and habits bring: encodings, paths, lists, launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loader.splits import presence_table
from data_loader.voc import VOC
from scripts.predict import main as predict
from tests.helpers import train
from tests.trees import write_ade, write_voc
from trainer.checks import check_names
from utils import files, fonts, pictures, seeds
from utils.config_file import read_json
from utils.errors import UserError, one_sentence_errors
from utils.files import PROJECT_ROOT
from utils.parse_config import ConfigParser
from utils.pictures import legend
from utils.text import path_argument, path_of

VOC_CONFIG = "configs/config_voc.json"
ODD = os.fsdecode(b"caf\xe9")  # a file name that is no UTF-8


def parsed(*words: str) -> ConfigParser:
    return ConfigParser.from_args("train", VOC_CONFIG, argv=words)


# ------------------------------------------------------------------------------------------ text
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_a_config_of_any_editor(tmp_path, encoding):
    file = tmp_path / "a.json"
    file.write_bytes('{\r\n "trainer": {"save_dir": "größe"}\r\n}\r\n'.encode(encoding))
    assert read_json(file) == {"trainer": {"save_dir": "größe"}}
    assert parsed("-c", str(file))["trainer"]["save_dir"] == "größe"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": 1, // mine\n "n_gpu": 1}', "line 1, column 13: not valid JSON: JSON has no com"),
        ('# mine\n{"seed": 1}', "line 1, column 1: .*no comments"),
        ('{"seed": 1} /* mine */', "line 1, column 13: .*no comments"),
        ('{"trainer": {\n "epochs": 1,\n}}', "line 2, column 13: .*a comma before the end"),
        ('{"metrics": ["a", ]}', "line 1, column 17: .*a comma before the end"),
        ("{'seed': 1}", "line 1, column 2: .*straight double quotes"),
        ('{"use_amp": False}', "line 1, column 13: .*true, false and null"),
        (r'{"name": "C:\data"}', "a backslash begins an escape"),
        ('{"seed" 1}', "line 1, column 9: not valid JSON: Expecting ':'"),
    ],
)
def test_what_is_no_json(tmp_path, text, message):
    file = tmp_path / "a.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_json(file)


def test_a_config_of_another_encoding(tmp_path):
    (tmp_path / "a.json").write_bytes('{"name": "größe"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"neither UTF-8 nor UTF-16 .*save it as UTF-8"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_console_that_cannot_show_everything(encoding):
    program = (
        "from utils.errors import UserError, one_sentence_errors\n"
        "from utils.logger import log, setup_logger\n"
        "with one_sentence_errors():\n"
        "    setup_logger(None)\n"
        "    log.info('30×40 猫 \\udce9…')\n"
        "    raise UserError('30×40 猫')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT_ROOT,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"\\u732b" in done.stdout
    assert b"\\udce9" in done.stdout
    assert b"Traceback" not in done.stderr
    assert b"\\u732b" in done.stderr


def test_the_log_is_utf_8(tmp_path):
    from utils.logger import close_logger, log, setup_logger

    setup_logger(tmp_path / "info.log")
    log.info("30×40 %s", ODD)
    close_logger()
    assert r"30×40 caf\udce9" in (tmp_path / "info.log").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------- paths
def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINE", "my data")
    (tmp_path / "mine.json").write_text('{"trainer": {"save_dir": "~/runs/"}}')
    config = parsed(
        *("-c", "~/mine.json", "--data_dir=~/data", "--saliency_dir", "$HOME/${MINE}/maps"),
        *("--set", "data_loader.args.task.idxs_path=~/lists", "--base", "~/step_0"),
        *("--set", "arch.args.backbone_pretrained=~/net.pth"),
    )
    args = config["data_loader"]["args"]
    assert args["data_dir"] == f"{tmp_path}/data"
    assert args["saliency_dir"] == f"{tmp_path}/my data/maps"
    assert args["task"]["idxs_path"] == f"{tmp_path}/lists"
    assert config["arch"]["args"]["backbone_pretrained"] == f"{tmp_path}/net.pth"
    assert config.call.base == tmp_path / "step_0"
    assert config.step_dir().is_relative_to(tmp_path / "runs")
    monkeypatch.setenv("DKD_VOC_ROOT", "~/voc")
    assert VOC.find_root() == tmp_path / "voc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("$NOBODY_SET_THIS/x", "the environment has no variable NOBODY_SET_THIS"),
        ("${NOBODY_SET_THIS}", "the environment has no variable NOBODY_SET_THIS"),
        ('"/data/voc"', "with quotes in it"),
        ("/data/voc ", "with blanks at its beginning or end"),
        (r"C:\data\voc", "with backslashes"),
        ("~nobody_at_all/x", "the home folder of ~nobody_at_all"),
    ],
)
def test_paths_that_cannot_be_meant(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--data_dir.*{message}"):
        parsed("--data_dir", text)


@pytest.mark.parametrize("name", ["a b", "it's", "'quoted'", " blank ", "back\\slash", "a$b"])
def test_a_path_that_exists_is_meant(tmp_path, name):
    (tmp_path / name).mkdir()
    assert path_of(str(tmp_path / name), "") == str(tmp_path / name)


# ----------------------------------------------------------------------------------------- lists
def voc(tmp_path: Path, lines: str | bytes, split: str = "train") -> VOC:
    root = tmp_path / "voc"
    if not root.exists():
        write_voc(root, {"a": [1], "b": [2]})
    name = {"train": "train_aug.txt", "val": "val.txt"}[split]
    content = lines if isinstance(lines, bytes) else lines.encode()
    (root / "ImageSets" / "Segmentation" / name).write_bytes(content)
    return VOC(split, str(root))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "line",
    [
        *("a", "a.jpg", "'a'", '"a"', "a\r", "\ta ", "\\JPEGImages\\a.jpg {0}\\a.png"),
        *("JPEGImages\\a.jpg {0}\\a.png", '"JPEGImages/a.jpg"\t"{0}/a.png"'),
        "{1}/JPEGImages/a.jpg {1}/{0}/a.png",
    ],
)
def test_lines_as_people_write_them(tmp_path, split, line):
    masks = {"train": "SegmentationClassAug", "val": "SegmentationClass"}[split]
    data = voc(tmp_path, line.format(masks, tmp_path / "voc") + "\n", split)
    (entry,) = data.entries
    assert (entry.id, entry.image) == ("a", data.root / "JPEGImages" / "a.jpg")
    assert entry.mask == data.root / masks / "a.png"
    pair = f"/JPEGImages/a.jpg /{masks}/a.png"
    assert entry.line == ("a" if split == "val" and len(line.split()) == 1 else pair)
    assert data.load(0)[1].shape


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le"])
def test_lists_of_any_editor(tmp_path, encoding):
    assert voc(tmp_path, "a\r\nb\r\n".encode(encoding)).entries[1].id == "b"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.png\n", "line 1: 'a.png' has an ending, but an id has none"),
        ("my cat\n", "line 1: 'my cat' is neither an id, which has no blanks"),
        ("/bin/sh /bin/sh\n", "line 1: /bin/sh lies outside of the data set's folder"),
        (
            "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n"
            "/SegmentationClass/a.png /SegmentationClassAug/a.png\n",
            "answers, saliency maps and memory.json go by the name alone, so rename one",
        ),
    ],
)
def test_lines_that_cannot_be_meant(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        voc(tmp_path, lines)


def test_an_id_may_end_like_an_image(tmp_path):
    root = write_voc(tmp_path / "voc", {"a.jpg": [1], "b.png": [1]})
    entries = voc(tmp_path, "a.jpg\nb.png\n").entries
    assert [entry.id for entry in entries] == ["a.jpg", "b.png"]
    assert all(entry.image.is_relative_to(root) and entry.image.exists() for entry in entries)


def test_names_of_files_are_bytes(tmp_path):
    data = voc(tmp_path, b"caf\xe9\n", "val")
    Image.new("RGB", (8, 6)).save(data.root / "JPEGImages" / f"{ODD}.jpg")
    Image.fromarray(np.ones((6, 8), np.uint8)).save(data.root / "SegmentationClass" / f"{ODD}.png")
    assert data.load(0)[1].shape == (6, 8)
    assert presence_table(data, tmp_path / "cache").shape[0] == 1
    files.write_json(tmp_path / "a.json", {"image": data.entries[0].id})
    assert read_json(tmp_path / "a.json") == {"image": ODD}
    assert seeds.seed_from(ODD) != seeds.seed_from("caf")


def test_class_names_are_text(tmp_path):
    root = write_ade(tmp_path / "ade")
    names = root / "objectInfo150.txt"
    names.write_bytes(names.read_bytes().replace(b"thing 7,", b"caf\xe9,"))
    from data_loader.ade import ADE

    with pytest.raises(UserError, match=r"the name of class 7 .*caf\\udce9.*save the file .*UTF-8"):
        ADE("val", str(root))


# --------------------------------------------------------------------------------------- legends
def test_a_legend_in_another_script():
    def drawn(name: str) -> bytes:
        return legend({1: name}, 200).tobytes()

    assert len({drawn(name) for name in ("кош", "шок", "éte", "ête", "δέλ")}) == 5


def test_a_legend_without_a_font(monkeypatch):
    warnings = []
    own = fonts._files()[:1]  # Matplotlib's
    monkeypatch.setattr(fonts, "_files", lambda: own)
    fonts.font_for.cache_clear()
    pictures._warn_of.cache_clear()
    monkeypatch.setattr(pictures.log, "warning", lambda *words: warnings.append(words[1:]))
    assert legend({12: "猫"}, 200).tobytes() == legend({12: "12"}, 200).tobytes()
    legend({12: "猫"}, 300)
    assert warnings == [("猫", 12)]
    fonts.font_for.cache_clear()


# ---------------------------------------------------------------------------- memory and launchers
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_too_little_memory_in_a_sentence(error, capsys):
    with pytest.raises(SystemExit) as ended, one_sentence_errors():
        raise error
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert "there is too little memory" in text
    assert "--batch_size" in text
    assert text.count("\n") == 1


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shapes"), one_sentence_errors():
        raise RuntimeError("shapes differ")


def test_a_batch_beyond_the_machine_is_refused(toy_config, monkeypatch):
    monkeypatch.setattr("trainer.checks.memory_limit", lambda: 1 << 30)
    key = "data_loader.args.val.args.transform_args.crop_size"
    with pytest.raises(UserError, match=r"crops of 9000×9000 .*lower data_loader\.args\.val"):
        train(toy_config, "--set", f"{key}=9000")


def test_the_old_launchers_rank(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc_per_node N"):
        parsed("--local_rank=0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parsed("--local-rank=1", "--seed", "4")["seed"] == 4
    with pytest.raises(UserError, match="LOCAL_RANK, which decides, is 1"):
        parsed("--local-rank", "0")


# ----------------------------------------------------------------------------- what is optional
def test_tensorboard_is_tried_first(monkeypatch):
    config = parsed("--set", "trainer.tensorboard=true")
    for broken in (None, type("Broken", (), {"SummaryWriter": None})):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
        with pytest.raises(UserError, match=r"trainer\.tensorboard is true, but .*pip install"):
            check_names(config)


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: no such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -O1")
    with pytest.raises(UserError, match=r"fast\.compile .*fatal error: Python\.h: no such file"):
        check_names(parsed("--set", "fast.compile=true"))


def test_paths_of_the_scripts(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_argument("~/runs/") == tmp_path / "runs"
    with pytest.raises(SystemExit) as ended:
        predict(["$NOBODY_SET_THIS/a.jpg", "-r", "a.pth", "--out", "b"])
    assert ended.value.code == 2
    assert "the environment has no variable NOBODY_SET_THIS" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["C:\\\\data", "$NOWHERE/voc", "'quoted'"])
def test_paths_of_another_machine_beside_weights_are_no_fault(tmp_path, path):
    """They are replaced by this machine's, or told when the data are looked for."""
    (tmp_path / "w.pth").touch()
    tree = {"data_loader": {"type": "VOCIncrementalDataLoader", "args": {"data_dir": path}}}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    argv = ["-r", str(tmp_path / "w.pth")]
    config = ConfigParser.from_args("eval", "configs/config_voc.json", argv=argv)
    assert config["data_loader"]["args"]["data_dir"] == path
    config = ConfigParser.from_args(
        "eval", "configs/config_voc.json", argv=[*argv, "--data_dir=/x"]
    )
    assert config["data_loader"]["args"]["data_dir"] == "/x"

"""The figures of reports, from matrices written by hand and worked out on paper."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.reporting import figures, pictures, published, summary
from scripts.reporting.figures import Convention
from scripts.reporting.reading import fingerprint
from scripts.reporting.results import Run
from scripts.reporting.runs import find_runs
from scripts.reporting.sections import make_sections
from tests.results import SCHEDULE, STEP_0, STEP_1, a_test
from utils.errors import UserError
from utils.metric import merge_future


def a_run(root, **changes) -> Run:
    a_test(root, STEP_0, 0, **changes)
    a_test(root, STEP_1, 1, **changes)
    return found(root)[-1]


def found(*paths):
    runs, _ = find_runs([str(path) for path in paths])
    return runs


def iou(matrix, channel):
    return (
        100
        * matrix[channel, channel]
        / (matrix[channel].sum() + matrix[:, channel].sum() - matrix[channel, channel])
    )


def test_a_wide_matrix_is_folded_as_the_convention_asks():
    as_background = [[86, 14, 10], [5, 40, 5], [0, 10, 40]]
    assert merge_future(STEP_0, 0).tolist() == as_background
    assert merge_future(STEP_0, 255).tolist() == STEP_0[:3].tolist()
    assert merge_future(STEP_1, 0).tolist() == merge_future(STEP_1, 255).tolist() == STEP_1.tolist()
    assert STEP_0[0, 0] == 80, "the wide matrix stays as it is"


def test_a_metrics_file_tells_every_class_and_both_matrices(tmp_path):
    content = json.loads(a_test(tmp_path, STEP_0, 0).read_text())
    assert [row["name"] for row in content["classes"]] == ["background", "cat", "dog"]
    assert [row["pixels"] for row in content["classes"]] == [110, 50, 50]
    assert content["future_classes"] == [{"label_id": 3, "name": "cow", "pixels": 10}]
    assert content["wide"] == STEP_0.tolist()
    assert content["confusion"] == merge_future(STEP_0, 0).tolist()


def test_learning_forgetting_and_backward_transfer():
    # cat 60 → 80 → 50, dog 70 → 30 → 40 (steps 0, 1, 2); cow arrives at 1: 20 → 10; hen at 2: 90
    iou = np.array([[60, 80, 50], [70, 30, 40], [np.nan, 20, 10], [np.nan, np.nan, 90]], float)
    told = figures.over_steps(iou, np.array([0, 0, 1, 2]))
    assert told["learning"] == pytest.approx((20 + 90) / 2)
    assert told["forgetting"] == pytest.approx(((80 - 50) + (70 - 40) + (20 - 10)) / 3)
    assert told["BWT"] == pytest.approx(((50 - 60) + (40 - 70) + (10 - 20)) / 3)
    joint = np.array([65, 75, 50, 80], float)
    expected = ((65 - 60) + (75 - 70) + (50 - 20) + (80 - 90)) / 4
    assert figures.intransigence(iou, np.array([0, 0, 1, 2]), joint) == pytest.approx(expected)


def test_where_the_pixels_of_old_classes_go(tmp_path):
    run = a_run(tmp_path)
    # cat and dog have 100 pixels: 70 right, 10 background, 10 dog instead of cat, 10 cow
    expected = {"itself": 70.0, "background": 10.0, "old": 10.0, "new": 10.0}
    assert figures.flows(run.results[1], SCHEDULE) == expected
    assert figures.flows(run.results[0], SCHEDULE) is None


def test_figures_of_a_run(tmp_path):
    run = a_run(tmp_path)
    told = figures.run_figures(run, SCHEDULE, None)
    cat, dog, cow = (iou(STEP_1, k) for k in (1, 2, 3))
    background = iou(STEP_1, 0)
    assert told["old"] == pytest.approx((background + cat + dog) / 3)
    assert told["new"] == told["learning"] == pytest.approx(cow)
    assert told["hIoU"] == pytest.approx(2 * told["old"] * cow / (told["old"] + cow))
    assert told["all"] == pytest.approx((background + cat + dog + cow) / 4)
    before = merge_future(STEP_0, 0)
    first = np.mean([iou(before, k) for k in range(3)])
    assert told["average"] == pytest.approx((first + told["all"]) / 2)
    lost = [iou(before, k) - iou(STEP_1, k) for k in (1, 2)]
    assert told["forgetting"] == pytest.approx(np.mean(lost))
    assert told["BWT"] == pytest.approx(-np.mean(lost))
    assert told["intransigence"] is None


@pytest.mark.parametrize(
    ("convention", "matrix", "old", "everything"),
    [
        (Convention(), merge_future(STEP_0, 0), (0, 1, 2), (0, 1, 2)),
        (Convention(future=255), STEP_0[:3], (0, 1, 2), (0, 1, 2)),
        (Convention(background=False), merge_future(STEP_0, 0), (1, 2), (1, 2)),
        (
            Convention(label_0=False, future=255),
            np.array([[0, 0, 0], [5, 40, 5], [0, 10, 40]]),
            (1, 2),
            (1, 2),
        ),
    ],
)
def test_a_convention_counts_what_it_says(tmp_path, convention, matrix, old, everything):
    (tmp_path / "a").mkdir()
    run = a_run(tmp_path / "a")
    told = figures.grouped(run.results[0], SCHEDULE, convention)
    assert told["all"] == pytest.approx(np.mean([iou(matrix, k) for k in everything]))
    assert told["old"] is None, "one group at step 0"
    assert old == everything


def test_old_without_background_and_absent_classes(tmp_path):
    run = a_run(tmp_path)
    last = run.results[1]
    told = figures.grouped(last, SCHEDULE, Convention(old_background=False))
    assert told["old"] == pytest.approx((iou(STEP_1, 1) + iou(STEP_1, 2)) / 2)
    assert told["all"] == figures.grouped(last, SCHEDULE)["all"]
    absent = STEP_1.copy()
    absent[3], absent[:, 3] = 0, 0  # no cow, neither in truth nor in predictions
    channels = {0: 0, 1: 1, 2: 2, 3: 3}
    zero = figures.mean_iou(absent, channels, SCHEDULE, Convention())
    out = figures.mean_iou(absent, channels, SCHEDULE, Convention(absent=False))
    assert (zero["new"], out["new"]) == (0.0, None)
    assert out["all"] == pytest.approx(zero["all"] * 4 / 3)


def test_a_joint_run_is_seen_in_any_schedule(tmp_path):
    a_run(tmp_path / "a")
    file = a_test(tmp_path / "b", STEP_1, 0, name="j-s1-joint", method="ft", joint=True)
    content = json.loads(file.read_text()) | {"steps": [[1, 2, 3]]}
    file.write_text(json.dumps(content))
    sections, _ = make_sections(found(tmp_path))
    (section,) = sections
    assert [group.label for group in section.groups] == ["DKD", "joint (FT)"]
    (task,) = summary.make_report(sections, [], [])["tasks"]
    mine, joint = task["methods"]
    assert joint["summary"]["old"]["mean"] == mine["summary"]["old"]["mean"]
    # the joint matrix is that of step 1: what a class lost since its step is the intransigence
    before = [iou(merge_future(STEP_0, 0), k) for k in (1, 2)] + [iou(STEP_1, 3)]
    upper = [iou(STEP_1, k) for k in (1, 2, 3)]
    expected = np.mean(np.array(upper) - before)
    assert mine["summary"]["intransigence"]["mean"] == pytest.approx(expected)


def test_seeds_are_one_row_and_other_methods_others(tmp_path):
    for seed in (1, 2, 3):
        a_run(tmp_path, name=f"DKD-s{seed}", seed=seed)
    a_run(tmp_path, name="MIB-s1", seed=1, method="mib")
    sections, _ = make_sections(found(tmp_path))
    (task,) = summary.make_report(sections, [], [])["tasks"]
    assert [(m["label"], m["seeds"]) for m in task["methods"]] == [("MiB", [1]), ("DKD", [1, 2, 3])]
    assert task["methods"][1]["summary"]["all"]["n"] == 3
    assert task["methods"][1]["summary"]["all"]["std"] == 0
    assert task["methods"][0]["summary"]["all"]["std"] is None
    assert any("Seeds are not equally many: MiB 1, DKD 3." in w for w in task["warnings"])


def test_the_deviation_over_seeds_is_that_of_the_sample(tmp_path):
    """mIoU 40, 50 and 60: √(100 + 0 + 100) / √2 = 10; that of a population were 8.16."""
    for seed, (right, wrong) in enumerate(((4, 3), (2, 1), (3, 1)), start=1):
        # IoU of background and cat: right / (right + 2 · wrong)
        wide = np.array([[right, wrong], [wrong, right], [0, 0], [0, 0]])
        a_test(tmp_path, wide, 0, name=f"A-s{seed}", seed=seed, steps=[[1], [2, 3]])
    sections, _ = make_sections(found(tmp_path))
    (method,) = summary.make_report(sections, [], [])["tasks"][0]["methods"]
    expected = {"mean": pytest.approx(50), "std": pytest.approx(10), "n": 3}
    assert method["summary"]["all"] == expected
    assert method["curve"] == [{"step": 0, **expected}]


def test_a_comparison_that_is_not_fair_is_told(tmp_path):
    a_run(tmp_path, name="A-s1")
    other = {"test": {"images": 9, "sha256": "cd" * 32, "published": None}}
    a_run(tmp_path, name="B-s1", method="mib", lists=other, version="0.1", future=0)
    sections, _ = make_sections(found(tmp_path))
    told = summary.make_report(sections, [], [])["tasks"][0]["warnings"]
    assert "Not the same test images: 9 (cdcdcdcd): MiB; 7 (abababab): DKD." in told


def test_conventions_of_a_method(tmp_path):
    run = a_run(tmp_path)
    rows = {r["convention"]: r for r in summary.convention_rows([run.results[0]], SCHEDULE)}
    first = rows["as evaluated"]
    assert (first["change"], first["published"]) == (0, True)
    counted = rows["future classes not counted"]
    assert counted["all"] == pytest.approx(np.mean([iou(STEP_0[:3], k) for k in range(3)]))
    assert counted["change"] == pytest.approx(counted["all"] - first["all"])
    assert not counted["published"]


def test_further_passes_are_rows_of_the_card(tmp_path):
    file = a_run(tmp_path).results[1].file
    of = fingerprint(json.loads(file.read_text()))
    passes = {"whole images": (2 * np.eye(4, dtype=int)).tolist()}
    (file.parent / "protocol.json").write_text(json.dumps({"of": of, "passes": passes}))
    (run,) = found(tmp_path)
    rows = {r["convention"]: r for r in summary.convention_rows([run.results[1]], SCHEDULE)}
    assert rows["whole images"]["all"] == 100
    assert rows["whole images"]["change"] == pytest.approx(100 - rows["as evaluated"]["all"])


def test_published_figures_and_verdicts():
    five, released = published.published("voc", "overlap", "15-1", "DKD")
    assert five == ("DKD, five runs", 55.21, 69.67, 0.49, 5, True)
    assert released == ("DKD, released weights", 57.46, 70.50, None, 0, True)
    assert published.published("ade", "overlap", "100-10", "MiB")[0].overall == 29.24
    assert published.published("voc", "disjoint", "10-1", "DKD") == []
    (mib,) = published.published("voc", "overlap", "15-5", "MiB")
    assert (mib.overall, mib.background) == (69.0, False), "MiB's paper leaves background out"
    assert published.published("voc", "overlap", "15-5", "joint")[0].harmonic is None
    # 2·sqrt(0.49²/5 + 0.1²/2) = 0.46
    ours = [69.9, 69.9 + 0.1 * 2**0.5]
    assert published.verdict(five, ours) == "agrees: 0.30 apart, band 0.46"
    assert published.verdict(five, [value - 2 for value in ours]).startswith("below: 1.70 apart")
    assert published.verdict(released, [70.46]) == "as the released file"


def test_an_old_file_is_still_read(tmp_path):
    run = a_run(tmp_path)
    file = run.results[1].file
    content = json.loads(file.read_text())
    for key in ("wide", "future_classes", "steps", "joint", "seed", "lists", "protocol"):
        del content[key]
    file.write_text(json.dumps(content))
    config = tmp_path / "models/overlap_2-1_toy-s1/step_1/config.json"
    config.parent.mkdir(parents=True)
    steps = [list(ids) for ids in SCHEDULE]
    config.write_text(json.dumps({"seed": 4, "data_loader": {"args": {"task": {"steps": steps}}}}))
    old = found(tmp_path)[0].results[1]
    assert (old.schedule, old.seed, old.future) == (SCHEDULE, 4, 0)
    assert figures.grouped(old, SCHEDULE) == figures.grouped(run.results[1], SCHEDULE)
    config.unlink()
    with pytest.raises(UserError, match=r"does not tell the steps of task '2-1', and there is no"):
        make_sections(found(tmp_path))


def test_runs_are_found_by_their_folders_and_by_patterns(tmp_path):
    for name in ("A", "B"):
        a_run(tmp_path, name=name)
    (tmp_path / "models/overlap_2-1_A/step_0").mkdir(parents=True)
    for path, names in {
        "": "AB",
        "log": "AB",
        "log/overlap_2-1_A": "A",
        "models/overlap_2-1_A": "A",
        "models/overlap_2-1_A/step_0": "A",
        "log/*_B": "B",
    }.items():
        runs = found(tmp_path / path)
        assert "".join(run.name[-1] for run in runs) == names, path
    assert [*found(tmp_path / "models/overlap_2-1_A/step_0")[0].results] == [0]


def test_what_is_no_run_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no tested step, log/RUN/step_N/metrics.json"):
        find_runs([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"there is no folder .*nothing; name a run's, or one that"):
        find_runs([str(tmp_path / "nothing")])
    a_run(tmp_path, name="A")
    a_run(tmp_path, name="B", dataset="ade")
    with pytest.raises(UserError, match=r"sets: the data set is .voc. in .*_A and .ade. in"):
        make_sections(found(tmp_path))
    for other in (tmp_path / "log/overlap_2-1_B").rglob("metrics.json"):
        other.write_text(other.read_text().replace('"ade"', '"voc"').replace('"cat"', '"car"'))
    with pytest.raises(UserError, match=r"label id 1 is 'cat' in .*_A and 'car' in .*_B; give one"):
        make_sections(found(tmp_path))
    file = tmp_path / "log/overlap_2-1_A/step_0/metrics.json"
    file.write_text('{"dataset": "voc"}')
    with pytest.raises(UserError, match=r"metrics.json: task is missing; delete it and test the"):
        find_runs([str(file.parent)])


def one_task(*paths):
    sections, left = make_sections(found(*paths))
    (task,) = summary.make_report(sections, left, [])["tasks"]
    return task


def test_an_unfinished_task_is_not_compared_with_published_results(tmp_path):
    """Though its images are the published ones."""
    lists = {"test": {"images": 1449, "sha256": "ef" * 32, "published": True}}
    protocol = {"future_classes": 0, "background": True, "images": "centre crop 512"}
    as_published = {"task": "15-5", "lists": lists, "protocol": protocol}
    a_run(tmp_path, **as_published)
    done = one_task(tmp_path)["methods"][0]
    assert [row["source"] for row in done["published"]] == [
        "DKD, five runs",
        "DKD, released weights",
    ]
    assert done["published"][0]["here"]["all"] == done["summary"]["all"]["mean"]
    for file in tmp_path.rglob("metrics.json"):
        more = json.loads(file.read_text()) | {"steps": [*SCHEDULE, [4]]}
        file.write_text(json.dumps(more))
    task = one_task(tmp_path)
    assert (task["last"], task["end"]) == (1, 2)
    assert task["methods"][0]["published"] == []
    assert "No run has come to step 2: figures are those of step 1." in task["warnings"]


def test_a_published_figure_without_background_is_compared_without(tmp_path):
    lists = {"test": {"images": 1449, "sha256": "ef" * 32, "published": True}}
    protocol = {"future_classes": 0, "background": True, "images": "centre crop 512"}
    a_run(tmp_path, method="mib", task="15-5", lists=lists, protocol=protocol)
    (row,) = one_task(tmp_path)["methods"][0]["published"]
    assert row["source"] == "MiB, without background"
    assert row["here"]["all"] == pytest.approx(np.mean([iou(STEP_1, k) for k in (1, 2, 3)]))


def test_without_background_channel_0_is_no_class(tmp_path):
    """Label 0 is a class then, and channel 0 what is hidden."""
    confusion = np.array([[0, 0, 0], [9, 30, 1], [0, 10, 40]])
    told = figures.mean_iou(confusion, {0: 1, 7: 2}, ((0,), (7,)), Convention(), background=False)
    assert told["old"] == pytest.approx(iou(confusion, 1))
    assert told["all"] == pytest.approx((iou(confusion, 1) + iou(confusion, 2)) / 2)


def test_figures_over_steps_need_every_step(tmp_path):
    a_test(tmp_path, STEP_1, 1)
    task = one_task(tmp_path)
    figures_of = task["methods"][0]["summary"]
    assert figures_of["all"]["mean"] > 0
    assert all(figures_of[key] is None for key in ("average", "forgetting", "BWT", "learning"))
    assert (
        "overlap_2-1_toy-s1 has no test of step 0: no figures over the steps." in task["warnings"]
    )


def test_runs_without_configs_are_known_by_their_names(tmp_path):
    a_run(tmp_path, name="slow-s1", seed=1)
    a_run(tmp_path, name="slow-s2", seed=2)
    a_run(tmp_path, name="quick-s1", seed=1)
    a_run(tmp_path, name="quick_M-s1", seed=1, memory=100)
    task = one_task(tmp_path)
    assert [m["label"] for m in task["methods"]] == ["DKD, quick", "DKD, slow", "DKD-M"]
    assert [m["seeds"] for m in task["methods"]] == [[1], [1, 2], [1]]


def test_a_memory_makes_another_method_from_step_1_on(tmp_path):
    """At step 0 nothing is replayed, whatever the config says."""
    for name, memory in (("A", 0), ("B", 100)):
        a_test(tmp_path / "first", STEP_0, 0, name=name, memory=memory)
        a_run(tmp_path / "both", name=name, memory=memory)
    first, both = one_task(tmp_path / "first"), one_task(tmp_path / "both")
    assert [method["label"] for method in first["methods"]] == ["DKD, A", "DKD, B"]
    assert [method["label"] for method in both["methods"]] == ["DKD", "DKD-M"]


def test_another_global_batch_is_another_row(tmp_path):
    for name, batch in (("A-s1", 16), ("A-s2", 24)):
        run = a_run(tmp_path, name=name)
        history = {"device": "cpu", "global_batch": batch, "peak_memory_mib": 1.0, "epochs": []}
        (run.results[1].file.parent / "history.json").write_text(json.dumps(history))
    task = one_task(tmp_path)
    assert [m["label"] for m in task["methods"]] == ["DKD, A", "DKD, A #2"], "a label of its own"
    assert task["configs"] == [{"key": "global batch", "values": ["16", "24"]}]


def test_what_a_step_cost(tmp_path):
    """Means over the seeds: of whole epochs, of the minutes; and the highest peak."""
    for seed, peak, seconds in ((1, 100.0, (60, 90, 30)), (2, 300.0, (120, 150)), (3, None, ())):
        run = a_run(tmp_path, name=f"DKD-s{seed}", seed=seed)
        epochs = [{"epoch": n, "seconds": s, "whole": s != 30} for n, s in enumerate(seconds, 1)]
        history = {"device": "cpu", "peak_memory_mib": peak, "epochs": epochs}
        (run.results[1].file.parent / "history.json").write_text(json.dumps(history))
    (method,) = one_task(tmp_path)["methods"]
    assert method["cost"] == [
        {
            "step": 1,
            "seconds_per_epoch": pytest.approx((60 + 90 + 120 + 150) / 4),
            "minutes": pytest.approx(((60 + 90 + 30) + (120 + 150)) / 60 / 2),
            "peak_memory_mib": 300,
            "device": "cpu",
        }
    ]


def test_a_number_at_the_end_of_a_name_is_no_seed(tmp_path):
    a_run(tmp_path, name="bs8")
    a_run(tmp_path, name="bs16")
    assert [m["label"] for m in one_task(tmp_path)["methods"]] == ["DKD, bs16", "DKD, bs8"]


@pytest.mark.parametrize("batch", [16, 24])
def test_a_step_0_that_was_taken_is_one_that_was_trained(tmp_path, batch):
    """With --base: it has no history of its own, and tells its batch elsewhere."""
    trained = a_run(tmp_path, name="DKD-s1", seed=1).results[0].file.parent
    history = {"device": "cpu", "global_batch": 16, "peak_memory_mib": 1.0, "epochs": []}
    (trained / "history.json").write_text(json.dumps(history))
    a_run(tmp_path, name="DKD-s2", seed=2)
    base = tmp_path / "models/overlap_2-1_DKD-s2/step_0/base.json"
    base.parent.mkdir(parents=True)
    base.write_text(json.dumps({"record": {"settings": {"global batch": batch}}}))
    task = one_task(tmp_path)
    assert len(task["methods"]) == (1 if batch == 16 else 2)
    differs = [{"key": "step 0: global batch", "values": ["16", "24"]}]
    assert task["configs"] == ([] if batch == 16 else differs)


def test_a_step_0_that_joint_training_lacks_is_no_difference(tmp_path):
    for name, joint in (("A", False), ("J", True)):
        for step, wide in enumerate((STEP_0, STEP_1)):
            if step or not joint:
                a_test(tmp_path, wide, step, name=name, joint=joint)
            config = tmp_path / f"models/overlap_2-1_{name}/step_{step}/config.json"
            config.parent.mkdir(parents=True)
            config.write_text(json.dumps({"trainer": {"epochs": 3 + joint}}))
    assert [row["key"] for row in one_task(tmp_path)["configs"]] == ["trainer.epochs"]


def test_a_difference_to_rely_on_is_more_than_the_seeds_differ(tmp_path):
    """Each method is compared with the next best; joint training is no rival."""
    worse = STEP_1 + np.eye(4, dtype=int)[::-1]
    for name, method, wide in (("A", "dkd", STEP_1), ("B", "mib", worse)):
        a_test(tmp_path, wide, 1, name=f"{name}-s1", method=method)
    a_test(tmp_path, STEP_1 * np.eye(4, dtype=int), 1, name="J", method="ft", joint=True)
    said = one_task(tmp_path)["sentences"]["summary"]
    assert said == ["One seed is no evidence of a difference of a point or two."]
    for name, method, wide in (("A", "dkd", STEP_1), ("B", "mib", worse)):
        a_test(tmp_path, wide, 1, name=f"{name}-s2", method=method, seed=2)
    task = one_task(tmp_path)
    assert task["sentences"]["summary"] == [], "the seeds do not differ at all"
    a_test(tmp_path, worse, 1, name="A-s3", method="dkd", seed=3)
    (said,) = one_task(tmp_path)["sentences"]["summary"]
    means = {m["label"]: m["summary"]["all"]["mean"] for m in one_task(tmp_path)["methods"]}
    assert said == (
        f"DKD is {means['DKD'] - means['MiB']:.1f} points above MiB, less than twice the deviation "
        "over the seeds: no difference is shown."
    )


def test_the_best_method_and_its_rival_choose_the_pictures(tmp_path, monkeypatch):
    """A method alone is compared with its own first step; joint training is no rival."""
    monkeypatch.setattr(pictures.Predictor, "of", lambda weights, *_: weights)

    def columns():
        for test in tmp_path.rglob("metrics.json"):
            step = tmp_path / "models" / test.parent.relative_to(tmp_path / "log")
            step.mkdir(parents=True, exist_ok=True)
            (step / "checkpoint-epoch1.pth").touch()
        (section,), _ = make_sections(found(tmp_path))
        columns, pair, said = pictures._columns(section, None, None)
        assert said == []
        return {c.label: c.predictor for c in columns}, [c.label for c in pair]

    a_run(tmp_path, name="A")
    a_test(tmp_path, STEP_1, 1, name="J", method="ft", joint=True)
    shown, pair = columns()
    joint = tmp_path / "models/overlap_2-1_J/step_1/checkpoint-epoch1.pth"
    assert shown["joint (FT), step 1"] == joint
    assert pair == ["DKD, step 1", "DKD, step 0"]
    a_run(tmp_path, name="B", method="mib")
    assert columns()[1] == ["MiB, step 1", "DKD, step 1"]


def test_a_test_of_other_weights_names_them(tmp_path):
    own = a_test(tmp_path, STEP_0, 0, weights="far/away.pth")
    other = own.parent / "eval/away-0123/metrics.json"
    other.parent.mkdir(parents=True)
    other.write_text(own.read_text())
    assert [found(file.parent)[0].results[0].weights for file in (own, other)] == [
        None,
        Path("far/away.pth"),
    ]


def test_the_published_convention_is_one_row(tmp_path):
    (run,) = found(a_test(tmp_path, STEP_0, 0, dataset="ade", future=0).parent)
    rows = summary.convention_rows([run.results[0]], SCHEDULE)
    assert [r["convention"] for r in rows if r["published"]] == ["as DKD's published code counts"]


def test_without_background_there_is_no_convention_about_it(tmp_path):
    file = a_test(tmp_path, STEP_1, 1)
    content = json.loads(file.read_text())
    content["protocol"]["background"] = False
    overall = np.mean([iou(STEP_1, k) for k in (1, 2, 3)])
    content["metrics"] = {"Mean_Intersection_over_Union": {"overall": overall}}
    file.write_text(json.dumps(content | {"classes": content["classes"][1:]}))
    (run,) = found(file.parent)
    rows = summary.convention_rows([run.results[1]], SCHEDULE)
    assert not [r for r in rows if "background" in r["convention"].removeprefix("future classes")]


def test_a_joint_run_beside_base_steps_is_told(tmp_path):
    a_test(tmp_path, STEP_0, 0, name="A")
    a_test(tmp_path, STEP_1, 1, name="j", method="ft", joint=True)
    told = one_task(tmp_path)["sentences"]["summary"]
    assert "Left out, for they are joint training of other classes: overlap_2-1_j." in told


def test_a_joint_run_of_other_classes_is_told(tmp_path):
    a_run(tmp_path / "a")
    two = STEP_0[:, :2]
    file = a_test(tmp_path / "b", two, 0, name="j-joint", method="ft", joint=True)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": [[1], [2], [3]]}))
    told = one_task(tmp_path)["sentences"]["summary"]
    assert "Left out, for they are joint training of other classes: overlap_2-1_j-joint." in told


def test_tests_of_other_weights_are_runs_when_they_are_named(tmp_path):
    """As evaluations leave them: below the log of a step, beside the run's own."""
    own = a_run(tmp_path).results[1].file
    other = own.parent / "eval" / "released-0123456789ab"
    other.mkdir(parents=True)
    (other / "metrics.json").write_text(own.read_text())
    assert [run.name for run in found(tmp_path)] == ["overlap_2-1_toy-s1"]
    (run,) = found(other)
    assert (run.name, [*run.results]) == ("released-0123456789ab", [1])


def test_links_are_followed_once_and_what_is_untested_is_told(tmp_path):
    a_run(tmp_path / "disk", name="A")
    (tmp_path / "save").mkdir()
    (tmp_path / "save/log").symlink_to(tmp_path / "disk/log")
    (tmp_path / "disk/log/back").symlink_to(tmp_path / "disk")
    steps = tmp_path / "save/models/overlap_2-1_A/step_1"
    steps.mkdir(parents=True)
    (steps / "config.json").write_text(json.dumps({"seed": 5}))
    (tmp_path / "new").mkdir()
    runs, told = find_runs([str(tmp_path / "save"), str(tmp_path / "disk"), str(tmp_path / "new")])
    assert [run.name for run in runs] == ["overlap_2-1_A"]
    assert told == ["No tested step (yet): new."]
    assert found(tmp_path / "save/log")[0].results[1].config == {"seed": 5}, "models lie beside log"


def test_a_validation_is_no_test(tmp_path):
    file = a_test(tmp_path, STEP_1, 1, split="val")
    with pytest.raises(
        UserError, match=r"is of a validation, which sees the labels of new classes"
    ):
        found(file.parent)

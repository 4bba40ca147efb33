"""The report page out of made-up reports: one file that is complete, readable and well-formed."""

import base64
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from scripts.reporting import charts, page

VOID_ELEMENTS = {"meta", "link", "img", "input", "br"}
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
FIGURES = [
    ("old", True), ("new", True), ("hIoU", True), ("all", True), ("average", True),
    ("learning", True), ("forgetting", False), ("BWT", True), ("intransigence", None),
]  # fmt: skip


def fake_method(label, groups, seeds, chance):
    """A method with plausible values; `groups` is the number of classes that arrive per step."""
    last, skill = len(groups) - 1, chance.uniform(-10, 10)
    arrival = [step for step, count in enumerate(groups) for _ in range(count)]
    iou = []
    for step in arrival:
        start, pace = chance.uniform(45, 85) + skill, chance.choice([0.5, 1, 2, 12]) / last
        row = [start - pace * (t - step) + chance.uniform(-1, 1) for t in range(last + 1)]
        iou.append([max(v, 0.0) if t >= step else None for t, v in enumerate(row)])
    means = []
    for t in range(last + 1):
        known = [row[t] for row in iou if row[t] is not None]
        means.append(sum(known) / len(known))
    std = chance.uniform(0.2, 2) if len(seeds) > 1 else None
    summary = {key: chance.uniform(20, 80) for key, _ in FIGURES}
    steps = range(last + 1)
    return {
        "label": label,
        "method": label.lower(),
        "joint": False,
        "seeds": seeds,
        "summary": {
            key: {"mean": value, "std": std, "n": len(seeds)} for key, value in summary.items()
        }
        | {"intransigence": None},
        "curve": [
            {"step": t, "mean": means[t], "std": std and std * (t + 1) / 2, "n": len(seeds)}
            for t in steps
        ],
        "iou": iou,
        "flows": [
            {"step": t, "itself": 92.5 - 4 * t - skill / 2, "background": 4.5 + 2 * t + skill / 2,
             "old": 2.0 + t, "new": 1.0 + t}
            for t in steps[1:]
        ],
        "loss": [
            {"step": t, "terms": {
                name: [[e, size * (0.2 + 1 / e)] for e in range(1, 31)]
                for name, size in (("loss", 2.5), ("mbce", 1.5), ("kd", 0.6), ("ac", 0.4))
                if t or name not in ("kd", "ac")}}
            for t in steps
        ],
        "cost": [
            {"step": t, "device": "cuda (H100)", "seconds_per_epoch": chance.uniform(5, 90),
             "minutes": chance.uniform(5, 99), "peak_memory_mib": chance.uniform(8000, 16000)}
            for t in steps
        ],
        "published": [
            {"source": f"{label}, five runs", "hIoU": 55.21, "all": 69.67, "std": 0.49, "n": 5,
             "verdict": "agrees: 0.31 apart, band 0.66"},
        ],
        "runs": [
            {"name": f"overlap_task_{label}-s{seed}", "folder": "saved", "seed": seed,
             "summary": summary | {"intransigence": None},
             "about": {"version": "1.2", "device": f"GPU {seed % 2}", "images": 1449}}
            for seed in seeds
        ],
    }  # fmt: skip


def fake_joint(groups, chance):
    method = fake_method("joint", groups, [1], chance) | {"joint": True, "method": "dkd"}
    last = len(groups) - 1
    method["curve"] = [{"step": last, "mean": 88.88, "std": None, "n": 1}]
    method["iou"] = [
        [None] * last + [max(v for v in row if v is not None)] for row in method["iou"]
    ]
    method["flows"], method["published"] = [], []
    method["loss"], method["cost"] = method["loss"][:1], method["cost"][-1:]
    return method


def fake_task(labels, seeds, groups, task="15-1", names=None, tiles=PIXEL, joint=False):
    chance = random.Random(task)
    names = names or ["background", *(f"class {i}" for i in range(1, sum(groups)))]
    arrival = [step for step, count in enumerate(groups) for _ in range(count)]
    methods = [fake_method(label, groups, seeds, chance) for label in labels]
    methods += [fake_joint(groups, chance)] if joint else []
    parts = ["summary", "pictures"]
    words = [f"{labels[0]} forgets 3.1 points less than the others; this tells of the {{}}."]
    return {
        "dataset": "voc",
        "setting": "overlap",
        "task": task,
        "last": len(groups) - 1,
        "classes": [
            {"id": i, "name": name, "step": step, "is_background": i == 0}
            for i, (name, step) in enumerate(zip(names, arrival, strict=True))
        ],
        "sentences": {part: [word.format(part) for word in words] for part in parts},
        "warnings": ["The runs of DKD and PLOP were tested on different lists of images."],
        "figures": [
            {"key": key, "name": key, "doc": f"what {key} means", "higher": higher}
            for key, higher in FIGURES
        ],
        "methods": methods,
        "conventions": [
            {"method": label, "rows": [
                {"convention": "as evaluated", "old": 66.1, "new": 44.2, "all": 61.3,
                 "published": True, "change": 0.0},
                {"convention": "background not in the mean", "old": 65.1, "new": 44.2, "all": 60.1,
                 "published": False, "change": -1.2}]}
            for label in labels
        ],
        "configs": [
            {"key": "optimizer.args.lr", "values": [f"0.00{i + 1}" for i in range(len(methods))]}
        ],
        "pictures": [
            {"image": "2007_000033", "why": f"most gained by {labels[0]}: +31.2 points", "tiles": [
                {"label": label, "src": tiles, "is_map": label != "image", "width": 1, "height": 1}
                for label in ["image", "truth", *(f"{m}, step {len(groups) - 1}" for m in labels)]]}
        ],
        "legend": [
            {"name": name, "colour": "#400000", "step": step}
            for name, step in zip(names, arrival, strict=True)
        ],
    }  # fmt: skip


def fake_report(*tasks):
    return {
        "title": "DKD against PLOP",
        "created": "2026-11-25 17:00",
        "version": "1.2",
        "sources": ["saved/models"],
        "tasks": list(tasks),
    }


class Page(HTMLParser):
    """What the tests ask of a page; fails on elements that are closed in another order."""

    def __init__(self, text):
        super().__init__()
        self.text, self.open, self.elements, self.tables = text, [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID_ELEMENTS:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]

    def charts(self):
        return [image for image in self.all("img") if image.get("class") == "chart"]

    def pictures(self):
        return [image for image in self.all("img") if image.get("class") != "chart"]

    def rows(self):
        return [[" ".join(cell.split()) for cell in row] for table in self.tables for row in table]


def written(report, tmp_path):
    page.write_page(report, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def task():
    return fake_task(["DKD", "PLOP"], [1, 2], [4, 2, 1], joint=True)


@pytest.fixture(scope="module")
def html(task, tmp_path_factory):
    return written(fake_report(task, task | {"task": "19-1"}), tmp_path_factory.mktemp("page"))


def test_the_page_asks_for_nothing_outside_itself(html):
    assert not re.search(r"https?://|@import|url\((?!#)", html.text)
    for tag, attributes in html.elements:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), (tag, attributes)


def test_the_summary_holds_every_mean_and_deviation(html, task):
    for method in task["methods"]:
        cells = [method["summary"][key] for key, _ in FIGURES]
        words = ["–" if c is None else f"{c['mean']:.2f}" for c in cells]
        if method["seeds"] == [1, 2]:
            words = [
                w if c is None else f"{w} ± {c['std']:.2f}"
                for w, c in zip(words, cells, strict=True)
            ]
        [row] = [row for row in html.tables[0] if method["label"] in row[0]]
        assert [" ".join(cell.split()) for cell in row[1:]] == [str(len(method["seeds"])), *words]


def test_tables_hold_every_number_with_two_decimals(html, task):
    rows = html.rows()
    for method in task["methods"]:
        for entry, iou in zip(task["classes"], method["iou"], strict=True):
            if not method["joint"]:
                words = [entry["name"], *(page.number(value) for value in iou)]
                words[-1] = words[-1].removeprefix("▼ ")
                found = [[cell.removeprefix("▼ ") for cell in row[:-1]] for row in rows]
                assert words in found
        for bar in method["flows"]:
            words = [f"{bar[key]:.2f}" for key in ("itself", "background", "old", "new")]
            assert any(row[1:] == [str(bar["step"]), *words] for row in rows)
        for cost in method["cost"]:
            keys = ("seconds_per_epoch", "minutes", "peak_memory_mib")
            words = [str(cost["step"]), *(f"{cost[key]:.2f}" for key in keys), cost["device"]]
            assert any(row[1:] == words for row in rows)
        for point in method["curve"]:
            assert re.search(rf"\b{point['mean']:.2f}\b", html.text)
        for run in method["runs"]:
            words = [str(run["seed"]), *(page.number(run["summary"][key]) for key, _ in FIGURES)]
            assert any(row[0] == run["name"] and row[2:] == words for row in rows)
        for row in method["published"]:
            assert any(found[-1] == row["verdict"] and "55.21" in found for found in rows)
    assert ["optimizer.args.lr", "0.001", "0.002", "0.003"] in rows
    convention = ["background not in the mean", "65.10", "44.20", "60.10", "−1.20"]
    assert any(row[1:] == convention for row in rows)


def test_the_best_is_bold_and_joint_training_no_rival(tmp_path):
    task = fake_task(["DKD", "PLOP"], [1], [4, 2], joint=True)
    for method, all_, forgetting in zip(task["methods"], (60.114, 50, 90), (9, 3, 1), strict=True):
        method["summary"]["all"] = {"mean": all_, "std": None, "n": 1}
        method["summary"]["forgetting"] = {"mean": forgetting, "std": None, "n": 1}
        method["summary"]["old"] = {
            "mean": 70.001 if method["label"] == "DKD" else 70.002,
            "std": None,
            "n": 1,
        }
        method["summary"]["intransigence"] = {"mean": 4.56, "std": None, "n": 1}
    bold = re.findall(r"<b>([\d.]+)</b>", written(fake_report(task), tmp_path).text)
    assert {"60.11", "3.00"} <= set(bold)
    assert not {"90.00", "1.00", "9.00", "4.56"} & set(bold)
    assert bold.count("70.00") == 2, "equal as far as shown"


def test_every_picture_and_chart_has_words(html):
    assert len(html.charts()) > 10
    assert len(html.pictures()) == 8
    assert all(image["alt"] and image["loading"] == "lazy" for image in html.all("img"))
    assert all(len(chart["alt"]) > 20 for chart in html.charts())


def test_ids_are_unique_and_links_lead_somewhere(html):
    ids = [attributes["id"] for _, attributes in html.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#(.+?)"|url\(#(.+?)\)', html.text)
    assert {name for pair in targets for name in pair if name} <= set(ids)


def test_charts_keep_text_and_refer_to_nothing_outside_themselves(html):
    head = "data:image/svg+xml;base64,"
    texts = []
    for chart in html.charts():
        assert chart["src"].startswith(head)
        root = ElementTree.fromstring(base64.b64decode(chart["src"].removeprefix(head)))
        for element in root.iter():
            texts.append(element.text)
            for key, value in element.attrib.items():
                assert not key.endswith(("href", "src")) or value.startswith("#")
                assert not re.search(r"url\((?!#)", value)
    assert {"mIoU in percent", "step 1", "seconds per epoch", "100 %"} <= {*texts}


def test_names_are_escaped(tmp_path):
    names = ["background", "<b>cat</b>", "</script>", 'a"b']
    task = fake_task(["D<i>KD", "PLOP & co"], [1], [3, 1], names=names)
    text = written(fake_report(task), tmp_path).text
    assert "&lt;b&gt;cat&lt;/b&gt;" in text
    assert not re.search(r"<b>cat|</script>.+</script>|<i>KD|PLOP & co", text)


def test_the_fewest_keys_make_a_page(tmp_path):
    method = {"label": "DKD", "seeds": [1], "summary": {"all": {"mean": 50.0, "std": None, "n": 1}}}
    task = {"dataset": "voc", "setting": "overlap", "task": "15-1", "last": 0, "classes": []}
    task |= {"figures": [{"key": "all", "name": "all", "higher": True}], "methods": [method]}
    html = written({"title": "One run", "tasks": [task]}, tmp_path)
    assert html.rows() == [["method", "n", "all"], ["● DKD", "1", "50.00"]]
    assert not html.charts()


def test_many_classes_are_folded_and_sorted_by_what_was_lost(tmp_path):
    html = written(fake_report(fake_task(["DKD"], [1], [30, 20])), tmp_path)
    [table] = [
        table
        for table in html.tables
        if table[0] == ["class", "step 0", "step 1", "lost"] and len(table) == 32
    ]
    lost = [float(row[-1].replace("−", "-")) for row in table[2:]]
    assert lost == sorted(lost, reverse=True)
    assert re.search(r"Step 1, 20 classes", html.text)


def test_forgotten_classes_are_marked(tmp_path):
    task = fake_task(["DKD"], [1], [3, 1])
    task["methods"][0]["iou"] = [[80, 70.01], [80, 70], [80, 20], [None, 5]]
    rows = written(fake_report(task), tmp_path).rows()
    assert ["class 1", "80.00", "▼ 70.00", "10.00"] in rows
    assert ["class 2", "80.00", "▼ 20.00", "60.00"] in rows
    assert ["background", "80.00", "70.01", "9.99"] in rows
    assert ["class 3", "–", "5.00", "–"] in rows


def test_a_fold_names_forgotten_classes_and_no_others(tmp_path):
    task = fake_task(["DKD"], [1], [30, 20])
    task["methods"][0]["iou"][:30] = [[80, 75 - (i == 4) * 20] for i in range(30)]
    html = written(fake_report(task), tmp_path).text
    words = " ".join(
        re.sub(r"<[^>]*>", "", re.search(r"<summary>(Step 0.*?)</summary>", html, re.S)[1]).split()
    )
    assert words == "Step 0, 30 classes, ▼ 1 forgotten: class 4 25.00"


def test_every_sentence_and_warning_is_told_below_its_question(html, task):
    text = html.text[: html.text.index('id="task2"')]
    assert task["warnings"][0] in text
    heads = {
        "summary": "How good are the methods",
        "pictures": "What does it look like",
    }
    for part, head in heads.items():
        place = text.index(task["sentences"][part][0])
        assert text[text[:place].rindex("<h3>") :].startswith(f"<h3>{head}")
    curve = text.index('class="chart"')
    assert text[text[:curve].rindex("<h3>") :].startswith("<h3>How does mIoU develop")


def test_what_all_runs_share_is_said_once(html):
    assert "The same in all runs: version 1.2; images 1449." in " ".join(html.text.split())
    assert ["overlap_task_DKD-s2", "GPU 0"] in html.rows()


def test_the_steps_of_a_method_begin_a_line_of_pictures(tmp_path):
    task = fake_task(["DKD"], [1], [3, 1])
    steps = [f"DKD, step {step}" for step in range(6)]
    labels = ["image", "truth", *steps, "PLOP, step 5"]
    task["pictures"][0]["tiles"] = [
        {"label": label, "src": PIXEL, "is_map": label != "image"} for label in labels
    ]
    html = written(fake_report(task), tmp_path)
    tiles = [f["class"] for f in html.all("figure") if f.get("class", "").startswith("tile")]
    assert tiles == ["tile", "tile", "tile first", *["tile"] * 6]
    alts = [image["alt"] for image in html.pictures()]
    assert alts == [f"{label} of 2007_000033" for label in labels]
    assert sum("labels" in image.get("class", "") for image in html.pictures()) == 8
    task["pictures"][0]["tiles"] = task["pictures"][0]["tiles"][:8]
    few = written(fake_report(task), tmp_path)
    assert not any(f.get("class") == "tile first" for f in few.all("figure")), "they fill one line"


def test_methods_look_different_and_alike_everywhere():
    methods = [{"label": f"m{i}"} for i in range(30)]
    looks = charts.method_styles([*methods, {"label": "bound", "joint": True}, *methods])
    assert len({(look.colour, look.marker) for look in looks.values()}) == 31


def contrast(one, other):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def inverted(colour):
    """What the filters `invert(1) hue-rotate(180deg)` make of it, as Filter Effects 1 has them."""
    red, green, blue = (1 - int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    grey = 2 * (0.213 * red + 0.715 * green + 0.072 * blue)
    parts = (min(max(grey - part, 0), 1) for part in (red, green, blue))
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def test_text_and_lines_stand_out_in_both_schemes(html):
    light, dark = re.findall(r":root \{(.*?)\}", html.text, re.S)
    assert ".chart, .key, .flow { filter: invert(1) hue-rotate(180deg); }" in html.text
    for scheme in (light, dark):
        colours = dict(re.findall(r"--([\w-]+): (#\w+)", scheme))
        for name in ("ink", "muted", "link", "bad"):
            for ground in ("page", "panel", "warn"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for drawn in (*charts.METHODS, *charts.TERMS, charts.MUTED):
            shown = drawn if scheme is light else inverted(drawn)
            assert contrast(shown, colours["page"]) >= 3, drawn


def test_values_stand_out_on_their_colour(html):
    ramp = re.findall(r"\.v\d+ \{ background: (#\w+) !important; color: (#\w+)", html.text)
    assert len(ramp) == 101
    assert min(contrast(ground, text.replace("#", "#" + text[1:])) for ground, text in ramp) >= 4.5


@pytest.mark.parametrize(
    ("value", "signed", "words"),
    [(None, False, "–"), (-3.104, False, "−3.10"), (-0.001, True, "0.00"), (1.2, True, "+1.20")],
)
def test_numbers(value, signed, words):
    assert page.number(value, signed) == words

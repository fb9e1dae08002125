"""The report: the paper's figures are complete, a run's are in the right cells, and the rest is blank."""

from __future__ import annotations

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from weakclip import report
from weakclip.evaluation.metrics import Scores
from weakclip.evaluation.published import Paper
from weakclip.labels import COCO, VOC
from weakclip.models.weakclip import parameter_counts
from weakclip.recipe import load, to_yaml
from weakclip.runtime.tables import Table
from weakclip.training import jobs
from weakclip.training.monitor import Monitor


@pytest.fixture(scope="module")
def recipe_of(repo):
    """The text of VOC's recipe with other classes."""
    return functools.cache(lambda classes: to_yaml(load(repo / "configs/voc.yaml", [f"classes={classes}"])))


@pytest.fixture
def run(recipe_of, tmp_path):
    """A run directory of VOC, or of the class list that a test gives, with nothing but its config."""

    def make(classes: str = "voc"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.yaml").write_text(recipe_of(classes))
        return tmp_path / "run"

    return make


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def scores(names, first: int, hits: int = 1):
    """evaluate.py's JSON where the class `first` scores `hits` in 2, the next none, and the others do not occur."""
    matrix_KK = np.zeros((len(names), len(names)), int)
    matrix_KK[first, first : first + 2] = hits, 2 - hits
    return Scores.of(matrix_KK, names).as_dict()


def rows(run, title: str) -> dict[str, list[str]]:
    """The cells of the one table whose title begins with `title`, by each row's first cells; "" is the header."""
    (table,) = (part for part in report.report(run).split("\n\n") if part.startswith(title))
    lines = [[cell.strip() for cell in line.split("  ") if cell] for line in table.splitlines()[1:]]
    return {"": lines[0], **{line[0]: line[1:] for line in lines[1:]}}


# ---------------------------------------------------------------------------------------------------- the paper's figures


@pytest.mark.parametrize("split, baseline, weakclip", [("val", 71.9, 74.0), ("test", 71.6, 73.8)])
def test_the_papers_classes_have_the_mean_that_its_main_table_states(split, baseline, weakclip):
    paper = Paper.of("voc")
    stated = {row.method: getattr(row, split) for row in paper.comparison}
    assert (stated["MCTformer"], stated["WeakCLIP"]) == (baseline, weakclip)
    for method, iou in paper.classes[split].items():
        assert len(iou) == len(VOC) and round(sum(iou) / len(VOC), 1) == stated[method]


def test_the_papers_comparisons_are_whole():
    voc, coco = Paper.of("voc"), Paper.of("coco")
    assert (len(voc.comparison), len(coco.comparison)) == (31, 25)
    assert [(row.backbone, row.val) for row in coco.comparison if row.method == "WeakCLIP"] == [
        ("ResNet38", 46.1),
        ("DeiT-S", 47.3),
        ("MiT-B2", 47.4),
    ]
    assert (voc.splits, coco.splits, voc.masks, coco.masks) == (("val", "test"), ("val",), 77.2, 48.4)
    assert Paper.of("demo") == Paper()


# -------------------------------------------------------------------------------------------------------- a run's figures


def test_a_run_that_has_only_begun_is_blank_beside_the_paper(run):
    begun = run()
    before = rows(begun, "mIoU (%) before retraining")
    assert before[""] == ["paper", "this run"]
    assert before["train set: pseudo masks"] == ["77.2", "-"] and before["train set: seeds"] == ["-", "-"]
    retrained = rows(begun, "mIoU (%) of retrained networks")
    assert retrained["WeakCLIP"] == ["ResNet38", "image", "74.0", "73.8"]
    assert retrained["BCM"] == ["ResNet101", "image+box", "70.2", "-"]
    assert retrained["this run, segformer"] == ["MiT-B2", "image", "-", "-"]
    assert len(retrained) == 1 + 31 + 3
    assert rows(begun, "IoU (%) per class")["tvmonitor"] == ["58.8", "66.6", "-", "57.7", "64.2", "-", "-"]
    assert rows(begun, "mIoU (%) by number of prompts")["16"] == ["72.3", "-", "-"]
    assert rows(begun, "Training")["this run"] == ["-"] * 5


def test_scores_stand_in_their_cells(run):
    done = run()
    for what, hits in (("cam", 0), ("seeds", 1), ("masks", 2)):
        write(done / f"scores-{what}.json", scores(VOC, VOC.index("bird"), hits))
    write(done / "best.json", {"step": 500, "miou": 57.78738002747983})
    for network, split, first in (("resnet38", "val", 0), ("resnet38", "test", 19), ("segmenter", "val", 7)):
        write(done / "retrain" / network / f"scores-{split}.json", scores(VOC, first))
    assert rows(done, "mIoU (%) before") == {
        "": ["paper", "this run"],
        "train set: CAM, best single threshold": ["-", "0.0"],
        "train set: seeds": ["-", "25.0"],
        "train set: pseudo masks": ["77.2", "100.0"],
        "validation set: best weights, one scale, no CRF": ["-", "57.8"],
    }
    retrained = rows(done, "mIoU (%) of retrained")
    assert retrained["this run, resnet38"] == ["ResNet38", "image", "25.0", "25.0"]
    assert retrained["this run, segmenter"] == ["DeiT-S", "image", "25.0", "-"]
    classes = rows(done, "IoU (%) per class")
    assert classes[""][1:4] == ["WeakCLIP val", "this run val", "MCTformer test"] and classes[""][-1] == "pseudo masks"
    assert classes["background"] == ["91.9", "92.7", "50.0", "92.3", "92.9", "-", "-"]
    assert classes["bird"] == ["89.9", "89.9", "-", "82.8", "88.3", "-", "100.0"]
    assert classes["train"] == ["70.4", "76.4", "-", "65.7", "72.8", "50.0", "-"]
    assert list(classes)[1:] == list(VOC)


def test_coco_has_no_test_set_and_no_published_classes(run):
    done = run("coco")
    write(done / "scores-masks.json", scores(COCO, COCO.index("hot dog")))
    write(done / "retrain/segformer/scores-val.json", scores(COCO, 3))
    assert rows(done, "mIoU (%) before")["train set: pseudo masks"] == ["48.4", "25.0"]
    retrained = rows(done, "mIoU (%) of retrained")
    assert retrained["this run, segformer"] == ["MiT-B2", "image", "25.0"] and retrained["WeakTr"] == ["DeiT-S", "image", "46.9"]
    classes = rows(done, "IoU (%) per class")
    assert classes[""] == ["this run val", "pseudo masks"]
    assert (classes["hot dog"], classes["pizza"], classes["cake"]) == (["-", "50.0"], ["-", "0.0"], ["-", "-"])
    assert len(classes) == 1 + 81 and "number of prompts" not in report.report(done)


def test_other_classes_have_the_runs_figures_alone(run, tmp_path):
    for classes in ("demo", str(tmp_path / "gone.txt")):
        done = run(classes)
        assert report.report(done) == f"{done}, classes: {classes} (the paper has no figures for them)"
    write(done / "scores-masks.json", scores(("background", "moth", "newt"), 1))
    assert rows(done, "mIoU (%) before")[""] == ["this run"]
    assert rows(done, "IoU (%) per class")["moth"] == ["-", "-", "50.0"]
    assert "WeakCLIP" not in report.report(done)


def test_sweeps_stand_beside_the_papers_in_its_order_and_others_follow(run):
    done = run()
    write(done / "sweeps/prompts/8/best.json", {"step": 1, "miou": 71.25})
    write(done / "sweeps/prompts/32/best.json", {"step": 1, "miou": 70.0})
    write(done / "sweeps/prompts/16/scores-masks.json", scores(VOC, 0))
    for value in ("0.5", "0.25", "1"):
        write(done / f"sweeps/auxiliary/{value}/best.json", {"step": 1, "miou": 60.0})
    assert rows(done, "mIoU (%) by number of prompts N") == {
        "": ["paper", "this run, validation", "this run, pseudo masks"],
        "2": ["72.2", "-", "-"],
        "4": ["72.3", "-", "-"],
        "8": ["72.6", "71.2", "-"],
        "16": ["72.3", "-", "25.0"],
        "32": ["-", "70.0", "-"],
    }
    assert list(rows(done, "mIoU (%) by initial alpha and beta")) == ["", "1", "0.1", "0.01", "0.001"]
    auxiliary = rows(done, "mIoU (%) by auxiliary")
    assert list(auxiliary) == ["", "1", "0.5", "0.25"] and auxiliary["1"] == ["60.0", "-"]


# ------------------------------------------------------------------------------------------------------------------- cost


def metrics(run, *lines: object, end: str = ""):
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def test_cost_is_the_median_speed_and_the_peak_memory(run):
    done = run()
    metrics(
        done,
        {"step": 0, "parameters/trainable": 21_240_853, "parameters/total": 171_464_725},
        *({"step": s, "images_per_second": v, "memory_gib": g} for s, v, g in [(1, 2.0, 8.0), (2, 16.5, 9.25), (3, 17.0, 9.0)]),
        {"step": 3, "validation/miou": 1.0},
        end='{"step": 4, "images_per_sec',  # a line that is being written
    )
    assert rows(done, "Training") == {
        "": ["trainable (M)", "of all (M)", "%", "images/s", "GiB"],
        "MCTformer": ["105.3", "-", "-", "3.9", "30.7"],
        "WeakCLIP": ["21.2", "171.5", "12.4", "16.8", "9.7"],
        "this run": ["21.2", "171.5", "12.4", "16.5", "9.2"],
    }


def test_a_job_writes_its_parameter_counts_once(tiny_model, tiny_config, run):
    folder, model = run(), tiny_model()
    engine = SimpleNamespace(plain=model, step=0, world=SimpleNamespace(rank=0, device=torch.device("cpu")))
    lines = folder / "metrics.jsonl"
    for before, engine.step in (("", 0), ('{"step": 0, "par', 0), (None, 0), (None, 7)):  # new, killed at once, resumed twice
        if before is not None:
            lines.write_text(before)
        Monitor(jobs.refine(tiny_config()), engine).close()
        (line,) = map(json.loads, lines.read_text().splitlines())
        counts = parameter_counts(model)
        assert line.pop("time") > 0
        assert line == {"step": 0, "parameters/trainable": counts["trainable"], "parameters/total": counts["total"]}
    assert report.measured_cost(lines).trainable == counts["trainable"] / 1e6


# ----------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name", ["scores-masks.json", "best.json", "retrain/resnet38/scores-test.json", "sweeps/prompts/2/best.json"]
)
@pytest.mark.parametrize(
    "text", ["", '{"miou": 1', "[]", "3", '{"iou": {}}', '{"miou": "high"}', '{"miou": 1, "iou": [1]}', "\xff"]
)
def test_a_damaged_file_is_named_on_one_line(run, name, text):
    done = run()
    write(done / name, None)
    (done / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name}: damaged .*; remove it and run the command that wrote it") as caught:
        report.report(done)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ['{"step": 1', "3", '{"step": "one"}', "\xff"])
def test_a_damaged_line_of_metrics_is_named(run, line):
    done = run()
    metrics(done, {"step": 0})
    with (done / "metrics.jsonl").open("ab") as file:
        file.write(f"{line}\n".encode("latin-1"))
    with pytest.raises(ValueError, match="metrics.jsonl: line 2 is damaged"):
        report.report(done)


def test_figures_that_are_not_numbers_are_blank(run):
    done = run()
    write(done / "scores-masks.json", {"miou": None, "iou": {"background": None}})
    (done / "best.json").write_text('{"step": 1, "miou": NaN}')
    assert rows(done, "mIoU (%) before")["train set: pseudo masks"] == ["77.2", "-"]
    assert rows(done, "mIoU (%) before")["validation set: best weights, one scale, no CRF"] == ["-", "-"]


def test_what_is_no_run_is_named(run, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"{folder}: not a run directory, since it has no config.yaml"):
            report.report(folder)
    for damaged in ("a: [", "seed: 1", "- 1"):
        (run() / "config.yaml").write_text(damaged)
        with pytest.raises(ValueError, match="config.yaml: damaged") as caught:
            report.report(tmp_path / "run")
        assert "\n" not in str(caught.value)


def test_a_run_of_an_earlier_version_is_reported(run):
    done = run("coco")
    with (done / "config.yaml").open("a") as file:
        file.write("forgotten: {key: 1}\n")
    assert rows(done, "mIoU (%) before")["train set: pseudo masks"] == ["48.4", "-"]


def test_the_command_prints_the_report(run, capsys):
    done = run()
    report.main([str(done)])
    assert capsys.readouterr().out == report.report(done) + "\n"


def test_a_table_aligns_text_to_the_left_and_numbers_to_the_right():
    table = Table("Title", ("", "what", "count", "%"), [("a", "longer text", 12, 3.14159), ("long", "b", None, float("nan"))])
    assert str(table).splitlines() == [
        "Title",
        "      what         count    %",
        "a     longer text     12  3.1",
        "long  b                -    -",
    ]


def test_several_runs_are_one_table(run, tmp_path, capsys):
    first = run("demo")
    for path, miou in (("scores-cam.json", 40.0), ("scores-masks.json", 54.3), ("retrain/segmenter/scores-val.json", 55.5)):
        write(first / path, {"miou": miou})
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("classes: demo\n")
    report.main([str(first), str(other)])
    _, header, *lines = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "run" and header.split()[1:] == (
        ["CAM", "seeds", "pseudo", "masks", "resnet38", "val", "segmenter", "val", "segformer", "val"]
    )
    assert [line.split() for line in lines] == [
        [str(first), "40.0", "-", "54.3", "-", "55.5", "-"],
        [str(other), *"------"],
    ]
    with pytest.raises(ValueError, match="nothing: not a run directory"):
        report.main([str(first), str(tmp_path / "nothing")])


def test_a_network_on_the_seeds_has_a_row_of_its_own(run, tmp_path, capsys):
    done = run()
    write(done / "retrain/segmenter-seeds/scores-val.json", {"miou": 42.0})
    retrained = rows(done, "mIoU (%) of retrained")
    assert retrained["this run, segmenter on the seeds"] == ["DeiT-S", "image", "42.0", "-"]
    assert not any("resnet38 on" in name for name in retrained)
    report.main([str(done), str(done)])
    assert capsys.readouterr().out.splitlines()[-1].split()[-8:] == ["the", "seeds", "-", "-", "-", "-", "42.0", "-"]

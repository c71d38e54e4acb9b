"""The pictures: drawn again from the committed JSON, each with a title, its hardware and no single points."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pictures
from longnet_dist.telemetry.plot_style import DILATED, FULL, Line, short_length, spread_ticks

RESULTS = Path(pictures.__file__).parent / "results"


@pytest.fixture(scope="module")
def figures():
    return {name: draw() for name, draw in pictures.PICTURES.items()}


def test_every_committed_picture_is_drawn_from_json():
    assert {path.name for path in RESULTS.glob("*.png")} == set(pictures.PICTURES)


def test_pictures_name_what_they_show_the_hardware_and_units(figures):
    for name, figure in figures.items():
        assert figure is not None, name
        assert figure.get_suptitle().strip(), name
        assert any("H100" in text.get_text() or "H200" in text.get_text() for text in figure.texts), name
        assert all(axes.get_xlabel() for axes in figure.axes), name
        assert all(axes.get_ylabel() or axes.patches for axes in figure.axes), name  # bars have names instead


def test_no_line_is_a_single_point(figures):
    for name, figure in figures.items():
        for axes in figure.axes:
            assert all(len(line.get_xdata()) > 1 for line in axes.lines), name
    with pytest.raises(ValueError, match="two points"):
        Line("alone", [(1, 1.0)])


def test_full_attention_has_its_colour_wherever_it_is_drawn(figures):
    drawn = {line.get_color() for axes in figures["token_time.png"].axes for line in axes.lines}
    assert {DILATED, FULL} <= drawn
    assert {text.get_color() for text in figures["billion.png"].axes[1].texts if "full" in text.get_text()} == {FULL}


def test_results_with_nothing_to_draw_make_no_picture(tmp_path):
    assert pictures.attention({}) is None
    assert pictures.training({"points": [], "runs": []}) is None
    assert pictures.billion([{"points": [], "ranks": 1, "gpu": ""}]) is None
    pictures.save_picture(None, tmp_path / "none.png")
    assert not list(tmp_path.iterdir())


def test_main_writes_all_pictures(tmp_path):
    pictures.main(["--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == set(pictures.PICTURES)


def test_lengths_are_short_where_that_is_exact():
    assert [short_length(n) for n in (512, 8192, 6 << 20, 1 << 30, 126720)] == ["512", "8K", "6M", "1B", "126,720"]
    assert spread_ticks([1, 2, 8, 16, 64, 128], 8) == [2, 16, 128]

"""The loss picture: true to the numbers, the same bytes every time, nothing fetched, nothing interpreted."""

import math
import re
import xml.etree.ElementTree as ET

from lorary.analysis.loss_plot import MOST_POINTS, curves_svg, loss_svg, smoothed

SVG = "{http://www.w3.org/2000/svg}"
HISTORY = [{"step": step, "loss": 4.0 - step / 10, "lr": 1e-4} for step in range(1, 21)]
HISTORY += [{"step": 10, "eval_loss": 3.3}, {"step": 20, "eval_loss": 2.9}, {"event": "saved"}]


def curves(svg: str) -> list[str]:
    """The paths of the drawn curves: the only dashed or coloured lines of the picture, legend left out."""
    root = ET.fromstring(svg)
    axes = next(g for g in root.iter(f"{SVG}g") if g.get("id") == "axes_1")
    lines = [g for g in axes if (g.get("id") or "").startswith("line2d_")]
    return [path.get("d") or "" for g in lines for path in g.findall(f"{SVG}path")]


def vertices(path: str) -> list[tuple[float, float]]:
    numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_both_curves_are_drawn_to_scale() -> None:
    train, held_out = (vertices(path) for path in curves(loss_svg(HISTORY)))
    # The training curve is a straight line: the same slope between its first, last and every drawn point.
    (x0, y0), (x1, y1) = train[0], train[-1]
    assert y1 > y0, "a falling loss goes down the page"
    assert all(math.isclose((y - y0) / (x - x0), (y1 - y0) / (x1 - x0), rel_tol=1e-3) for x, y in train[1:])
    # Step 10 of the held-out curve stands above step 10 of the training curve by 0.3 of its units.
    unit = (y1 - y0) / (HISTORY[0]["loss"] - HISTORY[19]["loss"])
    assert math.isclose(held_out[0][0], x0 + (x1 - x0) * 9 / 19, rel_tol=1e-4)
    assert math.isclose(y0 + (x1 - x0) * 9 / 19 * (y1 - y0) / (x1 - x0) - held_out[0][1], 0.3 * unit, rel_tol=1e-3)


def test_same_numbers_same_bytes() -> None:
    assert loss_svg(HISTORY, "a") == loss_svg([dict(record) for record in HISTORY], "a")
    assert loss_svg(HISTORY, "a") != loss_svg([*HISTORY[:-1], {"step": 21, "loss": 1.0}], "a")


def test_the_picture_says_itself_in_words() -> None:
    label = ET.fromstring(loss_svg(HISTORY, "Loss")).get("aria-label")
    assert label == (
        "Loss: train loss from 3.900 at step 1 to 2.000 at step 20; "
        "held-out loss from 3.300 at step 10 to 2.900 at step 20"
    )


def test_values_that_are_not_finite_leave_a_gap() -> None:
    broken = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1.5}]
    broken += [{"step": 4, "loss": 1.0}, {"step": 5, "loss": math.inf}]
    (path,) = curves(loss_svg(broken))
    assert len(vertices(path)) == 3


def test_nothing_logged_is_said() -> None:
    assert "no loss was logged" in loss_svg([])
    assert "no loss was logged" in loss_svg([{"step": 3, "lr": 1e-3}])


def test_a_long_run_stays_a_small_file() -> None:
    long = [{"step": step, "loss": 2 + math.sin(step)} for step in range(20 * MOST_POINTS)]
    svg = loss_svg(long)
    assert len(svg) < 100_000
    assert "train (means of 20)" in svg


def test_a_moving_average_has_no_bias_at_the_start_and_skips_what_is_not_finite() -> None:
    assert all(math.isclose(value, 3.0) for _, value in smoothed([(float(i), 3.0) for i in range(9)]))
    (_, first), (_, second), (_, third) = smoothed([(1.0, 2.0), (2.0, math.nan), (3.0, 5.0)])
    assert math.isclose(first, 2.0)
    assert second == first
    assert math.isclose(third, (2.0 / 3 + 5.0) / (1 / 3 + 1))  # decay 1/3
    assert math.isnan(smoothed([(1.0, math.nan)])[0][1])


def test_the_smoothed_loss_is_drawn_over_the_faint_one() -> None:
    noisy = [{"step": s, "loss": 2 + (-1) ** s} for s in range(1, 61)] + [{"step": 60, "eval_loss": 2.0}]
    svg = loss_svg(noisy, unit="nats per token", smooth=True)
    faint, mean, held_out = (vertices(path) for path in curves(svg))
    assert len(faint) == len(mean) == 60
    assert len(held_out) == 1
    heights = [max(y for _, y in line[10:]) - min(y for _, y in line[10:]) for line in (faint, mean)]
    assert heights[1] < 0.5 * heights[0]
    assert "loss (nats per token)" in svg
    assert "train, moving average" in svg
    assert len(curves(loss_svg(noisy[:19], smooth=True))) == 1, "a short curve is drawn as it is"


def test_logged_figures_are_drawn_and_those_never_logged_are_left_out() -> None:
    history = [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}, {"step": 3, "b": 0.25}]
    svg = curves_svg(history, {"a": "one", "b": "two", "c": "none"}, "Title", "unit")
    assert ET.fromstring(svg).get("aria-label") == (
        "Title: one from 1 at step 1 to 3 at step 2; two from 0.25 at step 3 to 0.25 at step 3"
    )
    assert len(curves(svg)) == 2
    assert "nothing was logged" in curves_svg([], {"a": "one"}, "Title", "unit")

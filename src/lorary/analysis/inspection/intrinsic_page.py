"""The picture and the page of an intrinsic dimension."""

from __future__ import annotations

from matplotlib.figure import Figure

from lorary.analysis.html_report import KeyFigure, Picture, Section, Table, html_report, versions_section
from lorary.analysis.inspection.intrinsic import HEAD, SHARE, IntrinsicDimension
from lorary.analysis.svg import INK, line, style, to_svg

_ABOUT = (
    "The held-out loss after training in a random subspace of dimension d: θ = θ0 + P(θ_d), with P a Fastfood "
    "projection (Aghajanyan et al. 2020, arXiv:2012.13255). d90 is the smallest d that reaches 90 % of the improvement "
    "of full fine-tuning, here of the held-out loss; the paper compares accuracies. It depends on the model, the data "
    "and the number of steps."
)
_SAID = " Structure-aware (SAID): every layer has a trained scale of its own, which counts in d."


def intrinsic_svg(found: IntrinsicDimension, title: str = "Loss by the dimension of the subspace") -> str:
    """The held-out loss over d, between the base's and that of full fine-tuning."""
    with style():
        figure = Figure(figsize=(7.2, 3.4))
        axes = figure.add_subplot()
        axes.plot([run.d for run in found.runs], [run.loss for run in found.runs], label="in the subspace", **line(0))
        goal = found.base - SHARE * (found.base - found.full)
        share = f"{SHARE:.0%} of full fine-tuning"
        marks = [("base", found.base, 1), (share, goal, 3), ("full fine-tuning", found.full, 2)]
        for label, value, i in marks:
            axes.axhline(value, label=label, **line(i, marker=False))
        if found.d90 is not None:
            axes.axvline(found.d90, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        ticks = [run.d for run in found.runs]
        axes.set_xticks(ticks, [f"{d:,}" for d in ticks])
        axes.minorticks_off()
        axes.set(title=title, xlabel="d, numbers that are trained", ylabel="held-out loss")
        axes.legend()
        return to_svg(figure, title, found.verdict)


def intrinsic_page(found: IntrinsicDimension, model: str, data: str) -> str:
    """The page.

    Args:
        found: the measurement.
        model: the name of the model.
        data: the name of the data.
    """
    d90 = "none" if found.d90 is None else f"{found.d90:,}"
    figures = [
        KeyFigure("d90", d90, found.verdict),
        KeyFigure("Held-out loss", f"{found.base:.3f} → {found.full:.3f}", "by full fine-tuning"),
        KeyFigure("Parameters", f"{found.size:,}", "D"),
    ]
    about = _ABOUT + (_SAID if found.said else "")
    curve = Section("Loss by dimension", [Picture(intrinsic_svg(found), about), Table(HEAD, found.rows())])
    lead = f"{model}, fine-tuned on {data} in random subspaces of its {found.size:,} parameters."
    return html_report("Intrinsic dimension", lead, figures, [curve, versions_section()])

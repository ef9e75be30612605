"""The grokking study: section 5 and appendix E of the paper, on a run of one's own."""

from __future__ import annotations

from explaind_core.errors import QuestionError
from explaind_studies.findings import CLOSES, Claim, Picture, Table
from explaind_studies.grokking import figures, influences, interactive, kernels, lasso, pipelines, swapping
from explaind_studies.grokking.setting import EXPERIMENTS, PAPER, QUICK, GrokkingSetting
from explaind_studies.grokking.stages import CHECKPOINTS, PAPER_STAGES
from explaind_studies.grokking.subject import Subject, trained
from explaind_studies.report import Report
from explaind_studies.workbook import Workbook

__all__ = ["PAPER", "QUICK", "GrokkingSetting", "study"]


def study(book: Workbook, setting: GrokkingSetting) -> Report:
    """Train, or take up, the run; make the figures and tables of the experiments asked for; judge the claims."""
    wanted = setting.experiments
    if unknown := [name for name in wanted if name not in EXPERIMENTS]:
        raise QuestionError(
            f"the study has no experiment {unknown[0]!r}", where="--parts", expected=sorted(EXPERIMENTS), got=wanted
        )
    subject = trained(book, setting)
    claims: list[Claim] = []
    tables: list[Table] = [_stages(subject)]
    pictures: list[Picture] = []
    checks: dict[str, tuple[bool, str]] = {}
    if "influences" in wanted:
        scores = influences.influences(book, subject)
        claims += influences.influence_claims(scores, subject)
        tables.append(influences.layer_table(scores, subject))
        pictures += figures.draw_influences(book.figures, scores, subject)
        interactive.write_curves(book.figures / "figure_3a.html", scores, subject.metrics)
        closure, residual = float(scores.attrs["closure"]), float(scores.largest_residual.max())
        checks["Figure 3a closes"] = (
            closure <= CLOSES,
            f"closure error {closure:.1e} of the largest output; {scores.attrs['nodes_per_step']:.2f} nodes a step "
            f"({scores.attrs['evaluated_per_step']:.2f} evaluated); largest residual of a step {residual:.1e} of the "
            f"largest change; {scores.attrs['steps_not_converged']} steps missed the tolerance",
        )
    if "pipelines" in wanted:
        restarted = pipelines.pipelines(book, subject)
        claims += pipelines.pipeline_claims(restarted)
        tables.append(pipelines.pipeline_table(restarted))
        pictures += figures.draw_pipelines(book.figures, restarted)
    if "longer" in wanted:
        trained_on = pipelines.longer(book, subject)
        claims += pipelines.longer_claims(trained_on)
        tables.append(pipelines.pipeline_table(trained_on, "longer"))
        pictures += figures.draw_longer(book.figures, trained_on)
    if "kernels" in wanted or "lasso" in wanted:
        slices = kernels.kernel_slices(book, subject)
        worst = max(float(part.attrs["closure"]) for part in slices.stages.values())
        residuals = ", ".join(f"{stage}: {part.attrs['residual']:.1e}" for stage, part in slices.stages.items())
        checks["Kernel slices close"] = (
            worst <= CLOSES,
            f"closure error {worst:.1e} of the largest output; residual of a window, of its change: {residuals} "
            f"({setting.kernel_nodes} nodes a step)",
        )
        if "kernels" in wanted:
            cyclic = kernels.measured(slices, subject)
            claims += kernels.kernel_claims(cyclic)
            tables.append(kernels.kernel_table(slices, cyclic))
            pictures += figures.draw_kernels(book.figures, slices, subject)
            interactive.write_matrices(book.figures / "kernels.html", slices, subject)
        if "lasso" in wanted:
            regression = lasso.lasso(book, subject, slices)
            claims += lasso.lasso_claims(regression, setting.p)
            tables += lasso.lasso_tables(regression, setting.alpha)
            pictures += figures.draw_lasso(book.figures, regression, slices, subject)
    if "swapping" in wanted:
        swapped = swapping.swapping(book, subject)
        claims += swapping.swap_claims(swapped, subject)
        tables.append(swapping.swap_table(swapped, subject))
        pictures += figures.draw_swapping(book.figures, swapped, subject)
    return Report(
        "grokking", f"Grokking (a + b) mod {setting.p}: section 5 and appendix E", _summary(subject), book.settings,
        claims, tables, pictures, checks, book.parts,
    )  # fmt: skip


def _stages(subject: Subject) -> Table:
    """Which step of this run stands for which of the paper's."""
    stages, metrics = subject.stages, subject.metrics
    rows = []
    for paper in sorted({*PAPER_STAGES, *CHECKPOINTS, *swapping.SHOWN, 800}):
        step = stages.at(paper)
        now = metrics.sel(step=step)
        rows.append([paper, step, float(now.train_accuracy), float(now.test_accuracy)])
    return Table(
        "stages", "Stages of this run",
        ("the paper's step", "this run's step", "training accuracy", "test accuracy"), rows,
        "The paper's run has memorised at step 800 and ends at step 1,939; this one has memorised (training accuracy "
        f"{stages.train_level:.1%}) at step {stages.memorised} and generalised (test accuracy {stages.test_level:.1%}) "
        f"at step {stages.generalised}. Steps between are found by linear interpolation.",
    )  # fmt: skip


def _summary(subject: Subject) -> list[str]:
    setting, stages, metrics = subject.setting, subject.stages, subject.metrics
    best = f"training {float(metrics.train_accuracy.max()):.1%}, test {float(metrics.test_accuracy.max()):.1%}"
    grokked = (
        f"It memorises by step {stages.memorised} and generalises by step {stages.generalised}."
        if stages.grokked
        else f"It does NOT grok within these steps: the highest accuracies are {best}. Its stages are where 99 % of "
        f"these are first reached (steps {stages.memorised} and {stages.generalised})."
    )
    size = sum(p.numel() for p in subject.model().parameters())
    return [
        f"The paper's one-layer Transformer ({size:,} parameters) on {setting.train:,} training samples, full batch, "
        f"AdamW with betas {setting.betas}, {stages.last:,} steps. {grokked}",
        "Contributions are what is added to the log-probabilities (the paper's psi is the negative).",
        *_explained(setting),
    ]


def _explained(setting: GrokkingSetting) -> list[str]:
    """What is explained, and on how many samples."""
    lines = []
    if "influences" in setting.experiments:
        lines.append(f"Figure 3a explains every step of the run, on {setting.explained} test samples.")
    if {"kernels", "lasso"} & {*setting.experiments}:
        lines.append(
            f"Figures 4 to 6 and 9 explain {setting.explained} test and {setting.train_explained} training "
            f"predictions, against all {setting.train:,} training samples. Contributions are summed over outputs "
            "first there, as in the paper's Figure 4, and similarities are those of Definition 4.4 of what is left, "
            "over steps of the window, parameters of the layer and training samples."
        )
    return lines

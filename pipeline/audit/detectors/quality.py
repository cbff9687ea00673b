"""Picture quality by the optional package cleanvision: run only where it is named."""

import numpy as np

from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Detector, Finding, Group, detector
from pipeline.audit.quality import measures


class Quality(Detector):
    """A property of cleanvision's, by its name there."""

    source = "cleanvision"
    needs = ("samples",)
    family = "quality"
    package = "cleanvision"
    ranks = False

    def find(self, data: AuditData, worst: float) -> Finding:
        """Score and flag are cleanvision's, with its default threshold; NaN where the picture cannot be decoded."""
        issues = measures(data).frame
        score_N, issue_N = np.full(data.N, np.nan, np.float32), np.zeros(data.N, bool)
        if len(issues):
            score_N[issues.index] = issues[f"{self.name}_score"].clip(0, 1)
            issue_N[issues.index] = issues[f"is_{self.name}_issue"]
        rows = np.flatnonzero(issue_N)
        rows = rows[np.argsort(score_N[rows], kind="stable")]
        text = (
            f"{len(rows):,} pictures, scores {score_N[rows].min():.2f} to {score_N[rows].max():.2f}"
            if len(rows)
            else ""
        )
        return Finding(score_N, issue_N, [Group(self.title, text, rows, len(rows))] if len(rows) else [])

    @staticmethod
    def reason(score: float) -> str:
        return f"score {score:.2f}"


@detector
class Dark(Quality):
    name = "dark"
    title = "dark"
    text = "Hardly a pixel is light. The score is the 99th percentile of the brightness."


@detector
class Light(Quality):
    name = "light"
    title = "bright"
    text = "Hardly a pixel is dark. The score is 1 minus the 5th percentile of the brightness."


@detector
class Blurry(Quality):
    name = "blurry"
    title = "blurry"
    text = "Weak edges in a copy of at most 64 pixels a side."


@detector
class LowInformation(Quality):
    name = "low_information"
    title = "low information"
    text = "Few grey levels or colours: a low entropy of the histogram."


@detector
class OddSize(Quality):
    name = "odd_size"
    title = "odd size"
    text = "Much smaller or larger than the other pictures: outside 3 interquartile ranges."


@detector
class OddAspectRatio(Quality):
    name = "odd_aspect_ratio"
    title = "odd shape"
    text = "Much longer one way than the other. The score is the shorter side over the longer."


@detector
class Grayscale(Quality):
    name = "grayscale"
    title = "greyscale"
    text = "The three channels are equal, in whatever mode the file was saved."

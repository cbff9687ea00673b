"""Image-text retrieval among held-out pairs, and among the test pictures where the test set has captions."""

from pipeline.evaluation.evaluators.base import Evaluator
from pipeline.evaluation.held_out import Embedded, HeldOut
from pipeline.evaluation.retrieval import recalls, retrieval


class Retrieval(Evaluator):
    """{"retrieval"}: of the test set, and {"pairs": {"count", "unreadable", "retrieval"}}: of held-out pairs, each only
    where there are some.

    Both are as of retrieval.recalls, None where nothing can be read.
    """

    name = "retrieval"
    needs = "held-out pairs (evaluation.pairs=INDEX) or a test set with test_captions (evaluation.test=DIR)"

    @classmethod
    def possible(cls, data: HeldOut) -> bool:
        return data.pairs is not None or has_captions(data)

    def __call__(self, embedded: Embedded) -> dict:
        figures: dict = {}
        if has_captions(self.data):
            readable_N = embedded.readable_N
            captions = [texts for texts, readable in zip(self.data.test.captions, readable_N) if readable]
            found = retrieval(embedded.encoder, embedded.image_ND[readable_N], captions) if any(captions) else None
            figures["retrieval"] = found
        if self.data.pairs:
            pairs = embedded.pairs
            text_of_image = [[number] for number in pairs.text_N.tolist()]
            found = recalls(pairs.image_ND, pairs.text_UD, text_of_image) if text_of_image else None
            figures["pairs"] = {**pairs.counts, "retrieval": found}
        return figures

    def line(self, figures: dict) -> str:
        found = figures["pairs"]["retrieval"] if self.data.pairs else figures["retrieval"]
        if not found:
            return "R@1 ?"
        return f"R@1 {found['image_to_text']['r1']:.1%} image to text, {found['text_to_image']['r1']:.1%} text to image"


def has_captions(data: HeldOut) -> bool:
    """Whether there is a test set, and it has captions."""
    return data.test is not None and data.test.captions is not None

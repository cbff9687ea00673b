"""Image-text retrieval: recall at k in both directions, exact, in blocks of queries so that memory stays bounded.

Defined as in clip_benchmark (zeroshot_retrieval) and in the CLIP literature: a query counts as found when at least one
of its positives is among the k candidates of highest cosine. Where candidates tie, as equal captions of several
pictures do, clip_benchmark's figure depends on the order in which ties come; here it is the expectation over all
orders.
"""

from collections import Counter

import numpy as np
import torch

from pipeline.evaluation.encoding import Encoder

KS = (1, 5, 10)
BLOCK = 512  # queries at a time
CELLS = 1 << 23  # of queries x candidates at a time, at most


def retrieval(encoder: Encoder, image_ND: torch.Tensor, captions: list[list[str]]) -> dict:
    """`recalls` of pictures and texts. image_ND: float32, unit length; captions: those of each picture. Equal captions
    are encoded once."""
    number = {text: i for i, text in enumerate(dict.fromkeys(text for texts in captions for text in texts))}
    text_of_image = [[number[text] for text in texts] for texts in captions]
    return recalls(image_ND, encoder.texts(list(number)), text_of_image)


def recalls(image_ND: torch.Tensor, text_UD: torch.Tensor, text_of_image: list[list[int]]) -> dict:
    """{"image_to_text": {"r1", "r5", "r10"}, "text_to_image": ...}: fractions of 1 of the pictures and of the captions.

    image_ND, text_UD: float32, unit length; text_of_image[n] lists the numbers of picture n's captions in text_UD.
    """
    block = max(1, min(BLOCK, CELLS // max(len(image_ND), len(text_UD))))
    return {
        "image_to_text": image_to_text(image_ND, text_UD, text_of_image, block),
        "text_to_image": text_to_image(image_ND, text_UD, text_of_image, block),
    }


def image_to_text(
    image_ND: torch.Tensor, text_UD: torch.Tensor, text_of_image: list[list[int]], block: int = BLOCK
) -> dict:
    """{"r1", ...}: text_of_image[n] lists the numbers of picture n's captions in text_UD; one that several pictures
    have counts as often."""
    device = image_ND.device
    copies_U = torch.bincount(torch.tensor([u for texts in text_of_image for u in texts]), minlength=len(text_UD))
    copies_U = copies_U.to(device)
    queries = [n for n, texts in enumerate(text_of_image) if texts]
    # Results are kept in one tensor: small ones that stay between large ones that go would fragment the memory.
    counts_3Q = torch.zeros(3, len(queries), dtype=torch.long, device=device)
    for at in range(0, len(queries), block):
        some = queries[at : at + block]
        cos_BU = image_ND[some] @ text_UD.T
        own_BU = torch.zeros_like(cos_BU)
        for row, n in enumerate(some):
            for u, times in Counter(text_of_image[n]).items():
                own_BU[row, u] = times
        best_B1 = cos_BU.masked_fill(own_BU == 0, -torch.inf).amax(1, keepdim=True)
        counts_3Q[0, at : at + block] = ((cos_BU > best_B1) * copies_U).sum(1)
        counts_3Q[1, at : at + block] = ((cos_BU == best_B1) * copies_U).sum(1)
        counts_3Q[2, at : at + block] = ((cos_BU == best_B1) * own_BU).sum(1).long()
    return recall(*counts_3Q)


def text_to_image(
    image_ND: torch.Tensor, text_UD: torch.Tensor, text_of_image: list[list[int]], block: int = BLOCK
) -> dict:
    """{"r1", ...}: every caption of every picture is a query, whose positive is that picture."""
    pairs = [(u, n) for n, texts in enumerate(text_of_image) for u in texts]
    counts_3Q = torch.ones(3, len(pairs), dtype=torch.long, device=image_ND.device)
    for at in range(0, len(pairs), block):
        text_B, image_B = torch.tensor(pairs[at : at + block], device=image_ND.device).T
        cos_BN = text_UD[text_B] @ image_ND.T
        own_B1 = cos_BN.gather(1, image_B[:, None])
        counts_3Q[0, at : at + block] = (cos_BN > own_B1).sum(1)
        counts_3Q[1, at : at + block] = (cos_BN == own_B1).sum(1)
    return recall(*counts_3Q)


def recall(above_Q: torch.Tensor, tied_Q: torch.Tensor, own_Q: torch.Tensor) -> dict:
    """{"r1", ...} over queries: `above` candidates score higher than the best positive, `tied` as high, `own` of which
    are positives.

    The chance that one of `own` is among the first k - above of the tied ones in random order is hypergeometric.
    """
    from scipy.stats import hypergeom  # here: every start would wait for it

    above, tied, own = (counts.cpu().numpy() for counts in (above_Q, tied_Q, own_Q))
    return {f"r{k}": float(1 - hypergeom.pmf(0, tied, own, np.clip(k - above, 0, tied)).mean()) for k in KS}

"""Pictures that lie apart from all others: backdoors in CLIP data seen from their neighbourhoods.

Huang et al., "Detecting Backdoor Samples in Contrastive Language Image Pretraining", ICLR 2025: a picture with a
trigger has no near neighbours in a small random sample of the data, in which too few others have the trigger. Legend: R
sampled pictures, K neighbours.
"""

from abc import abstractmethod

import faiss
import numpy as np

from pipeline.audit.blocks import order_fractions
from pipeline.audit.data import AuditData
from pipeline.audit.detectors import Detector, Finding, detector, lowest

NEIGHBOURS = 16
NONE = -2  # number of a row that is not in the index; faiss answers -1 where it finds nothing
EXACT = 1 << 16  # references up to this size are searched exactly, larger ones by IVF


def unit(rows_BD: np.ndarray) -> np.ndarray:
    """float32 rows of unit length; a row without direction stays zero, and one that is not finite becomes zero."""
    rows_BD = np.ascontiguousarray(rows_BD, np.float32)
    rows_BD = np.where(np.isfinite(rows_BD).all(1, keepdims=True), rows_BD, np.float32(0))
    return rows_BD / np.maximum(np.linalg.norm(rows_BD, axis=1, keepdims=True), 1e-12)


def build_index(rows_RD: np.ndarray) -> faiss.Index:
    """faiss index of inner products: exact, or IVF where there are many rows."""
    width = rows_RD.shape[1]
    if len(rows_RD) <= EXACT:
        index: faiss.Index = faiss.IndexFlatIP(width)
    else:
        cells = int(4 * np.sqrt(len(rows_RD)))
        index = inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
        index.train(
            rows_RD[np.random.default_rng(0).choice(len(rows_RD), min(len(rows_RD), 40 * cells), replace=False)]
        )
        inverted.nprobe = 16
    index.add(rows_RD)
    return index


def search(index: faiss.Index, rows_BD: np.ndarray, own_B: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(distances, numbers), both (B, k): the k nearest of the index, without the number own_B (or NONE); Euclid's
    distance."""
    similarity_BK, number_BK = index.search(rows_BD, k + 1)
    keep_BK = number_BK != own_B[:, None]
    keep_BK[keep_BK.all(1), -1] = False
    shape = (len(rows_BD), k)
    distance_BK = np.sqrt(np.maximum(2 - 2 * similarity_BK[keep_BK], 1e-8)).reshape(shape)
    return distance_BK, number_BK[keep_BK].reshape(shape)


def factors(data: AuditData) -> dict[str, np.ndarray]:
    """{name: (N,)}: the factor of every pair's picture by each detector of this module, from its nearest of data.sample
    random ones. Made once, a block at a time: neighbours are not kept."""
    if "factors" not in data.cache:
        usable = np.flatnonzero(~np.isnan(data.score_N))
        size = min(data.sample, len(usable))
        k = min(NEIGHBOURS, max(1, size - 2))
        reference_R = np.sort(np.random.default_rng(0).choice(usable, size, replace=False))
        del usable
        rows_RD = unit(data.images.take(reference_R))
        index = build_index(rows_RD)
        distance_RK, _ = search(index, rows_RD, np.arange(size), k)
        found = {kind.name: np.empty(data.N, kind.kind) for kind in (KDistance, SLOF, DAO)}
        for at, rows_BD in data.images.blocks():
            number_B = np.arange(at, at + len(rows_BD))
            place_B = np.minimum(np.searchsorted(reference_R, number_B), size - 1)
            own_B = np.where(reference_R[place_B] == number_B, place_B, NONE)
            near = search(index, unit(rows_BD), own_B, k)
            for kind in (KDistance, SLOF, DAO):
                found[kind.name][at : at + len(rows_BD)] = kind.factor(*near, distance_RK)
        data.cache["factors"] = found
    return data.cache["factors"]


class Neighbourhood(Detector):
    """An outlier factor in 0..inf, higher = worse; the score is the fraction of pictures with a higher one."""

    needs = ("images",)
    least = 3
    family = "neighbourhood"
    kind: type[np.floating] = np.float32  # of the factor

    @staticmethod
    @abstractmethod
    def factor(distance_BK: np.ndarray, number_BK: np.ndarray, distance_RK: np.ndarray) -> np.ndarray:
        """(B,): the factor of each picture, from its nearest references and theirs."""

    def find(self, data: AuditData, worst: float) -> Finding:
        key_N = -factors(data)[self.name]
        key_N[np.isnan(key_N)] = np.inf  # nothing speaks against it
        key_N[np.isnan(data.score_N)] = np.nan
        score_N = order_fractions(key_N)
        return Finding(score_N, lowest(score_N, worst))


@detector
class KDistance(Neighbourhood):
    name = "kdistance"
    title = "picture far from all others"
    text = "The distance to the 16th nearest picture of a random sample is large."
    source = "Ramaswamy, Rastogi, Shim, SIGMOD 2000; Huang et al., ICLR 2025"

    @staticmethod
    def factor(distance_BK: np.ndarray, number_BK: np.ndarray, distance_RK: np.ndarray) -> np.ndarray:
        return distance_BK[:, -1]


@detector
class SLOF(Neighbourhood):
    name = "slof"
    title = "picture less crowded than its neighbours"
    text = "Simplified local outlier factor: its 16-distance over those of its neighbours."
    source = "Schubert, Zimek, Kriegel, DMKD 2014; Huang et al., ICLR 2025"

    @staticmethod
    def factor(distance_BK: np.ndarray, number_BK: np.ndarray, distance_RK: np.ndarray) -> np.ndarray:
        return (distance_BK[:, -1:] / distance_RK[number_BK, -1]).mean(1)


@detector
class DAO(Neighbourhood):
    name = "dao"
    title = "picture less crowded, by local dimension"
    text = "Dimensionality-aware outlier: SLOF to the power of the neighbours' local intrinsic dimension."
    source = "Anderberg et al., SDM 2024; Huang et al., ICLR 2025"
    kind = np.float64

    @staticmethod
    def factor(distance_BK: np.ndarray, number_BK: np.ndarray, distance_RK: np.ndarray) -> np.ndarray:
        """The dimension is its maximum likelihood estimate, -1 / mean log(d_i / d_k) (Amsaleg et al., KDD 2015)."""
        dimension_R = -1 / np.minimum(np.log(distance_RK / distance_RK[:, -1:]).mean(1), -1e-6)
        ratio_BK = np.log(distance_BK[:, -1:] / distance_RK[number_BK, -1])
        return np.exp(np.clip(dimension_R[number_BK] * ratio_BK, -80, 80), dtype=np.float64).mean(1)

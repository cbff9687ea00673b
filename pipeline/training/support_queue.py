"""Support queue: past embeddings of one modality, searched for the nearest neighbour of a view (NNCLR, section 3.2)."""

import faiss
import torch

from pipeline.distributed import comm

CHUNK = 4096  # queries at a time where faiss has no GPU build


class SupportQueue:
    """First-in, first-out queue of the last `size` valid embeddings of all ranks, float32, the same on every rank."""

    def __init__(self, size: int, dim: int, device: torch.device):
        self.queue_PD = torch.zeros(size, dim, device=device)
        self.head, self.filled = 0, 0

    @torch.no_grad()
    def search(self, z_BD: torch.Tensor) -> torch.Tensor:
        """(B, D): nearest embedding in the queue of each row, by inner product; the rows themselves if it is empty."""
        if not self.filled:
            return z_BD.detach().float()
        queue = self.queue_PD[: self.filled]
        return queue[nearest(z_BD.detach().float().contiguous(), queue)]

    @torch.no_grad()
    def push(self, z_BD: torch.Tensor, valid_B: torch.Tensor) -> None:
        """Append the valid rows of all ranks, in rank order."""
        rows = [len(z_BD)] * comm.world()
        z_BD, valid_B = comm.all_gather_rows(z_BD.detach().float(), rows), comm.all_gather_rows(valid_B, rows)
        size = len(self.queue_PD)
        new_ND = z_BD[valid_B][-size:]
        self.queue_PD[(self.head + torch.arange(len(new_ND), device=new_ND.device)) % size] = new_ND
        self.head = (self.head + len(new_ND)) % size
        self.filled = min(size, self.filled + len(new_ND))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Tensors that restore the queue."""
        return {"queue": self.queue_PD, "place": torch.tensor([self.head, self.filled])}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore a queue; of one of another size the newest embeddings that there is room for."""
        saved_PD, (head, filled) = state["queue"], state["place"].tolist()
        size = len(self.queue_PD)
        if len(saved_PD) != size:  # another train.support_queue
            saved_PD = saved_PD.roll(-head, 0)[len(saved_PD) - filled :][-size:]
            filled = len(saved_PD)
            head = filled % size
        self.queue_PD[: len(saved_PD)] = saved_PD.to(self.queue_PD.device)
        self.head, self.filled = head, filled


@torch.library.custom_op("safeclip::nearest", mutates_args=())
def nearest(query_BD: torch.Tensor, queue_PD: torch.Tensor) -> torch.Tensor:
    """int64 (B,): row of the queue with the largest inner product. Exact; by faiss, or by torch without faiss-gpu."""
    if query_BD.device.type == "cpu":
        return torch.from_numpy(
            faiss.knn(query_BD.numpy(), queue_PD.numpy(), 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0].copy()
        )
    if hasattr(faiss, "StandardGpuResources"):
        return _gpu_nearest(query_BD, queue_PD)
    return torch.cat([(part @ queue_PD.T).argmax(1) for part in query_BD.split(CHUNK)])


@nearest.register_fake
def _(query_BD: torch.Tensor, queue_PD: torch.Tensor) -> torch.Tensor:
    """Output shape and device, for tracing on fake devices."""
    torch._check(query_BD.device == queue_PD.device, lambda: f"query on {query_BD.device}, queue on {queue_PD.device}")
    return query_BD.new_empty(len(query_BD), dtype=torch.int64)


def _gpu_nearest(
    query_BD: torch.Tensor, queue_PD: torch.Tensor, resources: dict[int, "faiss.StandardGpuResources"] = {}
) -> torch.Tensor:
    import faiss.contrib.torch_utils  # noqa: F401  lets faiss take tensors

    device = query_BD.device.index or 0
    if device not in resources:
        resources[device] = faiss.StandardGpuResources()
    return faiss.knn_gpu(resources[device], query_BD, queue_PD, 1, metric=faiss.METRIC_INNER_PRODUCT, device=device)[1][
        :, 0
    ]
